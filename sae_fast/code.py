"""SparseCode: the support of a batch as CSR, with the values on it; and the same entries ordered by feature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast import activations
from sae_fast.activations import Activation


def row_ids(indptr: Tensor, nnz: int) -> Tensor:
    """[nnz] int64: the row of each entry of a CSR, from its offsets indptr [B+1]."""
    rows = torch.arange(indptr.shape[0] - 1, device=indptr.device)
    return torch.repeat_interleave(rows, indptr[1:] - indptr[:-1], output_size=nnz)


@dataclass(frozen=True)
class Transposed:
    """The entries of a SparseCode ordered by feature (CSC), as :func:`sae_fast.ops.transpose` makes it.

    colptr [F+1] int64; rows [nnz] int32, ascending within a feature; perm [nnz] int64: entry j here is entry
    ``perm[j]`` of the SparseCode, so one permutation serves every value set.
    """

    colptr: Tensor
    rows: Tensor
    perm: Tensor

    @classmethod
    def empty(cls, features: int, indices: Tensor) -> Transposed:
        """Memory for a code with these indices."""
        colptr = torch.empty(features + 1, dtype=torch.int64, device=indices.device)
        return cls(colptr, torch.empty_like(indices), torch.empty_like(indices, dtype=torch.int64))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """An op's arguments."""
        return self.colptr, self.rows, self.perm


class Affine(NamedTuple):
    """The way back of a normalisation: scale x̂′ + shift, scale [B] and shift [B] or None, of a code's rows."""

    scale: Tensor
    shift: Tensor | None

    def of_rows(self, at: slice) -> Affine:
        return Affine(self.scale[at], None if self.shift is None else self.shift[at])

    @staticmethod
    def cat(maps: Sequence[Affine]) -> Affine:
        shifts = [m.shift for m in maps if m.shift is not None]
        return Affine(torch.cat([m.scale for m in maps]), torch.cat(shifts) if shifts else None)


