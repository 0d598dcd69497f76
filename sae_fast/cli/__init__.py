"""`sae-fast`: one file a command."""

from __future__ import annotations

import typer

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
for command in (demo, train, convert, encode, report):
    app.command()(command)
