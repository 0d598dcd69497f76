"""A region of a document, and who fills it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
REGION = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)

Table = Callable[[], str | None]  # None: nothing is measured yet, and what stands there stays
TABLES: dict[str, Table] = {}


def table(make: Table) -> Table:
    """Decorator: registers a table by its function's name."""
    TABLES[make.__name__] = make
    return make


def newest(name: str, results: Path = RESULTS) -> Path | None:
    """The newest JSON of a name among the machines' results; None before there is one."""
    found = {
        path: json.loads(path.read_text("utf-8"))["about"].get("date", "") for path in sorted(results.glob(f"*/{name}"))
    }
    return max(found, key=lambda path: found[path], default=None)


def documents(root: Path = ROOT) -> list[Path]:
    """The documents with measured figures; docs/claims.md is written by its own programs."""
    return [root / "README.md", *(path for path in sorted((root / "docs").glob("*.md")) if path.name != "claims.md")]


def fill(text: str, to_root: str = "") -> str:
    """A document's text with every table made anew; ``to_root``: what leads from its folder to the root ("../").

    ValueError for a table that nobody makes, and for a comment without the other.
    """
    if text.count("<!-- table:") != text.count("<!-- /table") or text.count("<!-- table:") != len(REGION.findall(text)):
        raise ValueError("text: got a table without its end, or an end without its table, want them in pairs")

    def region(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"table: got {name!r}, want one of {', '.join(sorted(TABLES))}")
        new = TABLES[name]()
        return match[0] if new is None else begin + new.replace("](/", f"]({to_root}") + end

    return REGION.sub(region, text)


def filled(document: Path) -> str:
    """What a document of the repository is to say."""
    return fill(document.read_text("utf-8"), "../" * len(document.relative_to(ROOT).parents[:-1]))
