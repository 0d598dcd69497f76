"""Activation: what an activation is to the rest of the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Vectors = tuple[Tensor, ...]
Pulled = tuple[Tensor | None, ...]


class Activation(ABC):
    """A pointwise function of u = w·x_c and of parameters per feature; π = u + bias decides which entries there are.

    u [..., n] is of any entries; bias and vectors are [n] beside it.
    """

    name: str
    native: int  # its number in C++, CUDA and Triton, for good
    bias: str  # the name of the parameter [F] that is added to u
    parameters: tuple[str, ...] = ()  # the names of the others [F], at most two
    trained: tuple[str, ...] = ()  # of the parameters: those that have a gradient
    value_sets: int = 1  # V: magnitudes, and gates if 2
    scaled_by_norm: tuple[str, ...] = ()  # of the parameters: those that are multiplied by n where w and bias are

    def vectors(self, parameters: Mapping[str, Tensor]) -> Vectors:
        """The tensors that the kernels take for the parameters, in their order; others of the mapping are ignored."""
        return tuple(parameters[name] for name in self.parameters)

    def cut(self, vectors: Vectors) -> Tensor | None:
        """[F]: what π has to exceed; None for 0."""
        return None

    def calibrate(self, bias: Tensor, parameters: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Changes bias and parameters, in place, for features that are to fire where π exceeded 0 with this bias."""

    @abstractmethod
    def values(self, u: Tensor, pi: Tensor, vectors: Vectors) -> Tensor:
        """[V, ..., n]: the value sets, 0 where an entry does not fire."""

    @abstractmethod
    def pullback(self, u: Tensor, grads: Sequence[Tensor], indices: Tensor, vectors: Vectors) -> Pulled:
        """The gradients [n] of u, the bias and each parameter from those of the values, V of [n], which are 0 where a
        value is; None for a parameter that has none.  ``vectors`` are [F], ``indices`` [n] the entries' features."""

    @abstractmethod
    def magnitude(self, u: Tensor, bias: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        """(the magnitude of an entry that fires, its derivative with respect to u, whether its gate is open)."""

    def slope(self, u: Tensor, bias: Tensor, vectors: Vectors, open_: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(f, ∂f/∂u as autodiff sees it).  ``open_``: whether the gates are open, where that is not what u says."""
        value, slope, passes = self.magnitude(u, bias, vectors)
        fires = (passes if open_ is None else open_) & (value > 0)
        return torch.where(fires, value, 0), torch.where(fires, slope, 0)

    @abstractmethod
    def jump(self, bias: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor]:
        """(u at which a feature's gate opens, the value to which it jumps there)."""
