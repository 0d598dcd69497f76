"""The commands' common parts: options, errors in one line, the closing table."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_fast.signals import leaving

if TYPE_CHECKING:
    from sae_fast.runs.train import Run

Kind = Annotated[str, typer.Option(help="gated, relu, jumprelu, topk, batchtopk or matryoshka.")]
Steps = Annotated[int, typer.Option(help="Training steps.")]
Out = Annotated[Path, typer.Option(help="The folder for checkpoint, metrics, plot and features.")]
Seed = Annotated[int, typer.Option(help="Of the weights and of the order of the tokens.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default the GPU if there is one.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Give up a run that is in OUT.")]
Layer = Annotated[int | None, typer.Option(help="i: the output of block i, counted from 0, as blocks.i.hook_resid_post.")]
Hook = Annotated[
    str | None,
    typer.Option(help="Another site: a module's name, with :input what it is given, or TransformerLens' name."),
]
SaveEvery = Annotated[float, typer.Option(min=0, help="Minutes from checkpoint to checkpoint.")]


def show(result: Run, out: Path) -> None:
    """Print the closing table."""
    from sae_fast.runs.train import summary

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
    """Say in a line, without a traceback, what a user can put right, and what a Ctrl-C or SIGTERM has ended."""
    try:
        with leaving():
            yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        say("error: ", "bold red", str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        say("interrupted ", "bold yellow", str(error))
        raise typer.Exit(128 + getattr(error, "number", signal.SIGINT)) from None


@contextmanager
def notes() -> Iterator[None]:
    """Say in a line each of the block's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: say("note: ", "bold yellow", str(message))
        yield


def say(kind: str, style: str, message: str) -> None:
    """Print one line on stderr."""
    Console(stderr=True).print(Text.assemble((kind, style), " ".join(message.split())), soft_wrap=True)


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """The numbers of an option that are separated by commas: ints where all are whole, else floats."""
    if text is None:
        return None
    for number in (int, float):
        try:
            return tuple(number(part) for part in text.split(","))
        except ValueError:
            pass
    raise ValueError(f"{name}: got {text!r}, want numbers with commas between them")


def bars(quiet: bool) -> bool:
    """True where progress is shown: to people only."""
    return not quiet and sys.stderr.isatty()
