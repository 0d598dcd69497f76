"""Saves that stop at any of their moments."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from sae_fast import files


@contextmanager
def interrupted(at: int, act: Callable[[], object]):
    """Calls ``act`` at the ``at``-th moment of a save: before, halfway through or after each thing that it does to the
    disk.  Yields the names of the moments as they pass."""
    moments: list[str] = []

    def moment(name: str) -> None:
        moments.append(name)
        if len(moments) == at + 1:
            act()

    def watch(owner, name: str):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            moment(f"before {name}")
            result = original(*args, **kwargs)
            if name in ("save_file", "write_text"):
                file = Path(args[name == "save_file"])
                content = file.read_bytes()
                file.write_bytes(content[: len(content) // 2])
                moment(f"halfway through {name}")
                file.write_bytes(content)
            moment(f"after {name}")
            return result

        setattr(owner, name, call)
        return owner, name, original

    points = [(files, "save_file"), (os, "fsync"), (Path, "write_text"), (os, "replace"), (Path, "unlink")]
    originals = [watch(*point) for point in points]
    try:
        yield moments
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
