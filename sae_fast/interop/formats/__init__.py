"""The formats: every module of this folder without an underscore is one (see :class:`Format`), and those that write are
:class:`Written`."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import cast

from sae_fast.interop import _files, _refused
from sae_fast.interop.formats._common import Format, Loaded, Written, config_of, weights_in
from sae_fast.train import checkpoint

_FOUND = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__) if found.name[0] != "_"]
_ORDERED = sorted((cast(Format, module) for module in _FOUND), key=lambda format: format.ORDER)
READERS: dict[str, Format] = {format.NAME: format for format in _ORDERED}
FORMATS: dict[str, Written] = {name: cast(Written, format) for name, format in READERS.items() if hasattr(format, "write")}
WEIGHTS = tuple(sorted({Path(pattern).suffix for format in READERS.values() for pattern in format.FILES}))  # their suffixes
# Whose folders no checkpoint is written into: training, a floor below, cannot ask.
checkpoint.OTHERS.update((name, format.finds) for name, format in READERS.items() if name != checkpoint.FORMAT)


def listed(names: Sequence[str]) -> str:
    """``a, b or c``."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


def format_of(path: Path) -> Format:
    """The format of a folder or file, or ``FileNotFoundError`` that says what is there instead.

    By the names of files; where several formats have that name, and for a file of any other name, by the names in it."""
    found = [f for f in READERS.values() if f.finds(path)]
    weights = {tuple(weights_in(path, f.FILES)) for f in found} if path.is_dir() else {(path,)}
    if len(found) > 1 and len(weights) > 1:
        raise ValueError(f"path: {path} holds SAEs of {' and '.join(sorted(f.NAME for f in found))}; want a folder of one")
    if (path.suffix in WEIGHTS and path.is_file()) or len(found) > 1:
        ((file, *_),) = weights
        shapes = _files.shapes(file)
        _refused.check(file, file.name, shapes)
        found = [f for f in (READERS.values() if path.is_file() else found) if f.holds(shapes, file)] or found[:1]
        if len(found) != 1:
            said = f"fits {' and '.join(f.NAME for f in found)}" if found else "is of no format that is known"
            raise ValueError(f"path: {file} holds {sorted(shapes)[:12]}, which {said}")
    if found:
        return found[0]
    if path.is_dir():
        for below in [str(p.relative_to(path)) for pattern in ("*", "*/*") for p in sorted(path.glob(pattern))]:
            _refused.check(path, below)
    if (path / "config.json").is_file():
        return READERS["sae_fast"]  # which says what is wrong with it
    if path.is_file():
        raise ValueError(f"path: got the file {path}, want a folder, or a file of weights: {listed(WEIGHTS)}")
    if files := sorted(p.name for p in path.iterdir() if p.is_file() and p.suffix in WEIGHTS):
        raise FileNotFoundError(f"path: {path} holds {', '.join(files[:5])}: name one of these files")
    inside = sorted({p.parent.relative_to(path) for suffix in WEIGHTS for p in path.glob(f"**/*{suffix}")} - {Path(".")})
    if inside:
        some = ", ".join(str(p) for p in inside[:5]) + (" …" if len(inside) > 5 else "")
        raise FileNotFoundError(f"path: {path} holds no SAE itself; there are weights in {some}: name one of them")
    wanted = listed([format.SIGN for format in READERS.values() if format.SIGN])
    there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"path: {path} holds no config.json or other sign of an SAE, but {there}; want {wanted}")


__all__ = ["FORMATS", "READERS", "WEIGHTS", "Format", "Loaded", "Written", "config_of", "format_of", "listed", "weights_in"]
