"""`sae-fast encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sae_fast.cli._common import Device, Hook, Layer, Quiet, bars, notes, one_line_errors

ORDER = 3  # in the list of commands


def encode(
    sae: Annotated[str, typer.Argument(help="The folder of a demo or train run, or any SAE that `convert` reads.")],
    out: Annotated[
        Path | None, typer.Option(help="The store's folder; by default RUN/store, or one of the SAE's own in out/store.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A Hugging Face model: its folder or hub id.")] = None,
    layer: Layer = None,
    hook: Hook = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file to run the model over.")] = None,
    context_length: Annotated[
        int | None,
        typer.Option(help="Tokens per context: by default the SAE's own, or 128; of --activations each token is its own."),
    ] = None,
    activations: Annotated[
        Path | None, typer.Option(help="A .npy or .safetensors file, [N, d], instead of model, layer and text.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens encoded at a time.")] = 4096,
    device: Device = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Though the SAE's metadata says otherwise.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write every activation of an SAE over a text into a feature store: Parquet, for `report` and for SQL.

    Model, layer, context length and text are those that the SAE's metadata says, where it does: a run of `demo` or
    `train` needs nothing more, and what it was trained on is encoded.
    """
    with one_line_errors(), notes():
        from sae_fast.devices import usable
        from sae_fast.runs.encode import encode

        folder, info = encode(
            sae, out, model=model, layer=layer, hook=hook, text=text, context_length=context_length,
            activations=activations, batch_size=batch_size, overwrite=overwrite, anyway=anyway,
            device=str(usable(device, "--device")), progress=bars(quiet),
        )  # fmt: skip
        what = f"{info['n_activations']:,} activations of {info['n_tokens']:,} tokens"
        l0, speed = info["n_activations"] / info["n_tokens"], info["n_tokens"] / info["seconds"]
        if not quiet:
            Console().print(f"{what} (L0 {l0:.1f}), {speed:,.0f} tokens/s, into {folder}", highlight=False, soft_wrap=True)
