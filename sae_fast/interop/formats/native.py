"""sae_fast's own folder: what :func:`sae_fast.save` and ``Trainer.save`` write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sae_fast.interop._norms import Unfold
from sae_fast.interop.formats._common import Loaded
from sae_fast.nn import SparseAutoencoder
from sae_fast.train import checkpoint

NAME, ORDER, UNIT_ROWS = "sae_fast", 0, False
FILES_OF, CONFIG, SIGN = NAME, checkpoint.MANIFEST, "config.json of sae_fast"
FILES, BESIDE, OPTIONS = ("weights-*.safetensors",), (CONFIG,), ()


def finds(path: Path) -> bool:
    try:
        return json.loads((path / checkpoint.MANIFEST).read_bytes())["format"] == checkpoint.FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return False  # the manifest says so, or nothing


def read(path: Path) -> Loaded:
    return Loaded(checkpoint.load(path))


def write(sae: SparseAutoencoder, folder: Path, overwrite: bool, unfold: Unfold | None) -> None:
    if (folder / checkpoint.MANIFEST).exists() and not overwrite:
        raise FileExistsError(f"{folder}: holds {checkpoint.MANIFEST} already; overwrite=True (--overwrite) replaces it")
    checkpoint.save(sae, folder, overwrite=overwrite)
