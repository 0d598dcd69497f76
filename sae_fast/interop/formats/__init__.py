"""The formats, one file each: how an SAE is found, read and written."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from sae_fast.interop.formats import dictionary_learning, foreign, native, saebench, saelens, sparsify
from sae_fast.interop.formats._common import Format, Loaded, config_of

_MODULES = (dictionary_learning, saelens, sparsify, native, saebench)  # in the order in which they are looked for
FORMATS: dict[str, Format] = {module.NAME: cast(Format, module) for module in _MODULES}


def find(path: Path) -> Format:
    """The format of a folder or file, or ``FileNotFoundError`` that says what is there instead."""
    found = [f for f in FORMATS.values() if f.finds(path)]
    if len(found) > 1:
        raise ValueError(f"path: {path} holds SAEs of {' and '.join(f.NAME for f in found)}; want a folder of one")
    if found:
        return found[0]
    if path.is_dir() and (format := foreign.of_files(foreign.below(path))):
        raise ValueError(f"path: {path}: {foreign.said(format)}")
    if (path / "config.json").is_file():
        return FORMATS["sae_fast"]  # which says what is wrong with it
    if path.is_file() and (format := foreign.of_files([path.name])):
        raise ValueError(f"path: {path}: {foreign.said(format)}")
    if path.is_file():
        raise ValueError(f"path: got the file {path}, want a folder, or a .pt file of dictionary_learning")
    if files := sorted(p.name for p in path.glob("*.pt")):
        raise FileNotFoundError(f"path: {path} holds {', '.join(files[:5])}: name one of these files")
    inside = sorted(
        {p.parent.relative_to(path) for n in ("*.pt", "*.safetensors") for p in path.glob(f"**/{n}")} - {Path(".")}
    )
    if inside:
        some = ", ".join(str(p) for p in inside[:5]) + (" …" if len(inside) > 5 else "")
        raise FileNotFoundError(f"path: {path} holds no SAE itself; there are weights in {some}: name one of them")
    there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"path: {path} holds no config.json or other sign of an SAE, but {there}; want {_WANTED}")


_WANTED = (
    "config.json of sae_fast, ae.pt (dictionary_learning), sae_weights.safetensors (SAELens) or sae.safetensors (sparsify)"
)
__all__ = ["FORMATS", "Format", "Loaded", "config_of", "find"]
