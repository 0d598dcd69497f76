"""What the commands share: options, errors in one line, the closing table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sae_fast.demo import Run

Steps = Annotated[int, typer.Option(help="Training steps.")]
Out = Annotated[Path, typer.Option(help="The folder for checkpoint, metrics, plot and features.")]
Seed = Annotated[int, typer.Option(help="Of the weights and of the order of the tokens.")]


def show(result: Run, out: Path) -> None:
    """Prints the closing table."""
    from sae_fast.demo import summary

    held_out = result.held_out.compute()
    table = Table(title=f"on {held_out['tokens']:,} held-out tokens", title_justify="left", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right", style="bold")
    for i, row in enumerate(summary(held_out, result.training, result.step)):
        table.add_row(*row, end_section=i == 3)
    console = Console()
    console.print(table)
    console.print(
        f"Wrote checkpoint/, metrics.json, training.png and features.md into {out}", highlight=False, soft_wrap=True
    )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can put right is said in a line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        message = Text.assemble(("error: ", "bold red"), " ".join(str(error).split()))
        Console(stderr=True).print(message, soft_wrap=True)
        raise typer.Exit(1) from None
