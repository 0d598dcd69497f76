"""One case an op of the engine, against its dense equivalent in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adam import adam

from benchmarks.cases.floors import add_products
from benchmarks.cases.layers import dense_code
from benchmarks.data import World
from benchmarks.registry import Case, Run, Start, case
from sae_fast import GatedSAE, RowGradient, SparseCode, Transposed, ops

ADAM: dict[str, Any] = dict(lr=1e-5, beta2=0.999, eps=1e-8)


@dataclass(frozen=True)
class Entries:
    """A batch between encoder and weights: its code as the engine has it, and dense as eager PyTorch has it."""

    x: Tensor  # [B, d], the batch, which is the target too
    code: SparseCode
    csc: Transposed
    residual: Tensor  # [B, d]
    f: Tensor  # [B, F], magnitudes
    gates: Tensor  # [B, F]
    at: tuple[Tensor, Tensor]  # row and feature of each entry, for eager PyTorch to gather by

    @classmethod
    def of(cls, sae: GatedSAE, x: Tensor) -> Entries:
        with torch.no_grad():
            code = sae.encode_sparse(x)
            f, gates = code.to_dense(), code.to_dense(code.gates)
            residual = sae.decode(code) - x
            return cls(x, code, ops.transpose(code), residual, f, gates, (code.row_ids(), code.indices.long()))

    def double(self) -> Entries:
        code = replace(self.code, u=self.code.u.double(), values=self.code.values.double())
        dense = {name: getattr(self, name).double() for name in ("x", "residual", "f", "gates")}
        return replace(self, code=code, **dense)


@lru_cache(maxsize=2)  # the timed world's and its head's, which consecutive cases share
def entries(world: World) -> list[Entries]:
    return [Entries.of(world.sae, x) for x in world.batches[:3]]  # three: dense codes are large


def centred(world: World) -> list[Tensor]:
    return [x - world.sae.b_dec.detach() for x in world.batches]


def gradients(world: World) -> list[Tensor]:
    """Dense gradients of W_dec."""
    return [e.f.T @ e.residual for e in entries(world)]


def outputs(*names: str) -> Callable[[GatedSAE, list], dict[str, Tensor]]:
    """An outcome: the results, one tensor or a tuple of these names, side by side over the inputs."""

    def outcome(sae: GatedSAE, results: list) -> dict[str, Tensor]:
        tuples = [r if isinstance(r, tuple) else (r,) for r in results]
        return {name: torch.cat([t[i].flatten() for t in tuples]) for i, name in enumerate(names)}

    return outcome


def op(name: str, mode: str, *names: str, provider: str = "eager", **arguments: Any) -> Callable[[Start], Case]:
    """A case on `Entries` whose results are named; the decorated reference is its first provider too."""

    def register(reference: Start) -> Case:
        settings = dict(inputs=entries, outcome=outputs(*names))
        one = case(name, mode, **{**settings, **arguments})(reference)
        one.provider(provider)(reference)
        return one

    return register


# ---- forward --------------------------------------------------------------------------------------------------------


@op("encode", "forward", inputs=centred, outcome=dense_code)
def encode(sae: GatedSAE) -> Run:
    def run(x_c: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            u = x_c @ sae.W_enc.T
            pi_gate = u + sae.b_gate
            return torch.where(pi_gate > 0, torch.relu(sae.r_mag.exp() * u + sae.b_mag), 0.0), torch.relu(pi_gate)

    return run


@encode.provider("sae_fast")
def _(sae: GatedSAE) -> Run:
    W_enc, b_gate, r_mag, b_mag = (p.detach() for p in (sae.W_enc, sae.b_gate, sae.r_mag, sae.b_mag))
    return lambda x_c: ops.encode(x_c, W_enc, b_gate, activation="gated", r_mag=r_mag, b_mag=b_mag)


add_products(encode)

K = 64


def largest_first(sae: GatedSAE, results: list) -> dict[str, Tensor]:
    """The values that were chosen, descending in a row: which of two features within rounding of each other is the last
    one does not show."""
    dense = [r.to_dense().topk(K).values if isinstance(r, SparseCode) else r.values for r in results]
    return {"values": torch.stack(dense)}


@op("encode_topk", "forward", inputs=centred, outcome=largest_first)
def encode_topk(sae: GatedSAE) -> Run:
    """The K largest of each row, of biases that are zero: half of all pre-activations are positive."""
    bias = torch.zeros(sae.d_sae, dtype=sae.W_enc.dtype)
    return torch.no_grad()(lambda x_c: torch.relu(x_c @ sae.W_enc.T + bias).topk(K))


@encode_topk.provider("sae_fast")
def _(sae: GatedSAE) -> Run:
    W_enc, bias = sae.W_enc.detach(), torch.zeros(sae.d_sae)
    return lambda x_c: ops.encode(x_c, W_enc, bias, activation="relu", support="topk", k=K)


add_products(encode_topk)


@op("decode", "forward", "x_hat", provider="embedding_bag")
def decode(sae: GatedSAE) -> Run:
    """The sparse decode that PyTorch has.  It is the reference, as its sums are less exact than the dense product's."""
    W_dec = sae.W_dec.detach()
    return lambda e: F.embedding_bag(e.at[1], W_dec, e.code.indptr[:-1], mode="sum", per_sample_weights=e.code.magnitudes)


@decode.provider("sae_fast")
def _(sae: GatedSAE) -> Run:
    W_dec = sae.W_dec.detach()
    return lambda e: ops.decode(e.code, W_dec)


@decode.provider("eager")
def _(sae: GatedSAE) -> Run:
    W_dec = sae.W_dec.detach()
    return lambda e: e.f @ W_dec