@dataclass(frozen=True, repr=False)
class SparseCode:
    """The active features of a batch.

    shape    [..., F], the shape of the dense code
    indptr   [B+1] int64: row b owns the entries indptr[b] .. indptr[b+1]; B = product of the leading dimensions
    indices  [nnz] int32, features, ascending within a row
    u        [nnz] (x − b_dec)·w_i, before any bias
    values   [V, nnz]: row 0 the magnitudes (the code itself), row 1 the gates ReLU(π_gate) of a Gated SAE
    affine   of a layer that normalises its input: what decode does to each example's x̂; else None

    An entry may have magnitude 0: in a Gated SAE the gate can be open while ReLU(π_mag) is 0 (S \\ S′ of MATH.md §2).
    """

    shape: torch.Size
    indptr: Tensor
    indices: Tensor
    u: Tensor
    values: Tensor
    affine: Affine | None = None

    def __repr__(self) -> str:
        return f"SparseCode(shape={tuple(self.shape)}, nnz={self.nnz}, value_sets={self.values.shape[0]})"

    @property
    def magnitudes(self) -> Tensor:
        """[nnz]: f̃ on the support."""
        return self.values[0]

    @property
    def gates(self) -> Tensor:
        """[nnz]: ReLU(π_gate) on the support of a Gated SAE; of any other SAE, the magnitudes."""
        return self.values[-1]

    @property
    def nnz(self) -> int:
        """Entries stored.  Synchronises on a GPU."""
        return self.indices.shape[0]

    @property
    def batch(self) -> int:
        """B, the number of rows: the product of the leading dimensions."""
        return prod(self.shape[:-1])

    @property
    def d_sae(self) -> int:
        return self.shape[-1]

    def row_ids(self) -> Tensor:
        """[nnz] int64: the row of each entry."""
        return row_ids(self.indptr, self.nnz)

    def row_sums(self, values: Tensor) -> Tensor:
        """[B]: the sum of values [nnz] over each row's entries."""
        return torch.segment_reduce(values.contiguous(), "sum", offsets=self.indptr, initial=0)

    def l0(self) -> Tensor:
        """[...] int64: features with a non-zero magnitude, for each example."""
        fires = (self.values[0] != 0).long()
        total = torch.zeros(self.nnz + 1, dtype=torch.long, device=fires.device)
        torch.cumsum(fires, 0, out=total[1:])
        return (total[self.indptr[1:]] - total[self.indptr[:-1]]).reshape(self.shape[:-1])

    def to_dense(self, values: Tensor | None = None) -> Tensor:
        """[..., F]: the magnitudes (or another [nnz] ``values``) with zeros elsewhere.  Differentiable."""
        values = self.magnitudes if values is None else values
        flat = torch.zeros(self.batch * self.d_sae, dtype=values.dtype, device=values.device)
        flat = flat.index_put((self.row_ids() * self.d_sae + self.indices.long(),), values)
        return flat.reshape(self.shape)

    def of_rows(self, first: int, last: int) -> SparseCode:
        """Rows first .. last, of flattened leading dimensions; the entries are views.  Synchronises on a GPU."""
        begin, end = self.indptr[[first, last]].tolist()
        indptr, shape = self.indptr[first : last + 1] - begin, torch.Size((last - first, self.d_sae))
        affine = None if self.affine is None else self.affine.of_rows(slice(first, last))
        return SparseCode(shape, indptr, self.indices[begin:end], self.u[begin:end], self.values[:, begin:end], affine)

    def with_values(self, values: Tensor) -> SparseCode:
        """The same support with other values [V, nnz]."""
        return replace(self, values=values)

    @staticmethod
    def cat(codes: Sequence[SparseCode]) -> SparseCode:
        """Stacks codes along the batch (leading dimensions are flattened): gradient accumulation is this plus the
        stacked residual rows."""
        if not codes:
            raise ValueError("codes: got an empty sequence, want at least one SparseCode")
        widths = {code.d_sae for code in codes}
        if len(widths) > 1:
            raise ValueError(f"codes: got feature counts {sorted(widths)}, want one")
        if len({code.values.shape[0] for code in codes}) > 1:
            raise ValueError(f"codes: got {[code.values.shape[0] for code in codes]} value sets, want the same in each")
        maps = [code.affine for code in codes if code.affine is not None]
        if len(maps) not in (0, len(codes)) or len({m.shift is None for m in maps}) > 1:
            raise ValueError("codes: got some of a layer that normalises its input, and some not, want the same in each")
        starts = [0]
        for code in codes:
            starts.append(starts[-1] + code.nnz)
        indptr = torch.cat([codes[0].indptr[:1]] + [c.indptr[1:] + s for c, s in zip(codes, starts, strict=False)])
        return SparseCode(
            shape=torch.Size((sum(c.batch for c in codes), codes[0].d_sae)),
            indptr=indptr,
            indices=torch.cat([c.indices for c in codes]),
            u=torch.cat([c.u for c in codes]),
            values=torch.cat([c.values for c in codes], dim=1),
            affine=Affine.cat(maps) if maps else None,
        )


@dataclass(frozen=True)
class RowGradient:
    """The gradient of a weight [F, d] in the form in which the engine has it, before anything dense exists:

        grad[i] = Σ_s Σ_{j in feature i} values[s][perm[j]] · A[s][rows[j]]  +  self_coefficient[i] · W[i]

    values: list of [nnz]; A: list of [B, d], same length; self_coefficient [F], 0 for
    a feature without entries.  For a vector parameter [F], A is [B, 1] ones.  along [nnz], where it is known: each
    entry's part of ⟨grad[i], W[i]⟩ without the coefficient's, in the order of values.
    """

    csc: Transposed
    values: list[Tensor]
    A: list[Tensor]
    self_coefficient: Tensor | None = None
    along: Tensor | None = None

    @classmethod
    def of(
        cls, colptr: Tensor, rows: Tensor, perm: Tensor, values: Iterable[Tensor], A: Iterable[Tensor],
        own: Tensor | None = None,
    ) -> RowGradient:  # fmt: skip
        """From an op's arguments."""
        return cls(Transposed(colptr, rows, perm), list(values), list(A), own)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None]:
        """An op's arguments."""
        return *self.csc.parts(), self.values, self.A, self.self_coefficient

    def contiguous(self) -> RowGradient:
        """The same in plain memory."""
        colptr, rows, perm = (t.contiguous() for t in self.csc.parts())
        own = None if self.self_coefficient is None else self.self_coefficient.contiguous()
        return RowGradient.of(
            colptr, rows, perm, (v.contiguous() for v in self.values), (a.contiguous() for a in self.A), own
        )

    def of_rows(self, at: slice) -> RowGradient:
        """For the weight rows at ``at``, whose features start there: the coefficients are theirs alone."""
        return self if self.self_coefficient is None else replace(self, self_coefficient=self.self_coefficient[at])

    def sizes(self) -> tuple[int, int, int]:
        """nnz, B and F, by which a route is chosen."""
        return self.csc.rows.shape[0], self.A[0].shape[0], self.csc.colptr.shape[0] - 1


