"""How the benchmarks end that are programs of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import jsonfile, machine


def close(
    console: Console, others: machine.Others, results: list[dict[str, Any]], out: Path | None, **setting: Any
) -> None:
    """Says how busy the machine was, and writes the figures into ``out``, with what the caller says of the setting."""
    if others.share() > 0.05:
        console.print(f"others took {others.share():.0%} of this machine: ratios hold better than times", style="yellow")
    if out is not None:
        jsonfile.write(out, {"about": machine.about(), **setting, "results": results})
