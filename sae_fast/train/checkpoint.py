"""Save and load: safetensors and one JSON, never half-written.

The JSON is the manifest: it names the tensor files that belong to it.  New tensor files are written first, under fresh
names; renaming the new manifest over the old one is the moment at which the checkpoint changes; the old files go last.
A kill at any point leaves a checkpoint that reads.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_fast import nn

FORMAT, VERSION, MANIFEST = "sae_fast", 1, "config.json"
GROUPS = ("weights", "optimizer")
CLASSES = {cls.__name__: cls for cls in (nn.GatedSAE, nn.ReluSAE, nn.JumpReluSAE, nn.TopKSAE, nn.BatchTopKSAE)}


def save(sae: nn.SparseAutoencoder, path: str | os.PathLike) -> None:
    """Writes ``sae`` into the folder ``path`` (made if missing), replacing what a former save left there."""
    if type(sae).__name__ not in CLASSES:
        raise ValueError(f"sae: got {type(sae).__name__}, want one of {sorted(CLASSES)}")
    write(path, {"sae": describe(sae)}, {"weights": sae.state_dict()})


def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> nn.SparseAutoencoder:
    """The SAE that :func:`save` or ``Trainer.save`` wrote into the folder ``path``.

    ``FileNotFoundError`` when there is no checkpoint; ``ValueError`` that names the file, key or tensor when it is not
    one of ours, is truncated, or lacks something.
    """
    manifest, tensors = read(path, ("weights",))
    return rebuild(manifest, tensors["weights"]).to(device)


def describe(sae: nn.SparseAutoencoder) -> dict[str, Any]:
    dtype = str(sae.W_enc.dtype).removeprefix("torch.")
    about = {"class": type(sae).__name__, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": dtype}
    return about | {"options": sae.options(), "metadata": sae.metadata}


def rebuild(manifest: dict[str, Any], weights: dict[str, Tensor]) -> nn.SparseAutoencoder:
    name, d_in, d_sae, dtype_name = (
        entry(manifest, kind, "sae", key) for key, kind in (("class", str), ("d_in", int), ("d_sae", int), ("dtype", str))
    )
    if name not in CLASSES:
        raise ValueError(f"{MANIFEST}: sae.class: got {name!r}, want one of {sorted(CLASSES)}")
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{MANIFEST}: sae.dtype: got {dtype_name!r}, want a dtype of torch")
    options, metadata = (
        entry(manifest, dict, "sae", key) if key in manifest["sae"] else {} for key in ("options", "metadata")
    )
    try:
        sae = CLASSES[name](d_in, d_sae, dtype=dtype, seed=0, **options)
    except TypeError as error:
        raise ValueError(f"{MANIFEST}: sae.options: got {sorted(options)}: {error}") from error
    sae.metadata = metadata
    for name, parameter in sae.state_dict().items():
        if name not in weights:
            raise ValueError(f"weights: tensor {name!r} is missing")
        if weights[name].shape != parameter.shape or weights[name].dtype != parameter.dtype:
            raise ValueError(
                f"weights: {name}: got {weights[name].dtype} {tuple(weights[name].shape)}, "
                f"want {parameter.dtype} {tuple(parameter.shape)}"
            )
    if extra := set(weights) - set(sae.state_dict()):
        raise ValueError(f"weights: unknown tensors {sorted(extra)}")
    sae.load_state_dict(weights)
    return sae


def write(path: str | os.PathLike, manifest: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Writes each named group of tensors and then the manifest."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    files = {group: f"{group}-{token}.safetensors" for group in tensors}
    manifest = {"format": FORMAT, "version": VERSION, "files": files, **manifest}
    temporary = folder / f"{MANIFEST}.{token}.tmp"
    try:
        for group, contents in tensors.items():
            save_file({k: t.detach().cpu().contiguous().clone() for k, t in contents.items()}, folder / files[group])
            sync(folder / files[group])
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        sync(temporary)
        os.replace(temporary, folder / MANIFEST)
    except BaseException:
        current = folder / MANIFEST
        if not (current.is_file() and token.encode() in current.read_bytes()):  # else the new checkpoint is in place
            for leftover in [temporary, *(folder / name for name in files.values())]:
                leftover.unlink(missing_ok=True)
        raise
    sync(folder)
    for group in GROUPS:
        for old in folder.glob(f"{group}-*.safetensors"):
            if old.name not in files.values():
                old.unlink(missing_ok=True)
    for stale in folder.glob(f"{MANIFEST}.*.tmp"):  # of a save that was killed
        stale.unlink(missing_ok=True)


def read(path: str | os.PathLike, groups: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The manifest and the named groups of tensors."""
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"path: {folder} holds no {MANIFEST}; want a folder that save() wrote")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{folder / MANIFEST}: not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: got no format {FORMAT!r}; this is not a checkpoint of this package")
    if manifest.get("version") != VERSION:
        raise ValueError(f"{folder / MANIFEST}: version: got {manifest.get('version')!r}, want {VERSION}")
    tensors = {}
    for group in groups:
        if group not in entry(manifest, dict, "files"):
            raise ValueError(f"{folder / MANIFEST}: files: no {group!r}; it was saved without (save with Trainer.save?)")
        file = folder / entry(manifest, str, "files", group)
        try:
            # Copies: load_file maps the file, and what is loaded must outlive it.
            tensors[group] = {name: t.clone() for name, t in load_file(file).items()}
        except FileNotFoundError as error:
            raise ValueError(f"{file}: missing, though {MANIFEST} names it") from error
        except SafetensorError as error:
            raise ValueError(f"{file}: truncated or damaged: {error}") from error
    return manifest, tensors


def entry(manifest: dict[str, Any], kind: type, *keys: str) -> Any:
    """The value at these nested keys of a manifest, or ``ValueError`` that names them."""
    return key(manifest, MANIFEST, kind, *keys)


def key(config: Mapping[str, Any], file: str | os.PathLike, kind: type | tuple[type, ...], *path: str) -> Any:
    """The value at these nested keys of what a JSON file holds, or ``ValueError`` that names file and keys."""
    value: Any = config
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{file}: {'.'.join(path)}: got {value!r}, want {' or '.join(k.__name__ for k in kinds)}")
    return value


def write_whole(path: Path, text: str) -> None:
    """Writes a file of text beside its place, then renames it: what was there stays until the new one is whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """To the disk: a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
