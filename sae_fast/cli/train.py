"""`sae-fast train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_fast.cli._common import (
    Device,
    Hook,
    Layer,
    Out,
    Overwrite,
    Quiet,
    SaveEvery,
    Seed,
    Steps,
    bars,
    notes,
    one_line_errors,
    show,
)

ORDER = 1  # in the list of commands


def train(
    model: Annotated[str, typer.Option(help="A Hugging Face model: its folder or hub id.")],
    text: Annotated[Path, typer.Option(help="A UTF-8 file to run the model over.")],
    layer: Layer = None,
    hook: Hook = None,
    out: Out = Path("out/train"),
    d_sae: Annotated[int, typer.Option(help="Features.")] = 6144,
    batch_size: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    steps: Steps = 1500,
    lr: Annotated[float, typer.Option(help="Learning rate, constant and then falling over the last fifth.")] = 2e-3,
    l1: Annotated[float, typer.Option(help="Sparsity coefficient λ, for activations of unit variance.")] = 2.5,
    init_l0: Annotated[float, typer.Option("--init-l0", "--l0", help="Features per token to start with.")] = 64,
    context_length: Annotated[int, typer.Option(help="Tokens per context.")] = 128,
    seed: Seed = 0,
    device: Device = None,
    save_every: SaveEvery = 5,
    compare: Annotated[bool, typer.Option("--compare", help="Time a step against dense PyTorch, too.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a Gated SAE on a layer, or another site, of your own model, over your own text.

    Activations are scaled to unit variance per dimension for training; the SAE that is saved takes them as they are.
    The checkpoint is written as training goes: sae_fast.load reads the SAE from OUT at any time, and Ctrl-C keeps it.
    A higher --l1 gives fewer features per token and a worse reconstruction.
    """
    with one_line_errors(), notes():
        from sae_fast.data.text import read_text_file
        from sae_fast.devices import usable
        from sae_fast.runs.train import Recipe, run

        chosen = str(usable(device, "--device"))
        recipe = Recipe(d_sae, batch_size, steps, lr, l1, init_l0, seed=seed, device=chosen)
        result = run(
            model, layer, read_text_file(text), out, recipe, context_length, hook=hook, text_from=text,
            overwrite=overwrite, save_minutes=save_every, compare=compare, progress=bars(quiet),
        )  # fmt: skip
        if not quiet:
            show(result, out)
