"""Save and load: safetensors and one JSON, never half-written.

The JSON is the manifest: it names the tensor files that belong to it.  New tensor files are written first, under fresh
names; renaming the new manifest over the old one is the moment at which the checkpoint changes; the old files go last.
A kill at any point leaves a checkpoint that reads.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_fast import files, nn
from sae_fast.nn.scale import unscale_

FORMAT, VERSION, MANIFEST = "sae_fast", 1, "config.json"
OWN_NAME = re.compile(r"(weights|optimizer)-[0-9a-f]{8}\.safetensors")
MARK = {"format": "pt", "program": FORMAT}  # in the header of each tensor file
OTHERS: dict[str, Callable[[Path], bool]] = {}  # other packages' formats, by which their folders are known: interop's


def save(sae: nn.SparseAutoencoder, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes ``sae`` into the folder ``path`` (made if missing), replacing what a former save left there.

    ``FileExistsError`` where another program's files are; and, unless ``overwrite``, where a Trainer's checkpoint is, whose
    optimizer state would be lost.
    """
    about = {"sae": describe(sae)}
    if not overwrite and "trainer" in replaceable(Path(path)):
        raise FileExistsError(
            f"path: {path} holds a Trainer's checkpoint: its optimizer state would be lost, and with it the way to resume; "
            "want another folder, Trainer.save, or overwrite=True"
        )
    write(path, about, {"weights": sae.state_dict()})


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
    """All of a layer that is not tensors; ``ValueError`` for one that :func:`rebuild` would not make again."""
    if type(sae) not in nn.KINDS.values():
        raise ValueError(f"sae: got {type(sae).__name__}, want one of {sorted(nn.KINDS)} itself")
    sae.check_dtypes()
    dtype = str(sae.W_enc.dtype).removeprefix("torch.")
    about = {"class": type(sae).__name__, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": dtype}
    return about | {"precision": sae.precision, "options": sae.options(), "metadata": sae.metadata}


def rebuild(manifest: dict[str, Any], weights: dict[str, Tensor]) -> nn.SparseAutoencoder:
    name, d_in, d_sae, dtype_name = (
        entry(manifest, kind, "sae", key) for key, kind in (("class", str), ("d_in", int), ("d_sae", int), ("dtype", str))
    )
    if name not in nn.KINDS:
        raise ValueError(f"{MANIFEST}: sae.class: got {name!r}, want one of {sorted(nn.KINDS)}")
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{MANIFEST}: sae.dtype: got {dtype_name!r}, want a dtype of torch")
    options, metadata = (
        entry(manifest, dict, "sae", key) if key in manifest["sae"] else {} for key in ("options", "metadata")
    )
    precision = entry(manifest, str, "sae", "precision") if "precision" in manifest["sae"] else "exact"
    try:
        sae = nn.KINDS[name].of_state("weights", d_in, d_sae, dtype, weights, False, **{"precision": precision, **options})
    except TypeError as error:
        raise ValueError(f"{MANIFEST}: sae.options: got {sorted(options)}: {error}") from error
    sae.metadata = metadata
    return sae


def write(path: str | os.PathLike, manifest: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Writes each named group of tensors and then the manifest, and removes what it replaces.

    ``FileExistsError``, before anything is written, where another program's files are.  Of tensor files those go that the
    old manifest names, and those of a save that was killed, which bear our mark.
    """
    old = replaceable(Path(path)).get("files")
    replaced = list(old.values()) if isinstance(old, dict) else []
    folder, token = Path(path), secrets.token_hex(4)
    names = {group: f"{group}-{token}.safetensors" for group in tensors}
    manifest = {"format": FORMAT, "version": VERSION, "files": names, **manifest}
    try:
        last = files.json_writer(manifest)
    except TypeError as error:
        raise ValueError(f"sae.metadata: {error}; want what JSON can hold") from error
    writers = {names[group]: files.safetensors_writer(contents, MARK) for group, contents in tensors.items()}
    files.write_files(folder, {**writers, MANIFEST: last}, overwrite=True)
    for file in folder.glob("*.safetensors"):
        ours = OWN_NAME.fullmatch(file.name) and file.name not in names.values()
        if ours and (file.name in replaced or _marked(file)):
            file.unlink(missing_ok=True)


def replaceable(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in a folder, {} where there is none; ``FileExistsError`` for another program's files,
    and for a damaged manifest, which may be one."""
    if others := sorted(name for name, finds in OTHERS.items() if finds(folder)):
        raise FileExistsError(f"path: {folder} holds an SAE of {', '.join(others)}; want a folder of its own")
    if not os.path.lexists(folder / MANIFEST):
        return {}
    try:
        manifest = files.read_json(folder / MANIFEST)
    except (ValueError, OSError) as error:
        raise FileExistsError(f"path: {error}; want a folder of its own, or {MANIFEST} moved away") from error
    if manifest.get("format") != FORMAT:
        raise FileExistsError(
            f"path: {folder / MANIFEST} is another program's, of no format {FORMAT!r}; want a folder of its own"
        )
    return manifest


def _marked(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.metadata() == MARK
    except (SafetensorError, OSError):
        return False


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
