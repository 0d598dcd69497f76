"""`sae-fast demo`, `train`, `convert`, `encode` and `report`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sae_fast.demo import Run

app = typer.Typer(
    help="Train sparse autoencoders on what a transformer computes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

Steps = Annotated[int, typer.Option(help="Training steps.")]
Out = Annotated[Path, typer.Option(help="The folder for checkpoint, metrics, plot and features.")]
Seed = Annotated[int, typer.Option(help="Of the weights and of the order of the tokens.")]


@app.command()
def demo(out: Out = Path("out/demo"), steps: Steps = 1500, seed: Seed = 0) -> None:
    """Train a Gated SAE on layer 3 of MiniLM, over the documentation inside Python's standard library."""
    with one_line_errors():
        from sae_fast.demo import Recipe, demo_model, run
        from sae_fast.encoding import STDLIB
        from sae_fast.train.text import stdlib_documentation

        recipe = Recipe(steps=steps, seed=seed)
        result = run(demo_model(), 3, stdlib_documentation(), out, recipe, name="all-MiniLM-L6-v2", text_from=STDLIB)
        show(result, out)


@app.command()
def train(
    model: Annotated[str, typer.Option(help="A Hugging Face model: its folder or hub id.")],
    layer: Annotated[int, typer.Option(help="0: the embedding; i: the output of block i.")],
    text: Annotated[Path, typer.Option(help="A UTF-8 file to run the model over.")],
    out: Out = Path("out/train"),
    d_sae: Annotated[int, typer.Option(help="Features.")] = 6144,
    batch_size: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    steps: Steps = 1500,
    lr: Annotated[float, typer.Option(help="Learning rate, constant and then falling over the last fifth.")] = 2e-3,
    l1: Annotated[float, typer.Option(help="Sparsity coefficient λ, for activations of unit variance.")] = 2.5,
    init_l0: Annotated[float, typer.Option("--init-l0", "--l0", help="Features per token to start with.")] = 64,
    context_length: Annotated[int, typer.Option(help="Tokens per context.")] = 128,
    seed: Seed = 0,
) -> None:
    """Train a Gated SAE on a layer of your own model, over your own text.

    Activations are scaled to unit variance per dimension for training; the SAE that is saved takes them as they are.
    A higher --l1 gives fewer features per token and a worse reconstruction.
    """
    with one_line_errors():
        from sae_fast.demo import Recipe, run
        from sae_fast.train.text import read_text_file

        recipe = Recipe(d_sae=d_sae, batch_size=batch_size, steps=steps, lr=lr, l1=l1, init_l0=init_l0, seed=seed)
        show(run(model, layer, read_text_file(text), out, recipe, context_length, text_from=text), out)


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="A folder, a .pt file, or a place on the Hub: user/repo/folder@revision.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="sae_fast, dictionary_learning, saelens, sparsify or saebench.")],
    as_jumprelu: Annotated[bool, typer.Option("--as-jumprelu", help="Write a Gated SAE as a JumpReLU SAE.")] = False,
    fold_decoder_norm: Annotated[
        bool | None, typer.Option(help="Make decoder rows unit; by default as the format's own SAEs are.")
    ] = None,
    activation_scale: Annotated[float | None, typer.Option(help="The SAE was trained on this times x.")] = None,
    model_name: Annotated[str | None, typer.Option(help="The language model's name, where SRC does not say.")] = None,
    layer: Annotated[int | None, typer.Option(help="The layer, where SRC does not say.")] = None,
    hook_name: Annotated[str | None, typer.Option(help="The hook's name, where SRC does not say.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of this format in DST.")] = False,
) -> None:
    """Convert an SAE from one package's format to another's, exactly or not at all.

    SRC's format is found by its files. What DST's cannot hold is an error that names it.
    """
    with one_line_errors(), warnings.catch_warnings(record=True) as notes:
        from sae_fast import interop

        warnings.simplefilter("always")
        sae = interop.convert(
            src, dst, to, as_jumprelu=as_jumprelu, fold_decoder_norm=fold_decoder_norm, activation_scale=activation_scale,
            model_name=model_name, layer=layer, hook_name=hook_name, overwrite=overwrite,
        )  # fmt: skip
    for note in notes:
        Console(stderr=True).print(Text.assemble(("note: ", "bold yellow"), str(note.message)), soft_wrap=True)
    what, source = (
        f"{type(sae).__name__}, {sae.d_sae:,} features of {sae.d_in} dimensions",
        sae.metadata.get("format", "sae_fast"),
    )
    Console().print(f"{what}: {source} → {to}, into {dst}", highlight=False, soft_wrap=True)


