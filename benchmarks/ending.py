"""How the benchmarks of the packages' own training loops end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine


def close(console: Console, others: machine.Others, results: list[dict[str, Any]], out: Path | None) -> None:
    """Says how busy the machine was, and writes the figures into ``out``."""
    if others.share() > 0.05:
        console.print(f"others took {others.share():.0%} of this machine: ratios hold better than times", style="yellow")
    if out is not None:
        out.write_text(json.dumps({"about": machine.about(), "results": results}, indent=2) + "\n")
