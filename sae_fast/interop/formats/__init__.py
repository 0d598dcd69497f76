"""The formats: every module of this folder without an underscore is one (see :class:`Format`)."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import cast

from sae_fast.interop import _foreign
from sae_fast.interop.formats._common import Format, Loaded, config_of
from sae_fast.train import checkpoint

_FOUND = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__) if found.name[0] != "_"]
_ORDERED = sorted((cast(Format, module) for module in _FOUND), key=lambda format: format.ORDER)
FORMATS: dict[str, Format] = {format.NAME: format for format in _ORDERED}
WEIGHTS = tuple(sorted({Path(format.WEIGHTS).suffix for format in FORMATS.values()}))  # the suffixes of their weights
# Whose folders no checkpoint is written into: training, a floor below, cannot ask.
checkpoint.OTHERS.update((name, format.finds) for name, format in FORMATS.items() if name != checkpoint.FORMAT)


def listed(names: Sequence[str]) -> str:
    """``a, b or c``."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


def format_of(path: Path) -> Format:
    """The format of a folder or file, or ``FileNotFoundError`` that says what is there instead."""
    found = [f for f in FORMATS.values() if f.finds(path)]
    if len(found) > 1:
        raise ValueError(f"path: {path} holds SAEs of {' and '.join(sorted(f.NAME for f in found))}; want a folder of one")
    if found:
        return found[0]
    if path.is_dir() and (format := _foreign.of_files(_foreign.below(path))):
        raise ValueError(f"path: {path}: {_foreign.said(format)}")
    if (path / "config.json").is_file():
        return FORMATS["sae_fast"]  # which says what is wrong with it
    if path.is_file() and (format := _foreign.of_files([path.name])):
        raise ValueError(f"path: {path}: {_foreign.said(format)}")
    if path.is_file():
        raise ValueError(f"path: got the file {path}, want a folder, or a .pt file of dictionary_learning")
    if files := sorted(p.name for p in path.glob("*.pt")):
        raise FileNotFoundError(f"path: {path} holds {', '.join(files[:5])}: name one of these files")
    inside = sorted({p.parent.relative_to(path) for suffix in WEIGHTS for p in path.glob(f"**/*{suffix}")} - {Path(".")})
    if inside:
        some = ", ".join(str(p) for p in inside[:5]) + (" …" if len(inside) > 5 else "")
        raise FileNotFoundError(f"path: {path} holds no SAE itself; there are weights in {some}: name one of them")
    wanted = listed([format.SIGN for format in FORMATS.values() if format.SIGN])
    there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"path: {path} holds no config.json or other sign of an SAE, but {there}; want {wanted}")


__all__ = ["FORMATS", "WEIGHTS", "Format", "Loaded", "config_of", "format_of", "listed"]
