"""`sae-fast list`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from sae_fast.cli._common import one_line_errors

ORDER = 3  # in the list of commands


def list(
    name: Annotated[str, typer.Argument(help="Part of a release's or a repository's name: gemma-scope-2b.")] = "",
) -> None:
    """List published SAEs that sae_fast.load takes: of each its format, its place, its L0 where it is known.

    Without NAME the releases, with how many SAEs each has. The list is SAELens' own if that is installed, else short.
    """
    with one_line_errors():
        from sae_fast.interop.published import published

        saes = published(name)
        if not saes:
            raise ValueError(f"name: got {name!r}, which is in no release's and no repository's name")
        if name:
            for sae in saes:
                l0 = "" if not sae.l0 else f"  L0 {sae.l0:g}"
                scale = "" if sae.activation_scale is None else f"  --activation-scale {sae.activation_scale:g}"
                typer.echo(f"{sae.format or 'refused'}  {sae.place}{l0}{scale}")
        else:
            counts = Counter((sae.release, sae.format or "refused", sae.model) for sae in saes)
            for (release, format, model), n in counts.items():
                typer.echo(f"{release}  {format}  {model}  {n:,}")