@op("decode_loss", "forward", "losses", "residual", "residual_aux", "grads")
def decode_loss(sae: GatedSAE) -> Run:
    W_dec, b_dec = sae.W_dec.detach(), sae.b_dec.detach()

    def run(e: Entries) -> tuple[Tensor, ...]:
        n = e.x.shape[0]
        residual, auxiliary = torch.addmm(b_dec, e.f, W_dec) - e.x, torch.addmm(b_dec, e.gates, W_dec) - e.x
        losses = torch.stack([residual.pow(2).sum(), e.gates.sum(), auxiliary.pow(2).sum()]) / n
        magnitude = (residual @ W_dec.T)[e.at] * (2 / n) * (e.code.magnitudes != 0)
        gate = ((auxiliary @ W_dec.T)[e.at] * 2 + 1) / n
        return losses, residual, auxiliary, torch.stack([magnitude, gate])

    return run


@decode_loss.provider("sae_fast")
def _(sae: GatedSAE) -> Run:
    W_dec, b_dec, weight = sae.W_dec.detach(), sae.b_dec.detach(), torch.ones(sae.d_sae)
    return lambda e: tuple(ops.decode_loss(e.code, W_dec, b_dec, e.x, weight, e.x.shape[0]))


# ---- backward -------------------------------------------------------------------------------------------------------


@op("sampled_dots", "backward", "dots")
def sampled_dots(sae: GatedSAE) -> Run:
    W_dec = sae.W_dec.detach()
    return lambda e: (e.residual @ W_dec.T)[e.at]


@sampled_dots.provider("sae_fast")
def _(sae: GatedSAE) -> Run:
    W_dec = sae.W_dec.detach()
    return lambda e: ops.sampled_dots(e.code, e.residual, W_dec)


@op("transpose", "backward", "colptr", "rows", "perm")
def transpose(sae: GatedSAE) -> Run:
    def run(e: Entries) -> tuple[Tensor, Tensor, Tensor]:
        perm = torch.argsort(e.at[1], stable=True)
        colptr = F.pad(torch.bincount(e.at[1], minlength=sae.d_sae).cumsum(0), (1, 0))
        return colptr, e.at[0][perm], perm

    return run


@transpose.provider("sae_fast")
def _(sae: GatedSAE) -> Run:
    def run(e: Entries) -> tuple[Tensor, Tensor, Tensor]:
        csc = ops.transpose(e.code)
        return csc.colptr, csc.rows, csc.perm

    return run


@op("outer", "backward", "rows")
def outer(sae: GatedSAE) -> Run:
    return lambda e: e.f.T @ e.residual


@outer.provider("sae_fast")
def _(sae: GatedSAE) -> Run:
    return lambda e: ops.outer(e.csc, [e.code.magnitudes], [e.residual])


@op("grad_sqnorm", "backward", "sqnorm")
def grad_sqnorm(sae: GatedSAE) -> Run:
    """The squared norm of the gradient that `outer` gives."""
    return lambda e: (e.f.T @ e.residual).pow(2).sum()


@grad_sqnorm.provider("sae_fast")
def _(sae: GatedSAE) -> Run:
    W_dec = sae.W_dec.detach()
    return lambda e: ops.grad_sqnorm(RowGradient(e.csc, [e.code.magnitudes], [e.residual]), W_dec)


# ---- update ---------------------------------------------------------------------------------------------------------


def dense_adam(W: Tensor) -> Callable[[Tensor], None]:
    """One step of W from a dense gradient: projection, Adam, unit rows."""
    m, v, step_count = torch.zeros_like(W), torch.zeros_like(W), torch.tensor(0.0)

    def step(grad: Tensor) -> None:
        with torch.no_grad():
            adam(
                [W], [ops.project_rows(grad, W)], [m], [v], [], [step_count], foreach=False, fused=True, amsgrad=False,
                beta1=0.0, beta2=ADAM["beta2"], lr=ADAM["lr"], weight_decay=0.0, eps=ADAM["eps"], maximize=False,
            )  # fmt: skip
            W.copy_(F.normalize(W, dim=1))

    return step


def lazy_state(W: Tensor) -> tuple[Tensor, Tensor, Iterator[int]]:
    """v, last_step, and the numbers of the steps."""
    return torch.zeros_like(W), torch.zeros(W.shape[0], dtype=torch.int64), count(1)


def updated(sae: GatedSAE, results: list) -> dict[str, Tensor]:
    return {"W_dec": sae.W_dec}


@op("weight_step", "update", outcome=updated)
def weight_step(sae: GatedSAE) -> Run:
    """outer, projection, Adam, unit rows."""
    step = dense_adam(sae.W_dec)
    return lambda e: step(e.f.T @ e.residual)


@weight_step.provider("sae_fast")
def _(sae: GatedSAE) -> Run:
    v, last_step, steps = lazy_state(sae.W_dec)

    def run(e: Entries) -> None:
        gradient = RowGradient(e.csc, [e.code.magnitudes], [e.residual])
        with torch.no_grad():
            ops.weight_step(sae.W_dec, v, last_step, gradient, step=next(steps), unit_rows=True, **ADAM)

    return run


@op("row_step", "update", inputs=gradients, outcome=updated)
def row_step(sae: GatedSAE) -> Run:
    return dense_adam(sae.W_dec)


@row_step.provider("sae_fast")
def _(sae: GatedSAE) -> Run:
    v, last_step, steps = lazy_state(sae.W_dec)

    def run(grad: Tensor) -> None:
        with torch.no_grad():
            ops.row_step(sae.W_dec, v, last_step, grad, step=next(steps), unit_rows=True, **ADAM)

    return run
