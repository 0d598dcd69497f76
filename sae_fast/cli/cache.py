"""`sae-fast cache`."""

from __future__ import annotations

from typing import Annotated

import typer

from sae_fast.cli._common import one_line_errors

ORDER = 5  # in the list of commands


def cache(
    clear: Annotated[list[str] | None, typer.Option(help="Remove this key, of those that are listed, or all.")] = None,
    older_than: Annotated[float | None, typer.Option(min=0, help="Remove what no run has used for so many days.")] = None,
) -> None:
    """List what harvests keep on the disk: activations, so that the model need not run again. Nothing else removes them.

    A line has the key, the size, the day it was last used, and what it is of.
    SAE_FAST_CACHE says where the cache is, ~/.cache/sae_fast by default.
    """
    with one_line_errors():
        from sae_fast.data import cache as kept

        entries = kept.entries()
        if clear or older_than is not None:
            gone = kept.chosen(entries, clear or [], older_than)
            for entry in gone:
                entry.remove()
            entries = [entry for entry in entries if entry not in gone]
            typer.echo(f"removed {len(gone)}, {sum(entry.size for entry in gone) / 1e6:,.1f} MB")
        for entry in entries:
            typer.echo(f"{entry.key}  {entry.size / 1e6:9,.1f} MB  {entry.used.date().isoformat()}  {entry.what}")
        typer.echo(f"{sum(entry.size for entry in entries) / 1e6:,.1f} MB in {kept.folder()}")
