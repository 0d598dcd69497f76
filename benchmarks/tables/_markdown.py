"""Numbers and tables as the documents write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.tables._region import ROOT


def number(value: float, digits: int = 3) -> str:
    """So many digits; whole from a thousand on, thousands apart, as a count is."""
    if isinstance(value, int) or abs(value) >= 999.5:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:#.{digits}g}".rstrip(".")


def times(value: float) -> str:
    return f"{number(value, 2 if value < 10 else 3)} ×"


def shape(x: object) -> str:
    """B 2 048, d 768, F 24 576, L0 46, of a shape's own spelling."""
    sizes = (part.split("=") for part in str(x).split())
    return ", ".join(f"{name} {float(size):,g}".replace(",", " ") for name, size in sizes)


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def source(path: Path, about: str) -> str:
    """Where the figures above are from, and of when."""
    name = path.relative_to(ROOT).as_posix()
    return f"\n[{path.name}](/{name}): {about}.\n"


def of(about: dict[str, str]) -> str:
    """The device, the commit and, where it is known, the day that a JSON of figures names."""
    day = f", {about['date']}" if "date" in about else ""
    return f"{about['device']}, commit {about['commit']}{day}"
