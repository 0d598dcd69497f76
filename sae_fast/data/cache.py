"""The cache of harvests: how large each store is, of what, since when; and the way to be rid of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sae_fast import files
from sae_fast.data.activations import VERSION
from sae_fast.data.harvest import cache_folder


@dataclass(frozen=True)
class Entry:
    """A folder of the cache.  size: bytes on the disk; what: the site, model and text, as far as it says; used: when a
    harvest made it or a run last opened it."""

    path: Path
    size: int
    what: str
    used: datetime

    @property
    def key(self) -> str:
        return self.path.name

    def remove(self) -> None:
        """Removes it at once: by its new name no run finds it any more."""
        with files.room(self.path.parent) as room:
            os.rename(self.path, room / self.path.name)


def folder() -> Path:
    """The folder of the stores."""
    return cache_folder() / "activations"


def entries() -> list[Entry]:
    """The stores in the cache, the longest unused first, after the rooms of killed harvests are swept."""
    if not folder().is_dir():
        return []
    files.sweep(folder())
    return sorted((_entry(path) for path in _folders()), key=lambda entry: entry.used)


def chosen(entries: Sequence[Entry], keys: Sequence[str], older_than: float | None) -> list[Entry]:
    """Those with the keys ("all": every one), or not used for so many days.  ValueError for a key that none has."""
    for key in keys:
        if key != "all" and key not in {entry.key for entry in entries}:
            raise ValueError(f"--clear: there is no {key!r} in {folder()}; want all, or a key that `sae-fast cache` lists")
    before = None if older_than is None else datetime.now() - timedelta(days=older_than)
    return [
        entry
        for entry in entries
        if (entry.key in keys or "all" in keys or not keys) and (before is None or entry.used < before)
    ]


def _folders() -> Iterator[Path]:
    for path in folder().iterdir():
        if path.is_dir() and not _held(path):
            yield path


def _held(path: Path) -> bool:
    """True while a harvest is at work in this room."""
    with files.lock(path) as ours:
        return ours is False


def _entry(path: Path) -> Entry:
    inside = [file.stat() for file in path.rglob("*") if file.is_file()]
    return Entry(path, sum(512 * s.st_blocks for s in inside), _what(path), datetime.fromtimestamp(path.stat().st_mtime))


def _what(path: Path) -> str:
    if path.name.startswith("."):
        return "left by a killed harvest"
    try:
        info = files.read_json(path / "store.json")
        if info.get("version") != VERSION:
            return f"of {info['model']}, by another version: no longer used"
        text = Path(info["text"]["from"]).name or f"{info['text']['characters']:,} characters"
        return f"{info['hook_name']} of {info['model']} on {text}, contexts of {info['context_length']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"
