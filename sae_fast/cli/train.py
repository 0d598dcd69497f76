"""`sae-fast train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_fast.cli._common import Out, Seed, Steps, one_line_errors, show


def train(
    model: Annotated[str, typer.Option(help="A Hugging Face model: its folder or hub id.")],
    layer: Annotated[int, typer.Option(help="i: the output of block i, counted from 0.")],
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
