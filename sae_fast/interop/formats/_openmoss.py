"""OpenMOSS' two formats' common parts: the scale of activations, and gates that count the decoder's norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.files import key
from sae_fast.interop._files import Tensors
from sae_fast.interop.formats._common import mapping

NORM = "dataset_average_activation_norm"


def take_norms(tensors: Tensors) -> dict[str, float]:
    """The average norms of activations by place that stand among the tensors as scalars."""
    names = [name for name in tensors.names() if name.startswith(f"{NORM}.")]
    return {name.removeprefix(f"{NORM}."): float(tensors.take(name)) for name in sorted(names)}


def scales(
    config: Mapping[str, Any], file: Path, d: int, norms: Mapping[str, Any], places: tuple[str, str]
) -> tuple[str | None, float | None, float | None]:
    """The config's words for a scale that has to be taken in, and √d / average norm of the two ``places``, x's and x̂'s, as
    far as the files hold norms: what no training set is a number of other memory's, and taken for none."""
    said = config.get("norm_activation", "dataset-wise")
    if said == "inference":  # it is in the weights already
        return None, None, None
    if said != "dataset-wise":
        raise ValueError(f"{file}: norm_activation: got {said!r}, want 'dataset-wise' or 'inference'")

    def scale(place: str) -> float | None:
        norm = norms.get(place, norms.get("in" if place == places[0] else "out"))
        number = isinstance(norm, (int, float)) and not isinstance(norm, bool)
        return math.sqrt(d) / norm if number and 0 < norm < math.inf else None

    into, out = (scale(place) for place in places)
    if out is None and into is not None and places[0] != places[1]:
        raise ValueError(f"{file}: {NORM}: there is one of {places[0]}, but none of {places[1]}, which this gives")
    return f"{file}: norm_activation: {said!r}", into, out


def of_log(tensors: Tensors, name: str, F: int) -> Tensor:
    """The thresholds [F], in float32, whose logarithms a file has."""
    logarithm = tensors.take(name, F)
    if not logarithm.is_floating_point():
        raise ValueError(f"{tensors.file}: {name}: got {logarithm.dtype}, want a floating-point dtype")
    return logarithm.float().exp()


def gates(threshold: Tensor, W_dec: Tensor, with_norms: bool) -> Tensor:
    """θ_i / ‖d_i‖, for gates that compare π_i ‖d_i‖ with θ_i; θ_i itself without ``with_norms``.  A row of norm 0 never
    passes a threshold of at least 0, nor then the largest of all numbers."""
    threshold = threshold.to(torch.promote_types(torch.float32, threshold.dtype))
    if not with_norms:
        return threshold
    largest = torch.finfo(threshold.dtype).max
    return (threshold.double() / W_dec.double().norm(dim=1)).nan_to_num(largest).clamp(max=largest).to(threshold.dtype)


def whole_features(config: Mapping[str, Any], file: Path, F: int, d: int) -> None:
    """``ValueError`` unless the sizes in the config are those of the tensors."""
    factor = config.get("expansion_factor")
    said: dict[str, tuple[Any, float]] = {"d_model": (config.get("d_model"), d)}
    if "d_sae" in config:
        said["d_sae"] = (config["d_sae"], F)
    elif isinstance(factor, (int, float)):
        said["expansion_factor"] = (factor, F / d)
    for name, (got, held) in said.items():
        if got != held:
            raise ValueError(f"{file}: {name}: got {got!r}, but the weights have {held}")


def counts_norms(config: Mapping[str, Any], file: Path, default: bool) -> bool:
    """True where a config asks for gates that count the decoder's norms."""
    name = "sparsity_include_decoder_norm"
    return key(config, file, bool, name) if name in config else default


def norm_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The average norms that a config holds."""
    return mapping(config.get(NORM))
