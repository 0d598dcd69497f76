"""The folder of a run of `sae-fast demo` or `train`: what is in it, whose it is, one writer at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sae_fast import files
from sae_fast.analysis.page import check_replaceable
from sae_fast.analysis.store import check_free
from sae_fast.interop.formats import native

CHECKPOINT, METRICS, PLOT, FEATURES, STORE, PAGE = (
    "checkpoint", "metrics.json", "training.png", "features.md", "store", "report.html"
)  # fmt: skip


def run_of(source: str | Path) -> Path | None:
    """The folder of the run that a path names, by itself or by its checkpoint; None for anything else."""
    path = Path(source)
    if native.finds(path / CHECKPOINT):
        return path
    return path.parent if path.name == CHECKPOINT and native.finds(path) else None


@contextmanager
def claimed(out: Path, overwrite: bool = False) -> Iterator[Callable[[], None]]:
    """Holds the folder of a run to be made, which is made if missing; gives what takes a former run's files away.

    ``NotADirectoryError`` for a file; ``FileExistsError`` while another process holds the folder, for a run in it
    without ``overwrite``, and for files of the same names that are not a run's.  What the block leaves empty goes.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: {out} is a file, want a folder")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with files.lock(out) as ours:
            if ours is False:
                raise FileExistsError(f"out: another process is writing a run into {out}; want a folder of its own")
            _sweep(out / CHECKPOINT)
            _check(out, overwrite)
            yield lambda: _clear(out)
    finally:
        if made:
            with suppress(OSError):  # it is not empty
                out.rmdir()


def _sweep(folder: Path) -> None:
    """Takes away what is left where a first save was killed: an empty folder."""
    files.sweep(folder)
    with suppress(OSError):  # there is none, or something in it
        folder.rmdir()


def _check(out: Path, overwrite: bool) -> None:
    there = [name for name in (CHECKPOINT, METRICS, PLOT, FEATURES, STORE, PAGE) if os.path.lexists(out / name)]
    if not there:
        return
    if not overwrite:
        held = ", ".join(there)
        raise FileExistsError(f"out: {out} holds {held} already; want another folder, or overwrite=True (--overwrite)")
    if (out / CHECKPOINT).exists() and not native.finds(out / CHECKPOINT):
        raise FileExistsError(f"out: {out / CHECKPOINT} is no checkpoint of sae_fast; move it, or write elsewhere")
    if (out / METRICS).exists():
        with suppress(ValueError):
            if "held_out" in files.read_json(out / METRICS):
                there.append("a run's metrics")
    for name in (METRICS, PLOT, FEATURES):
        if name in there and CHECKPOINT not in there and "a run's metrics" not in there:
            raise FileExistsError(f"out: {out / name} is there without a run; move it, or write elsewhere")
    check_free(out / STORE, overwrite=True)
    check_replaceable(out / PAGE)


def _clear(out: Path) -> None:
    for name in (METRICS, PLOT, FEATURES, PAGE):
        (out / name).unlink(missing_ok=True)
    if (out / STORE).exists():
        check_free(out / STORE, overwrite=True)
        shutil.rmtree(out / STORE)
