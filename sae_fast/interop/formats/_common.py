"""The formats' common parts: what reading gives, what travels along, the layers' parameters filled in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_fast.interop._files import Tensors
from sae_fast.interop._norms import Unfold
from sae_fast.nn import SparseAutoencoder
from sae_fast.ops import PRECISIONS

HEADS = "hook_z: this SAE takes the heads' activations side by side, [..., heads · d_head]"
KEY = "sae_fast"  # in another package's config: what we keep there


@dataclass
class Loaded:
    """An SAE as it was read.  ``unfold``: how to get back to the decoder norms that a conversion folded; ``unscaled``: the
    config's words for a scale of the activations that has yet to be taken in, which is ``scale`` where the files say it,
    and ``scale_out`` for what it gives where that is of another place; ``free_scale``: another may be asked for;
    ``notes``: what a user should be warned of."""

    sae: SparseAutoencoder
    unfold: Unfold | None = None
    unscaled: str | None = None
    scale: float | None = None
    scale_out: float | None = None
    free_scale: bool = False
    notes: list[str] = field(default_factory=list)


class Format(Protocol):
    """A module of this package: one format that is read."""

    NAME: str
    ORDER: int  # where it stands in a list of all
    SIGN: str  # the file by which a folder is found, as an error lists it; "" where it is another format's
    FILES: tuple[str, ...]  # patterns of the weights' path below a folder, the first there is counts; no * crosses a /
    BESIDE: tuple[str, ...]  # patterns of what else it reads, from the weights' folder on; {stem} is the weights' name
    OPTIONS: tuple[str, ...]  # the arguments of its own that ``read`` takes: of :func:`sae_fast.load`

    def finds(self, path: Path) -> bool:
        """True for a folder or file of this format, by its files' names."""

    def holds(self, shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
        """True for a file of weights of this format, by the names in it, and where these are others' too, by shapes."""

    def read(self, path: Path, **options: Any) -> Loaded: ...


class Written(Format, Protocol):
    """A format that is written, too."""

    UNIT_ROWS: bool  # its own SAEs have unit decoder rows
    FILES_OF: str  # the format whose files it writes: its own name, or another's
    CONFIG: str  # the file that says what the others are

    def write(self, sae: SparseAutoencoder, folder: Path, overwrite: bool, unfold: Unfold | None) -> None:
        """``ValueError`` names what the format cannot hold.  ``unfold`` goes along where the format has room for it."""


def weights_in(path: Path, patterns: Iterable[str]) -> list[Path]:
    """The files below a folder of the first of these patterns that any has; a file itself, if it is named so."""
    if path.is_file():
        return [path] * any(fnmatchcase(path.name, PurePath(pattern).name) for pattern in patterns)
    return next((found for pattern in patterns if (found := sorted(filter(Path.is_file, path.glob(pattern))))), [])


def the_weights(path: Path, patterns: Iterable[str]) -> Path:
    """The one file of weights in a folder, a file itself, or ``ValueError`` where there are several."""
    if path.is_file():
        return path
    found = weights_in(path, patterns)
    if len(found) != 1:
        some = ", ".join(str(file.relative_to(path)) for file in found[:5]) + (" …" if len(found) > 5 else "")
        raise ValueError(f"path: {path} holds {some or 'no weights'}: name one of these files")
    return found[0]


def place_of(path: Path) -> str:
    """The place that a file or folder is from: "user/repo/folder/file" in a cache of the Hub, elsewhere its
    path.  Some formats keep in these names what others keep in a config."""
    parts = path.absolute().parts
    for i, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[i + 1] == "snapshots":
            return "/".join([*part.split("--")[1:], *parts[i + 3 :]])
    return path.absolute().as_posix()


def biases(tensors: Tensors, b_enc: str, b_dec: str) -> tuple[Tensor, Tensor]:
    """b_enc [F] and b_dec [d], whose lengths say what the shapes of all others have to be."""
    return tensors.take(b_enc, None), tensors.take(b_dec, None)


def not_negative(tensors: Tensors, name: str, threshold: Tensor) -> Tensor:
    """A threshold, or ``ValueError`` where the format has none below 0."""
    if n := int((threshold < 0).sum()):
        raise ValueError(f"{tensors.file}: {name}: {n} of its numbers are negative, want thresholds of at least 0")
    return threshold


def refuse_scaling_factor(tensors: Tensors) -> None:
    """``ValueError`` for a factor of each feature's activation that is not 1; ones were written for a while, and mean
    nothing."""
    if "scaling_factor" in tensors and not bool((tensors.take("scaling_factor", None) == 1).all()):
        raise ValueError(f"{tensors.file}: scaling_factor: got values other than 1, which no layer here multiplies by")


def build(cls: type[SparseAutoencoder], file: Path, values: Mapping[str, Tensor], **options: Any) -> SparseAutoencoder:
    """A layer of these tensors, of which b_dec's length is d_out and W_skip may be one, or ``ValueError`` that names the
    file that they, or its options, are from."""
    F, d = values["W_enc"].shape
    if len(values["b_dec"]) != d:
        options["d_out"] = len(values["b_dec"])
    if "W_skip" in values:
        options["skip"] = True
    free = {*cls.any_dtype, *(name for name, t in values.items() if t.dim() == 0)}  # a scalar has the layer's own dtype
    dtype = dtype_of(file, free, values)
    try:
        return cls.of_state(str(file), d, F, dtype, values, copy=False, **options)
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


def transcoder(sae: SparseAutoencoder, hook_name_out: str | None) -> str:
    """A note on a transcoder, whose metadata gets the place of what it gives."""
    if hook_name_out:
        sae.metadata["hook_name_out"] = hook_name_out
    return f"this is a transcoder: what it gives is {hook_name_out or 'another place'}'s activation"


def config_of(sae: SparseAutoencoder, name: str) -> dict[str, Any]:
    """The config with which the SAE was read from a format, as far as it was."""
    return mapping(mapping(sae.metadata.get("configs")).get(name))


def to_keep(sae: SparseAutoencoder, name: str, **more: Any) -> dict[str, Any]:
    """The value to write under KEY in the config of the format ``name``."""
    configs = {k: v for k, v in mapping(sae.metadata.get("configs")).items() if k != name}
    precision = {} if sae.precision == "exact" else {"precision": sae.precision}
    return {"metadata": {**sae.metadata, "configs": configs}, "class": type(sae).__name__, **precision, **more}


def named_after_model(sae: SparseAutoencoder, file: Path, owner: str) -> None:
    """Puts into the metadata what a file's name says, as Llama-3.1-8B-Instruct-SAE-l19.pth does."""
    if found := re.fullmatch(r"(.+)-SAE-l(\d+)\.pth?", file.name):
        layer = int(found.group(2))
        about = {"model_name": f"{owner}/{found.group(1)}", "layer": layer, "hook_name": f"blocks.{layer}.hook_resid_post"}
        sae.metadata |= {name: value for name, value in about.items() if name not in sae.metadata}


def layer_of(hook_name: str | None) -> int | None:
    """3 of "blocks.3.hook_resid_post" or "layers.3"."""
    found = re.search(r"\.(\d+)(?:\.|$)", hook_name or "")
    return int(found.group(1)) if found else None


def refuse(format_name: str, sae: SparseAutoencoder, reason: str) -> ValueError:
    return ValueError(f"sae: {format_name} cannot hold this {type(sae).__name__}: {reason}")
