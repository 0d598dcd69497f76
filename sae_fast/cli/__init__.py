"""`sae-fast`: one file a command."""

from __future__ import annotations

from typing import Annotated

import typer

from sae_fast.cli.cache import cache
from sae_fast.cli.convert import convert
from sae_fast.cli.demo import demo
from sae_fast.cli.encode import encode
from sae_fast.cli.report import report
from sae_fast.cli.train import train

app = typer.Typer(
    help="Train sparse autoencoders on what a transformer computes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (demo, train, convert, encode, report, cache):
    app.command()(command)


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
