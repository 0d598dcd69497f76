"""What every format shares: what reading gives, what travels along, the layers' parameters filled in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_fast.interop._norms import Unfold
from sae_fast.nn import SparseAutoencoder

KEY = "sae_fast"  # in another package's config: what we keep there


@dataclass
class Loaded:
    """An SAE as it was read.  ``unfold``: how to get back to the decoder norms that a conversion folded; ``unscaled``: the
    config's words for a scale of the activations that has yet to be given; ``notes``: what a user should be warned of."""

    sae: SparseAutoencoder
    unfold: Unfold | None = None
    unscaled: str | None = None
    notes: list[str] = field(default_factory=list)


class Format(Protocol):
    """A module of this package: one format."""

    NAME: str

    def finds(self, path: Path) -> bool:
        """Whether a folder or file is of this format, by its files' names."""

    def read(self, path: Path) -> Loaded: ...

    def write(self, sae: SparseAutoencoder, folder: Path, overwrite: bool, unfold: Unfold | None) -> None:
        """``ValueError`` names what the format cannot hold.  ``unfold`` goes along where the format has room for it."""


def fill(sae: SparseAutoencoder, **values: Tensor) -> None:
    """Sets parameters and buffers.  They come in one dtype, that of the module."""
    state = sae.state_dict()
    if set(values) != set(state):
        raise AssertionError(f"got {sorted(values)}, want {sorted(state)}")
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)


def dtype_of(file: Path, **tensors: Tensor) -> torch.dtype:
    """The one dtype of these tensors, or ``ValueError`` that names them."""
    dtypes = {name: t.dtype for name, t in tensors.items()}
    if len(set(dtypes.values())) != 1 or not next(iter(tensors.values())).is_floating_point():
        said = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
        raise ValueError(f"{file}: got {said}, want one floating-point dtype")
    return next(iter(dtypes.values()))


def kept(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The metadata of an SAE read from this config: what we kept in it, and the config itself."""
    own = config.get(KEY)
    metadata = dict(own.get("metadata", {})) if isinstance(own, dict) else {}
    configs = dict(metadata.get("configs", {}))
    configs[name] = {k: v for k, v in config.items() if k != KEY}
    return {**metadata, "configs": configs}


def config_of(sae: SparseAutoencoder, name: str) -> dict[str, Any]:
    """The config with which the SAE was read from a format, as far as it was."""
    return dict(sae.metadata.get("configs", {}).get(name, {}))


def to_keep(sae: SparseAutoencoder, name: str, **more: Any) -> dict[str, Any]:
    """What to write under KEY in the config of the format ``name``."""
    configs = {k: v for k, v in sae.metadata.get("configs", {}).items() if k != name}
    return {"metadata": {**sae.metadata, "configs": configs}, "class": type(sae).__name__, **more}


def layer_of(hook_name: str | None) -> int | None:
    """3 of "blocks.3.hook_resid_post" or "layers.3"."""
    found = re.search(r"\.(\d+)(?:\.|$)", hook_name or "")
    return int(found.group(1)) if found else None


def refuse(format_name: str, sae: SparseAutoencoder, reason: str) -> ValueError:
    return ValueError(f"sae: {format_name} cannot hold this {type(sae).__name__}: {reason}")