class Rows(NamedTuple):
    """Weight rows W [n, d] and what is kept with them: Adam's v [n, d] as of last_step [n]; perhaps the Shadow; with
    momentum Adam's m [n, d] as of the step before."""

    W: Tensor
    v: Tensor
    last_step: Tensor
    shadow: Shadow | None = None
    m: Tensor | None = None

    def at(self, rows: slice | Tensor) -> Rows:
        """Some of the rows: of a slice views, of indices copies."""
        shadow = None if self.shadow is None else Shadow(*(t[rows] for t in self.shadow))
        m = None if self.m is None else self.m[rows]
        return Rows(self.W[rows], self.v[rows], self.last_step[rows], shadow, m)


class Adam(NamedTuple):
    """Adam's settings in a step, which is counted from 1.  ``unit_rows``: project before, renormalise after.
    ``grad_scale`` and ``skip`` are 0-d."""

    step: int
    lr: float
    beta2: float
    eps: float
    unit_rows: bool = False
    grad_scale: Tensor | None = None
    skip: Tensor | None = None
    beta1: float = 0.0

    @property
    def skips(self) -> bool:
        """True if the step is to be left out.  Synchronises on a GPU."""
        return self.skip is not None and bool(self.skip)


class Shadow(NamedTuple):
    """A weight [F, d] as the screen takes it: ``rows``, its rows in 16 bits, and ``norms``, of the rows and of what
    rounding took from them.

    Of the C++ engine: rows [F, d] bfloat16 (subnormals to 0), norms [F, 2] float64.  Of a GPU: rows [F, K] float16, each
    row times a power of two, K the next multiple of 64, and norms [F, 1 + 2·S] float32 (kernels/round.py).
    """

    rows: Tensor
    norms: Tensor

    @property
    def of_gpu(self) -> bool:
        return self.rows.dtype == torch.float16


class Layer(NamedTuple):
    """An encoder, as the ops hand it around: W [F, d], the rest [F].

    ``vectors`` are the activation's, ``cut`` is what π has to exceed, None for 0; ``shadow`` is W's, if there is one.
    """

    W: Tensor
    bias: Tensor
    activation: Activation
    vectors: tuple[Tensor, ...] = ()
    cut: Tensor | None = None
    shadow: Shadow | None = None

    @classmethod
    def of(
        cls, W: Tensor, bias: Tensor, activation: str, parameters: Mapping[str, Tensor], slack: float = 0.0,
        shadow: Shadow | None = None,
    ) -> Layer:  # fmt: skip
        """The layer of an activation's parameters by name; π may miss what it has to exceed by ``slack``."""
        kind = activations.named(activation)
        vectors = kind.vectors(parameters)
        return cls(W, bias, kind, vectors, kind.cut(vectors), shadow).at(slack)

    def at(self, slack: float) -> Layer:
        """The same, where π may miss what it has to exceed by ``slack``."""
        if slack == 0:
            return self
        return self._replace(cut=(torch.zeros_like(self.bias) if self.cut is None else self.cut) - slack)

    def vector_slots(self) -> tuple[Tensor | None, Tensor | None]:
        """The vectors in the two places that kernels have for them."""
        first, second, *_ = (*self.vectors, None, None)
        return first, second

    def contiguous(self) -> Layer:
        """The same in plain memory."""
        cut = None if self.cut is None else self.cut.contiguous()
        vectors = tuple(v.contiguous() for v in self.vectors)
        return self._replace(W=self.W.contiguous(), bias=self.bias.contiguous(), vectors=vectors, cut=cut)


class Decoder(NamedTuple):
    """W_dec [F, d_out] and b_dec [d_out]; ``centred``: whether the encoder is given x − b_dec."""

    W: Tensor
    b: Tensor
    centred: bool = True
