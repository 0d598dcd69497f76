"""`sae-fast`: every module of this folder without an underscore is a command, the function of its name."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Annotated

import typer

app = typer.Typer(
    help="Train sparse autoencoders on what a transformer computes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
_found = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__) if found.name[0] != "_"]
for _module in sorted(_found, key=lambda module: module.ORDER):
    app.command()(getattr(_module, _module.__name__.rpartition(".")[2]))


def _version(asked: bool) -> None:
    if asked:
        from sae_fast import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which this is.")
    ] = False,
) -> None:
    pass
