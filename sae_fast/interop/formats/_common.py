"""The formats' common parts: what reading gives, what travels along, the layers' parameters filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_fast.interop._norms import Unfold
from sae_fast.nn import SparseAutoencoder
from sae_fast.ops import PRECISIONS

KEY = "sae_fast"  # in another package's config: what we keep there


@dataclass
class Loaded:
    """An SAE as it was read.  ``unfold``: how to get back to the decoder norms that a conversion folded; ``unscaled``: the
    config's words for a scale of the activations that has yet to be taken in, which is ``scale`` where the files say it;
    ``notes``: what a user should be warned of."""

    sae: SparseAutoencoder
    unfold: Unfold | None = None
    unscaled: str | None = None
    scale: float | None = None
    notes: list[str] = field(default_factory=list)


class Format(Protocol):
    """A module of this package: one format."""

    NAME: str
    ORDER: int  # where it stands in a list of all
    UNIT_ROWS: bool  # its own SAEs have unit decoder rows
    FILES_OF: str  # the format whose files it writes: its own name, or another's
    SIGN: str  # the file by which a folder is found, as an error lists it; "" where it is FILES_OF's
    WEIGHTS: str  # a pattern of the file of its weights
    CONFIG: str  # the file that says what the others are

    def finds(self, path: Path) -> bool:
        """True for a folder or file of this format, by its files' names."""

    def read(self, path: Path) -> Loaded: ...

    def write(self, sae: SparseAutoencoder, folder: Path, overwrite: bool, unfold: Unfold | None) -> None:
        """``ValueError`` names what the format cannot hold.  ``unfold`` goes along where the format has room for it."""


def build(cls: type[SparseAutoencoder], file: Path, values: Mapping[str, Tensor], **options: Any) -> SparseAutoencoder:
    """A layer of these tensors, or ``ValueError`` that names the file that they, or its options, are from."""
    F, d = values["W_enc"].shape
    free = {*cls.any_dtype, *(name for name, t in values.items() if t.dim() == 0)}  # a scalar has the layer's own dtype
    dtype = dtype_of(file, free, values)
    try:
        return cls.of_state(str(file), d, F, dtype, values, **options)
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error


def dtype_of(file: Path, free: set[str], values: Mapping[str, Tensor]) -> torch.dtype:
    """The one dtype of these tensors, but for those ``free`` to have another, or ``ValueError`` that names them."""
    dtypes = {t.dtype for name, t in values.items() if name not in free}
    if len(dtypes) != 1 or not all(t.is_floating_point() for t in values.values()):
        said = ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in values.items())
        raise ValueError(f"{file}: got {said}, want one floating-point dtype")
    return next(iter(dtypes))


def own(config: dict[str, Any]) -> dict[str, Any]:
    """Our own part of another package's config, which anyone may have changed: of its entries those that are objects, and
    plain values."""
    return mapping(config.get(KEY))


def mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def remember(sae: SparseAutoencoder, config: dict[str, Any], name: str) -> None:
    """Gives an SAE read from this config what we kept in it, and the config itself, in its metadata."""
    said = own(config)
    metadata = mapping(said.get("metadata"))
    configs = mapping(metadata.get("configs")) | {name: {k: v for k, v in config.items() if k != KEY}}
    sae.metadata = {**metadata, "configs": configs, **sae.metadata}
    if said.get("precision") in PRECISIONS:
        sae.precision = said["precision"]


def config_of(sae: SparseAutoencoder, name: str) -> dict[str, Any]:
    """The config with which the SAE was read from a format, as far as it was."""
    return mapping(mapping(sae.metadata.get("configs")).get(name))


def to_keep(sae: SparseAutoencoder, name: str, **more: Any) -> dict[str, Any]:
    """The value to write under KEY in the config of the format ``name``."""
    configs = {k: v for k, v in mapping(sae.metadata.get("configs")).items() if k != name}
    precision = {} if sae.precision == "exact" else {"precision": sae.precision}
    return {"metadata": {**sae.metadata, "configs": configs}, "class": type(sae).__name__, **precision, **more}


def layer_of(hook_name: str | None) -> int | None:
    """3 of "blocks.3.hook_resid_post" or "layers.3"."""
    found = re.search(r"\.(\d+)(?:\.|$)", hook_name or "")
    return int(found.group(1)) if found else None


def refuse(format_name: str, sae: SparseAutoencoder, reason: str) -> ValueError:
    return ValueError(f"sae: {format_name} cannot hold this {type(sae).__name__}: {reason}")
