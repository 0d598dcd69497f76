"""AuxK: dead features reconstruct the error that the others leave (Gao et al. 2024, arXiv 2406.04093, appendix A.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast import arguments, ops
from sae_fast.code import Layer, SparseCode

DIALECTS = ("dictionary_learning", "saelens")


class Revived(NamedTuple):
    """A second value set on dead features alone, summed over its entries: ``ids`` [n] int64, the features that have any,
    ascending; loss, 0-d; the rows of their gradients W_enc [n, d] and W_dec [n, d_out]; bias [n], that of the bias and the
    sum of u's; unscaled, 0-d: E‖e − ê‖²."""

    ids: Tensor
    loss: Tensor
    W_enc: Tensor
    W_dec: Tensor
    bias: Tensor
    unscaled: Tensor


@dataclass(frozen=True)
class AuxK:
    """α E‖e − ê‖² / E‖e − ē‖², α the coefficient: e the error x − x̂, ē its batch mean, and ê what the ``k`` largest
    ReLU(π) of dead features, by default d/2, decode to without b_dec.  e and the denominator carry no gradient.

    ``dialect`` "saelens": α min(|dead| / k, 1) E‖e − ê‖² of the k largest π, negative ones too; with ``by_norm`` those
    where π‖d_i‖ is largest.  MATH.md §10.
    """

    coefficient: float = 1 / 32
    k: int | None = None
    dialect: str = "dictionary_learning"
    by_norm: bool = False

    def __post_init__(self) -> None:
        coefficient = arguments.number("aux: coefficient", self.coefficient, arguments.positive, "a number > 0")
        object.__setattr__(self, "coefficient", coefficient)
        if self.k is not None:
            object.__setattr__(self, "k", arguments.whole("aux: k", self.k, wanted="a positive int or None"))
        if self.dialect not in DIALECTS:
            raise ValueError(f"aux: dialect: got {self.dialect!r}, want one of {DIALECTS}")
        object.__setattr__(self, "by_norm", arguments.flag("aux: by_norm", self.by_norm))
        if self.by_norm and self.dialect != "saelens":
            raise ValueError(f"aux: by_norm: got True with dialect {self.dialect!r}, want dialect 'saelens'")

    def revive(
        self, x_c: Tensor, error: Tensor, layer: Layer, W_dec: Tensor, dead: Tensor, precision: str
    ) -> Revived | None:
        """The part of the features ``dead`` [F] bool, for encoder inputs x_c and errors x − x̂ [B, d_out]; None without any.
        Synchronises on a GPU."""
        ids = dead.nonzero()[:, 0]
        if ids.shape[0] == 0:
            return None
        n, wanted = error.shape[0], self.k or max(1, error.shape[1] // 2)
        W, nothing = W_dec[ids], error.new_zeros(error.shape[1])
        norms = W.norm(dim=1) if self.by_norm else None
        code = self._code(x_c, layer.W[ids], layer.bias[ids], min(wanted, ids.shape[0]), precision, norms)
        zeros = self.dialect == "saelens"  # no ReLU is behind its values
        out = ops.decode_loss(code, W, nothing, error, W.new_zeros(W.shape[0]), n, zeros=zeros)
        if self.dialect == "saelens":
            scale = error.new_tensor(self.coefficient * min(ids.shape[0] / wanted, 1.0))
        else:
            spread = (error - error.mean(0)).pow(2).sum(1).sum() / n  # by rows: the same for any number of threads
            scale = torch.where(spread > 0, self.coefficient / spread, 0)
        csc = ops.transpose(code)
        ids, csc = ids[ops.touched(csc)], replace(csc, colptr=csc.colptr.unique_consecutive())
        delta = out.grads[0] * scale
        return Revived(
            ids,
            loss=out.losses[0] * scale,
            W_enc=ops.outer(csc, [delta], [x_c]),
            W_dec=ops.outer(csc, [code.magnitudes * (scale * (2 / n))], [out.residual]),
            bias=torch.segment_reduce(delta[csc.perm], "sum", offsets=csc.colptr),
            unscaled=out.losses[0],
        )

    def _code(self, x_c: Tensor, W: Tensor, bias: Tensor, k: int, precision: str, norms: Tensor | None) -> SparseCode:
        if self.dialect == "dictionary_learning":
            return ops.encode(x_c, W, bias, activation="relu", support="topk", k=k, precision=precision)
        u = x_c @ W.T
        ranked = u + bias if norms is None else (u + bias) * norms
        chosen = ranked.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
        u = u.gather(1, chosen)
        indptr = torch.arange(0, chosen.numel() + 1, k, device=u.device)
        values = (u + bias[chosen]).reshape(1, -1)
        return SparseCode(torch.Size((x_c.shape[0], W.shape[0])), indptr, chosen.reshape(-1).int(), u.reshape(-1), values)
