"""Save and load: safetensors and one JSON, never half-written.

The JSON is the manifest: it names the tensor files that belong to it.  New tensor files are written first, under fresh
names; renaming the new manifest over the old one is the moment at which the checkpoint changes; the old files go last.
A kill at any point leaves a checkpoint that reads.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast import files, nn
from sae_fast.train.scale import unscale_

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
    sae = rebuild(manifest, tensors["weights"])
    unscale_(sae)  # of a training on scaled activations
    return sae.to(device)


def describe(sae: nn.SparseAutoencoder) -> dict[str, Any]:
    sae.check_dtypes()
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
        sae = CLASSES[name].of_state("weights", d_in, d_sae, dtype, weights, **options)
    except TypeError as error:
        raise ValueError(f"{MANIFEST}: sae.options: got {sorted(options)}: {error}") from error
    sae.metadata = metadata
    return sae


def write(path: str | os.PathLike, manifest: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Writes each named group of tensors and then the manifest."""
    folder, token = Path(path), secrets.token_hex(4)
    names = {group: f"{group}-{token}.safetensors" for group in tensors}
    manifest = {"format": FORMAT, "version": VERSION, "files": names, **manifest}
    writers = {names[group]: files.safetensors_writer(contents) for group, contents in tensors.items()}
    files.write_files(folder, {**writers, MANIFEST: files.json_writer(manifest)}, overwrite=True)
    for group in GROUPS:
        for old in folder.glob(f"{group}-*.safetensors"):
            if old.name not in names.values():
                old.unlink(missing_ok=True)


def read(path: str | os.PathLike, groups: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The manifest and the named groups of tensors."""
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"path: {folder} holds no {MANIFEST}; want a folder that save() wrote")
    manifest = files.read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: got no format {FORMAT!r}; this is not a checkpoint of this package")
    if manifest.get("version") != VERSION:
        raise ValueError(f"{folder / MANIFEST}: version: got {manifest.get('version')!r}, want {VERSION}")
    tensors = {}
    for group in groups:
        if group not in entry(manifest, dict, "files"):
            raise ValueError(f"{folder / MANIFEST}: files: no {group!r}; it was saved without (save with Trainer.save?)")
        file = folder / entry(manifest, str, "files", group)
        try:
            tensors[group] = files.read_safetensors(file)
        except FileNotFoundError as error:
            raise ValueError(f"{file}: missing, though {MANIFEST} names it") from error
    return manifest, tensors


def entry(manifest: dict[str, Any], kind: type, *keys: str) -> Any:
    """The value at these nested keys of a manifest, or ``ValueError`` that names them."""
    return files.key(manifest, MANIFEST, kind, *keys)
