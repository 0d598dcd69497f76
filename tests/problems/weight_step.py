"""Steps for weight_step and row_step, and the same in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from helpers import dense, randn, random_code
from torch import Tensor

from sae_fast import ops, reference
from sae_fast.code import RowGradient, SparseCode

STEP = 7
ADAM = dict(step=STEP, lr=0.5, beta2=0.99, eps=1e-3)


@dataclass(frozen=True)
class State:
    """A weight with the optimizer state of its rows, each last touched at another step."""

    W: Tensor
    v: Tensor
    last_step: Tensor

    def clone(self) -> State:
        return State(self.W.clone(), self.v.clone(), self.last_step.clone())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.W, self.v, self.last_step

    def v_now(self, beta2: float, step: int = STEP) -> Tensor:
        """v [F, d] in float64 as plain Adam would have it: decayed for the idle steps."""
        return self.v.double() * beta2 ** (step - self.last_step).double()[:, None]


@dataclass(frozen=True)
class Step:
    """A state and the gradient for it: code, values [S, nnz], A [S, B, d] and perhaps self_coefficient [F]."""

    state: State
    code: SparseCode
    values: Tensor
    A: Tensor
    self_coefficient: Tensor | None = None

    def gradient(self) -> RowGradient:
        return RowGradient(ops.transpose(self.code), list(self.values), list(self.A), self.self_coefficient)

    def touched(self) -> Tensor:
        return torch.bincount(self.code.indices.long(), minlength=self.code.d_sae) > 0

    def dense_gradient(self, dtype: torch.dtype) -> Tensor:
        grad = (dense(self.code, self.values.to(dtype)).mT @ self.A.to(dtype)).sum(0)
        if self.self_coefficient is None:
            return grad
        return grad + self.self_coefficient.to(dtype)[:, None] * self.state.W.to(dtype) * self.touched()[:, None]


@cache
def make_step(
    B: int, d: int, F: int, S: int = 1, unit: bool = False, own: bool = False, seed: int = 0, density: float = 0.05
) -> Step:
    """v is positive everywhere: from v = 0, Adam with β1 = 0 turns the rounding of a small gradient into a full step."""
    W = randn(F, d, seed=seed)
    if unit:
        W = torch.nn.functional.normalize(W, dim=1)
    v = randn(F, d, seed=seed + 1).square() + 0.1
    last_step = torch.randint(0, STEP, (F,), generator=torch.Generator().manual_seed(seed))
    code = random_code(B, F, S, density, seed=seed)
    own_coefficient = randn(F, seed=seed + 3) if own else None
    return Step(State(W, v, last_step), code, code.values - 0.3, randn(S, B, d, seed=seed + 2), own_coefficient)


def plain(step: Step, dtype: torch.dtype, unit_rows: bool, scale: float = 1.0, adam: dict = ADAM) -> tuple[Tensor, Tensor]:
    """(W, v) after reference.adam_step on every row, from v decayed up to the step before."""
    W = step.state.W.to(dtype, copy=True)
    v = step.state.v_now(adam["beta2"], adam["step"] - 1).to(dtype)
    grad = step.dense_gradient(dtype) * scale
    reference.adam_step(
        W, grad, torch.zeros_like(W), v, adam["step"], adam["lr"], (0.0, adam["beta2"]), adam["eps"], unit_rows
    )
    return W, v
