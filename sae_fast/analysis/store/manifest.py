"""A store's store.json: what it says of the store, and by which a folder is known for one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sae_fast.files import lfs_pointer
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.identity import fingerprint

FORMAT, VERSION, MANIFEST = "sae_fast.store", 1, "store.json"
OWN = re.compile(r"(features|tokens|activations/\d{8,})\.parquet")
KINDS: dict[str, tuple[type, ...]] = dict(
    sae=(str,), files=(dict,), context_length=(int, type(None)), d_sae=(int,), n_tokens=(int,), n_activations=(int,)
)
RESERVED = {"format", "version", "sae_class", "d_in", *KINDS}  # entries that are not for :func:`write`'s ``about``
LEAST = dict(d_sae=1, n_tokens=1, n_activations=0, context_length=1)


def write(folder: Path, sae: SparseAutoencoder, counts: dict[str, int | None], about: dict[str, Any]) -> dict[str, Any]:
    """Writes the store.json of the Parquet files in a folder; returns what it says."""
    info = {
        "format": FORMAT,
        "version": VERSION,
        "sae": fingerprint(sae),
        "sae_class": type(sae).__name__,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **counts,
        **about,
        "files": {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(folder.rglob("*.parquet"))},
    }
    (folder / MANIFEST).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return info


def read(path: Path) -> dict[str, Any]:
    """The store.json of the store in a folder: ``FileNotFoundError`` or ``ValueError`` where it is none, or damaged."""
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"path: {path} holds no feature store: there is no {MANIFEST} in it")
    try:
        info = _parsed(file)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        said = lfs_pointer(file) or f"damaged: not valid JSON: {error}; write the store again"
        raise ValueError(f"{file}: {said}") from error
    if not _ours(info):
        raise ValueError(f"{file}: got no format {FORMAT!r}: this is not a feature store")
    if info.get("version") != VERSION:
        newer = "; a newer sae_fast wrote it" if isinstance(info.get("version"), int) and info["version"] > VERSION else ""
        raise ValueError(f"{file}: version: got {info.get('version')!r}, want {VERSION}{newer}")
    for key, kind in KINDS.items():
        value = info.get(key, ...)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < LEAST[key]):
            raise ValueError(f"{file}: {key}: got {info.get(key)!r}; the file is damaged, write the store again")
    return info


def check_free(path: Path, overwrite: bool) -> None:
    """``FileExistsError`` unless the folder may be made, or replaced: a store, also a damaged one, with no other files."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        info = _parsed(path / MANIFEST)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        info = None
    except (OSError, ValueError, RecursionError):  # damaged
        info = {"format": FORMAT}
    if not _ours(info):
        raise FileExistsError(f"path: {path} is there and is not a feature store, want a folder of its own")
    if not overwrite:
        raise FileExistsError(f"path: {path} holds a feature store already; overwrite=True (--overwrite) replaces it")
    files = info.get("files")
    for name in sorted(file.relative_to(path).as_posix() for file in path.rglob("*")):
        own = name in files if isinstance(files, dict) else OWN.fullmatch(name)
        if not own and name not in (MANIFEST, "activations"):
            raise FileExistsError(f"path: {path} holds {name}, which is no file of the store; move it, or write elsewhere")


def _parsed(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _ours(info: Any) -> bool:
    return isinstance(info, dict) and info.get("format") == FORMAT
