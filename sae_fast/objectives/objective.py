"""Objective: what an objective is to the algebra of a step, which gradients.py has."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from math import inf
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sae_fast import arguments
from sae_fast.activations.activation import Activation, Pulled
from sae_fast.code import Layer, SparseCode
from sae_fast.objectives.auxk import AuxK
from sae_fast.objectives.prefixes import Prefixes
from sae_fast.penalty import Penalty


class Pull(NamedTuple):
    """losses [3] of a code, and what its entries' values pull on: the gradients [nnz] of u, of the bias and of each
    parameter of the activation, None for one that has none; constants [F] by parameter: gradients that are no sum over
    entries; norms [nnz], if the penalty costs norms: n / coefficient times its gradient with respect to ‖d_i‖."""

    losses: Tensor
    pulled: Pulled
    constants: Mapping[str, Tensor] = MappingProxyType({})
    norms: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The loss of a step: reconstruction, a penalty on the entries, and what else its parts say.

    ``coefficient``: the weight of the penalty, a number or 0-d, which a Trainer's schedule scales.  ``prefixes``:
    reconstruction from the first features as well (Matryoshka).  ``aux``: the aid for dead features.  ``unit_rows``:
    decoder rows are held at unit norm.
    """

    activations: ClassVar[tuple[str, ...]] = ()  # the names of those that it is for
    stops_auxiliary: ClassVar[bool] = True  # x̂_aux has no gradient for W_dec and b_dec
    projects_first: ClassVar[bool] = False  # gradients are clipped as unit rows leave them
    zeros: ClassVar[bool] = False  # entries of value 0 have a gradient
    of_largest: ClassVar[bool] = False  # it is for supports of the largest entries

    coefficient: float | Tensor = 0.0
    prefixes: Prefixes | None = field(default=None, kw_only=True)
    aux: AuxK | None = field(default=None, kw_only=True)
    unit_rows: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.coefficient, Tensor):
            coefficient = arguments.number("coefficient", self.coefficient, lambda c: 0 <= c < inf, "a number ≥ 0")
            object.__setattr__(self, "coefficient", coefficient)
        for name, kind in (("prefixes", Prefixes), ("aux", AuxK)):
            part = getattr(self, name)
            if part is not None and not isinstance(part, kind):
                raise ValueError(f"{name}: got {part!r}, want {kind.__name__} or None")
        for part in fields(self):
            if part.type == "bool":
                object.__setattr__(self, part.name, arguments.flag(part.name, getattr(self, part.name)))

    @property
    def plain(self) -> bool:
        """True if losses and gradients are those of ops.decode_loss with :meth:`sparsity_weight`, and no more."""
        return self.linear and self.prefixes is None and self.aux is None

    @property
    def linear(self) -> bool:
        """True if the penalty is that of :meth:`sparsity_weight`."""
        return True

    @property
    def penalty(self) -> Penalty:
        """The penalty as a GPU's kernels know it; its values and slopes are those of :meth:`pull`."""
        return Penalty()

    @property
    def clips_projected(self) -> bool:
        """True if gradients are clipped without what of W_dec's is along its rows."""
        return self.projects_first and self.unit_rows

    @property
    def target_l0(self) -> float | None:
        """The active features an example that it aims at, if it says so."""
        return None

    @property
    def costs_norm(self) -> bool:
        """True if the penalty has a gradient for the norms of the decoder's rows: by default Σ of the last value set."""
        return False

    def now(self, coefficient: float | Tensor, step: int, features: int) -> Objective:
        """The objective of a step, with its coefficient and its prefixes."""
        prefixes = self.prefixes and self.prefixes.drawn(features, step)
        if coefficient is self.coefficient and prefixes is self.prefixes:
            return self
        now = replace(self, prefixes=prefixes) if prefixes is not self.prefixes else copy(self)
        object.__setattr__(now, "coefficient", coefficient)  # TopK has none to give
        return now

    def check(self, activation: str) -> None:
        """``ValueError`` unless it is for this activation."""
        if activation not in self.activations:
            wanted = " or ".join(repr(name) for name in self.activations)
            raise ValueError(f"objective: got {type(self).__name__} for activation {activation!r}, want one for {wanted}")

    def trained(self, activation: Activation) -> tuple[str, ...]:
        """The activation's parameters that have a gradient."""
        return activation.trained

    def reach(self, layer: Layer) -> Tensor | None:
        """[F]: what π has to exceed for an entry to have a gradient; None for 0."""
        return layer.cut

    def slack(self, layer: Layer) -> float:
        """The distance below its threshold at which an entry still has a gradient.  Synchronises on a GPU."""
        return 0.0

    def code(self, code: SparseCode, layer: Layer) -> SparseCode:
        """The code with the values that the loss is of."""
        return code

    def norms(self, W_dec: Tensor) -> Tensor | None:
        """[F]: the norms of the decoder's rows, where the penalty costs them."""
        return W_dec.norm(dim=1) if self.costs_norm else None

    def sparsity_weight(self, W_dec: Tensor) -> Tensor:
        """[F]: the cost of each feature's activation, of the last value set."""
        return W_dec.new_zeros(W_dec.shape[0])

    def constants(self, layer: Layer, l0: Tensor) -> dict[str, Tensor]:
        """[F] by parameter: gradients that are no sum over entries, at a batch's mean l0, 0-d."""
        return {}

    def norm_cost(self, W_dec: Tensor, sums: Tensor, n: int) -> Tensor:
        """[F], times W_dec: the gradient of the penalty through the rows' norms; sums [F], of a Pull's ``norms``."""
        norm = W_dec.norm(dim=1)
        return torch.where(norm > 0, sums * (self.coefficient / n) / norm, 0)  # at 0 the subgradient that autograd takes

    def by_example(self, code: SparseCode, layer: Layer) -> tuple[Objective, Tensor | float]:
        """(an objective of the same gradients at this code, whose penalty is a mean over examples; what that one lacks)."""
        return self, 0.0

    def pull(self, code: SparseCode, layer: Layer, W_dec: Tensor, losses: Tensor, grads: Tensor, n: int) -> Pull:
        """The losses and what values pull on, from those of ops.decode_loss and its grads [V, nnz].  Of some of the n
        examples of a batch their part, unless :meth:`by_example` gives another objective."""
        pulled = layer.activation.pullback(code.u, list(grads), code.indices, layer.vectors)
        return Pull(losses, pulled, norms=code.values[-1] if self.costs_norm else None)


def penalised(losses: Tensor, penalty: Tensor) -> Tensor:
    """losses [3] with another sparsity term."""
    return torch.stack([losses[0], penalty.to(losses.dtype), losses[2]])
