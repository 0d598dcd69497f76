"""Normalisations: a map of each example of its own, x′ = (x − shift_b) / divisor_b, before an SAE, and back after it.

An SAE that was trained on x′ is given x.  The numbers that lead back travel on the SparseCode, as ``affine``.  Statistics
are taken in float32 at least.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sae_fast import arguments
from sae_fast.code import Affine


@dataclass(frozen=True)
class Normalize(ABC):
    """A map of examples [B, d].  ``undo=False``: what the SAE gives stays as it is, as in SAELens' transcoders."""

    undo: bool = True

    def __post_init__(self) -> None:
        arguments.flag("undo", self.undo)

    def check(self, d_in: int) -> None:  # noqa: B027
        """``ValueError`` unless it can be taken of examples of this width."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Affine | None]:
        """x [B, d] mapped, in its dtype; and the way back, None if there is none."""
        mapped, back = self.map(x.to(torch.promote_types(x.dtype, torch.float32)))
        return mapped.to(x.dtype), back if self.undo else None

    @abstractmethod
    def map(self, x: Tensor) -> tuple[Tensor, Affine]:
        """The same of an x [B, d] of float32 at least."""


@dataclass(frozen=True)
class LayerNorm(Normalize):
    """x′ = (x − μ) / (σ + eps), σ the deviation with d − 1; back σ x̂′ + μ: OpenAI's SAEs, SAELens' "layer_norm"."""

    eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.number("eps", self.eps, arguments.positive, "a positive number")

    def check(self, d_in: int) -> None:
        if d_in < 2:
            raise ValueError(f"normalize: got LayerNorm with d_in = {d_in}, want at least 2 to take a deviation of")

    def map(self, x: Tensor) -> tuple[Tensor, Affine]:
        mean = x.mean(dim=1, keepdim=True)
        centred = x - mean
        deviation = centred.std(dim=1, keepdim=True)
        return centred / (deviation + self.eps), Affine(deviation[:, 0], mean[:, 0])


@dataclass(frozen=True)
class ConstantNorm(Normalize):
    """x′ = x √d / ‖x‖, back ‖x‖ x̂′ / √d: SAELens' "constant_norm_rescale".  An x of 0 stays, and its x̂ is 0."""

    def map(self, x: Tensor) -> tuple[Tensor, Affine]:
        scale = torch.linalg.vector_norm(x, dim=1, keepdim=True) / x.shape[1] ** 0.5
        return x / torch.where(scale == 0, 1, scale), Affine(scale[:, 0], None)


@dataclass(frozen=True)
class Scale(Normalize):
    """x′ = by · x, back x̂′ / out, by default by ``by``: Llama Scope's √d over the average norm of a data set."""

    by: float = 1.0
    out: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("by", self.by), ("out", 1.0 if self.out is None else self.out)):
            arguments.average(name, value, sys.float_info.max, "a positive number")

    def map(self, x: Tensor) -> tuple[Tensor, Affine]:
        return x * self.by, Affine(x.new_full(x.shape[:1], 1 / (self.by if self.out is None else self.out)), None)


BY_NAME: dict[str, type[Normalize]] = {kind.__name__: kind for kind in (LayerNorm, ConstantNorm, Scale)}


def describe(normalize: Normalize) -> dict[str, Any]:
    """A normalisation as JSON has it."""
    return {"name": type(normalize).__name__, **asdict(normalize)}


def made(value: Any) -> Normalize | None:
    """The normalisation that ``value`` is, or that :func:`describe` described; ``ValueError`` for what is none."""
    if value is None or type(value) in BY_NAME.values():
        return value
    about = dict(value) if isinstance(value, Mapping) else {}
    kind = BY_NAME.get(str(about.pop("name", None)))
    if kind is None:
        raise ValueError(f"normalize: got {value!r}, want one of {', '.join(sorted(BY_NAME))}, or None")
    try:
        return kind(**about)
    except (TypeError, ValueError) as error:
        raise ValueError(f"normalize: {error}") from error


__all__ = ["BY_NAME", "ConstantNorm", "LayerNorm", "Normalize", "Scale", "describe", "made"]
