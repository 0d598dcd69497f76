"""`sae-fast train`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sae_fast.cli._common import (
    Device,
    Hook,
    Kind,
    Layer,
    Out,
    Overwrite,
    Quiet,
    SaveEvery,
    Seed,
    Steps,
    bars,
    notes,
    numbers,
    one_line_errors,
    show,
)

ORDER = 1  # in the list of commands
_sparsity = partial(typer.Option, rich_help_panel="How sparse, by kind")
_training = partial(typer.Option, rich_help_panel="How it is trained")

K = Annotated[int | None, _sparsity(help="topk, batchtopk, matryoshka: features kept a token, by default 32.")]
Groups = Annotated[
    str | None,
    _sparsity(help="matryoshka: shares of the features, 0.1,0.3,0.6, or sizes; by default from 1/32 on, doubling."),
]
L1 = Annotated[float | None, _sparsity(help="gated, relu: sparsity coefficient λ, by default 2.5.")]
TargetL0 = Annotated[float | None, _sparsity(help="jumprelu: features a token, by default 32.")]
Bandwidth = Annotated[
    float | None,
    _sparsity(help="jumprelu: width of the window at the threshold, by default 0.5, where x has unit variance."),
]
Penalty = Annotated[float | None, _sparsity(help="jumprelu: weight of (L0 / target − 1)², by default 50.")]
InitL0 = Annotated[
    float | None,
    _sparsity("--init-l0", "--l0", help="gated, relu, jumprelu: features a token to start with, by default 64."),
]
BatchSize = Annotated[int, _training(help="Tokens per step.")]
Rate = Annotated[float, _training(help="Learning rate, constant and then falling over the last fifth.")]
Beta1 = Annotated[
    float | None,
    _training(help="Adam's momentum: by default 0.9 for topk, batchtopk and matryoshka, else 0."),
]
Aux = Annotated[
    float | None,
    _training(
        help="Weight of AuxK, which revives dead features: by default 1/32 for topk, batchtopk, matryoshka, else 0: none."
    ),
]
DeadAfter = Annotated[
    int | None,
    _training(
        help="Tokens without firing after which a feature is dead: by default a tenth of the training, at most 10 million."
    ),
]


def train(
    model: Annotated[str, typer.Option(help="A Hugging Face model: its folder or hub id.")],
    text: Annotated[Path, typer.Option(help="A UTF-8 file to run the model over.")],
    layer: Layer = None,
    hook: Hook = None,
    out: Out = Path("out/train"),
    kind: Kind = "gated",
    d_sae: Annotated[int, typer.Option(help="Features.")] = 6144,
    k: K = None,
    groups: Groups = None,
    l1: L1 = None,
    target_l0: TargetL0 = None,
    bandwidth: Bandwidth = None,
    penalty: Penalty = None,
    init_l0: InitL0 = None,
    batch_size: BatchSize = 1024,
    steps: Steps = 1500,
    lr: Rate = 2e-3,
    beta1: Beta1 = None,
    aux: Aux = None,
    dead_after: DeadAfter = None,
    context_length: Annotated[int, typer.Option(help="Tokens per context.")] = 128,
    seed: Seed = 0,
    device: Device = None,
    save_every: SaveEvery = 5,
    compare: Annotated[bool, typer.Option("--compare", help="Time a step against dense PyTorch, too; gated only.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train an SAE on a layer, or another site, of your own model, over your own text.

    Activations are scaled to unit variance per dimension for training; the SAE that is saved takes them as they are.
    The checkpoint is written as training goes: sae_fast.load reads the SAE from OUT at any time, and Ctrl-C keeps it.
    A higher --l1 gives fewer features per token and a worse reconstruction; so does a lower --k or --target-l0.
    """
    with one_line_errors(), notes():
        from sae_fast.data.text import read_text_file
        from sae_fast.devices import usable
        from sae_fast.runs.train import Recipe, run

        recipe = Recipe(
            d_sae, batch_size, steps, lr, l1, init_l0, seed=seed, device=str(usable(device, "--device")), kind=kind, k=k,
            target_l0=target_l0, bandwidth=bandwidth, penalty=penalty, groups=numbers("groups", groups), beta1=beta1,
            aux=aux, dead_after=dead_after,
        )  # fmt: skip
        result = run(
            model, layer, read_text_file(text), out, recipe, context_length, hook=hook, text_from=text,
            overwrite=overwrite, save_minutes=save_every, compare=compare, progress=bars(quiet),
        )  # fmt: skip
        if not quiet:
            show(result, out)
