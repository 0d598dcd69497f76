"""`sae-fast convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sae_fast.cli._common import Quiet, notes, one_line_errors
from sae_fast.interop.formats import FORMATS, listed

ORDER = 2  # in the list of commands


def convert(
    src: Annotated[str, typer.Argument(help="A folder, a .pt file, or a place on the Hub: user/repo/folder@revision.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help=f"{listed(list(FORMATS))}.")],
    as_jumprelu: Annotated[bool, typer.Option("--as-jumprelu", help="Write a Gated SAE as a JumpReLU SAE.")] = False,
    fold_decoder_norm: Annotated[
        bool | None, typer.Option(help="Make decoder rows unit; by default as the format's own SAEs are.")
    ] = None,
    activation_scale: Annotated[float | None, typer.Option(help="The SAE was trained on this times x.")] = None,
    k: Annotated[int | None, typer.Option(help="Features an example, where SRC does not say.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="What opens a gate of Llama Scope: openmoss, plain or saelens.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="The language model's name, where SRC does not say.")] = None,
    layer: Annotated[int | None, typer.Option(help="The block, counted from 0, where SRC does not say.")] = None,
    hook_name: Annotated[str | None, typer.Option(help="The hook's name, where SRC does not say.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of this format in DST.")] = False,
    quiet: Quiet = False,
) -> None:
    """Convert an SAE from one package's format to another's, exactly or not at all.

    SRC's format is found by its files. What DST's cannot hold is an error that names it.
    """
    with one_line_errors(), notes():
        from sae_fast import interop

        sae = interop.convert(
            src, dst, to, as_jumprelu=as_jumprelu, fold_decoder_norm=fold_decoder_norm, activation_scale=activation_scale,
            k=k, recipe=recipe,
            model_name=model_name, layer=layer, hook_name=hook_name, overwrite=overwrite,
        )  # fmt: skip
    what = f"{type(sae).__name__}, {sae.d_sae:,} features of {sae.d_in} dimensions"
    if not quiet:
        source = sae.metadata.get("format", "sae_fast")
        Console().print(f"{what}: {source} → {to}, into {dst}", highlight=False, soft_wrap=True)
