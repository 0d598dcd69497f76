"""What is known of a device: which piece of a run is done, of which sources; and how a run's folder joins what is known.

A piece is a test file, a job of the benchmark or an op to tune.  `python -m benchmarks.gpu.record DIR` merges a folder that
was brought here from elsewhere, as `make gpu` does where it ran.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import jsonfile, machine
from benchmarks.results import COLUMNS, KEY
from sae_fast import files

RESULTS = Path(__file__).parents[1] / "results"
DONE, BEGUN = "done", "begun"  # any other state says what is wrong
RECORD, ROWS, TUNING, ENVIRONMENT = "record.json", "results.csv", "tuning.json", "environment.json"

Pieces = dict[str, dict[str, dict[str, str]]]  # by part and name: state, sources, commit, time


def home(device: str) -> Path:
    """The committed folder of a device."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


class Record:
    """record.json of a run's folder, over that of ``known``; on the disk after every change."""

    def __init__(self, folder: Path, known: Path):
        self.path = folder / RECORD
        self.pieces = _newest(_json(known / RECORD), _json(self.path))

    def state(self, part: str, piece: str, sources: str) -> str | None:
        """What became of a piece of these sources; None where it was not begun."""
        it = self.pieces.get(part, {}).get(piece)
        return it["state"] if it and it["sources"] == sources else None

    def order(self, part: str, pieces: Mapping[str, str]) -> list[str]:
        """The pieces (name → sources): those not begun, in their order; then those that did not end well, for what hangs
        must not come before what does not; then those that are done, the oldest first."""

        def key(piece: str) -> tuple[int, str]:
            state = self.state(part, piece, pieces[piece])
            rank = 0 if state is None else 2 if state == DONE else 1
            return rank, self.pieces[part][piece]["time"] if rank else ""

        return sorted(pieces, key=key)

    def left(self, part: str, pieces: Mapping[str, str]) -> list[str]:
        """Of these in their order those that are not done."""
        return [it for it in self.order(part, pieces) if self.state(part, it, pieces[it]) != DONE]

    def note(self, part: str, piece: str, sources: str, state: str) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.pieces.setdefault(part, {})[piece] = dict(state=state, sources=sources, commit=machine.commit(), time=now)
        jsonfile.write(self.path, self.pieces)


def merge(folder: Path, into: Path) -> None:
    """Adds what a run's folder holds to a device's: a new row takes the place of an old one of the same case, and a piece's
    state that of an older; the rest stays, with its own commit and time."""
    into.mkdir(parents=True, exist_ok=True)
    pieces = _newest(_json(into / RECORD), _json(folder / RECORD))
    if pieces:
        jsonfile.write(into / RECORD, pieces)
    by_time = sorted((*lines(into / ROWS), *lines(folder / ROWS)), key=lambda row: row["time"])
    rows = {tuple(row[k] for k in KEY): row for row in by_time}
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, [*COLUMNS, "note"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(_valid(rows.values()))
        files.write_text(into / ROWS, text.getvalue())
    tuned = _json(folder / TUNING)
    if tuned:
        jsonfile.write(into / TUNING, {op: it for op, it in (_json(into / TUNING) | tuned).items() if it})
    if (folder / ENVIRONMENT).exists():
        shutil.copyfile(folder / ENVIRONMENT, into / ENVIRONMENT)


def lines(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, without a last one that was cut; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{"note": "", **line} for line in csv.DictReader(file) if None not in line.values() and None not in line]


def _valid(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """A fault goes once its contender was measured later, and its time once it was found to be wrong later; what was
    skipped says nothing of a device."""
    rows = [row for row in rows if row["metric"] not in ("skipped", "goal")]
    either = sorted((row for row in rows if row["metric"] in ("fault", "time")), key=lambda row: row["time"])
    last = {_place(row): row["metric"] for row in either}
    return [row for row in rows if row["metric"] not in ("fault", "time") or row["metric"] == last[_place(row)]]


def _place(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[k] for k in KEY if k != "metric")


def _newest(*of: Pieces) -> Pieces:
    found: Pieces = {}
    for pieces in of:
        for part, by_name in pieces.items():
            mine = found.setdefault(part, {})
            mine |= {name: it for name, it in by_name.items() if name not in mine or it["time"] >= mine[name]["time"]}
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    came = Path(sys.argv[1])
    merge(came, home(_json(came / ENVIRONMENT)["gpu"]))