@app.command()
def encode(
    sae: Annotated[str, typer.Argument(help="The folder of a demo or train run, or any SAE that `convert` reads.")],
    out: Annotated[Path | None, typer.Option(help="The store's folder; by default RUN/store, or out/store.")] = None,
    model: Annotated[str | None, typer.Option(help="A Hugging Face model: its folder or hub id.")] = None,
    layer: Annotated[int | None, typer.Option(help="0: the embedding; i: the output of block i.")] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file to run the model over.")] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens per context: 128 of a text; of --activations each token is its own.")
    ] = None,
    activations: Annotated[
        Path | None, typer.Option(help="A .npy or .safetensors file, [N, d], instead of model, layer and text.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens encoded at a time.")] = 4096,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is there.")] = False,
) -> None:
    """Write every activation of an SAE over a text into a feature store: Parquet, for `report` and for SQL.

    A run of `demo` or `train` needs nothing more: what it was trained on is encoded.
    """
    with one_line_errors():
        from sae_fast.encoding import encode

        folder, info = encode(
            sae, out, model=model, layer=layer, text=text, context_length=context_length, activations=activations,
            batch_size=batch_size, overwrite=overwrite,
        )  # fmt: skip
        what = f"{info['n_activations']:,} activations of {info['n_tokens']:,} tokens"
        l0, speed = info["n_activations"] / info["n_tokens"], info["n_tokens"] / info["seconds"]
        Console().print(f"{what} (L0 {l0:.1f}), {speed:,.0f} tokens/s, into {folder}", highlight=False, soft_wrap=True)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="The folder of a demo or train run, or any SAE and its --store.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; by default RUN/report.html.")] = None,
    store: Annotated[Path | None, typer.Option(help="The feature store; by default RUN/store, made if missing.")] = None,
    effects: Annotated[Path | None, typer.Option(help='A JSON of effects to show: {"12": 0.5, ...}.')] = None,
    top: Annotated[int, typer.Option(help="Strongest contexts of a feature.")] = 10,
    bins: Annotated[int, typer.Option(help="Quantiles of its activations.")] = 4,
    per_bin: Annotated[int, typer.Option(help="Contexts of each quantile.")] = 2,
    before: Annotated[int, typer.Option(help="Tokens that are shown before the one that fires.")] = 15,
    after: Annotated[int, typer.Option(help="Tokens that are shown after it.")] = 8,
) -> None:
    """Write one HTML page to judge features on: contexts, densities, neighbours, and marks to export.

    The page is one file and needs no network.
    """
    with one_line_errors():
        from sae_fast.report import report as write

        page = write(
            run, out, store=store, effects=effects, top=top, bins=bins, per_bin=per_bin, before=before, after=after
        )
        Console().print(f"{page}, {page.stat().st_size / 1e6:.2g} MB", highlight=False, soft_wrap=True)


def show(result: Run, out: Path) -> None:
    """Prints the closing table."""
    held_out, training, step = result.held_out.compute(), result.training, result.step
    rows = [
        ("L0, features per token", f"{held_out['l0']:.1f}"),
        ("FVU, fraction of variance unexplained", f"{held_out['fvu']:.4f}"),
        ("relative reconstruction bias γ", f"{held_out['relative_reconstruction_bias']:.3f}"),
        ("dead features", f"{held_out['dead_fraction']:.1%}"),
        ("training", f"{training['tokens_per_second']:,.0f} tokens/s"),
        ("a step", f"{step['engine_ms']:.1f} ms"),
        ("a step of dense PyTorch, here and now", f"{step['dense_ms']:.1f} ms"),
        ("times faster", f"{step['times_faster']:.1f}×"),
    ]
    table = Table(title=f"on {held_out['tokens']:,} held-out tokens", title_justify="left", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right", style="bold")
    for i, row in enumerate(rows):
        table.add_row(*row, end_section=i == 3)
    console = Console()
    console.print(table)
    console.print(
        f"Wrote checkpoint/, metrics.json, training.png and features.md into {out}", highlight=False, soft_wrap=True
    )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can put right is said in a line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        message = Text.assemble(("error: ", "bold red"), " ".join(str(error).split()))
        Console(stderr=True).print(message, soft_wrap=True)
        raise typer.Exit(1) from None
