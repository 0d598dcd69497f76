"""`sae-fast encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sae_fast.cli._common import one_line_errors


def encode(
    sae: Annotated[str, typer.Argument(help="The folder of a demo or train run, or any SAE that `convert` reads.")],
    out: Annotated[Path | None, typer.Option(help="The store's folder; by default RUN/store, or out/store.")] = None,
    model: Annotated[str | None, typer.Option(help="A Hugging Face model: its folder or hub id.")] = None,
    layer: Annotated[int | None, typer.Option(help="i: the output of block i, counted from 0.")] = None,
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
