"""Steps for weight_step and row_step, and the same in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from helpers import Judge, assert_same_bits, dense, randn, random_code
from torch import Tensor

from problems.bodies import Body, moved
from problems.outer import csc_of, long_code
from sae_fast import ops, reference
from sae_fast.code import RowGradient, SparseCode

STEP = 7
ADAM = dict(step=STEP, lr=0.5, beta2=0.99, eps=1e-3)


@dataclass(frozen=True)
class State:
    """A weight with the optimizer state of its rows, each last touched at another step; perhaps with momentum."""

    W: Tensor
    v: Tensor
    last_step: Tensor
    m: Tensor | None = None

    def clone(self) -> State:
        return State(*(None if t is None else t.clone() for t in (*self.tensors(), self.m)))

    def rows(self, at: slice | Tensor) -> State:
        return State(*(None if t is None else t[at] for t in (*self.tensors(), self.m)))

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
        return RowGradient(csc_of(self.code), list(self.values), list(self.A), self.self_coefficient)

    def touched(self) -> Tensor:
        return torch.bincount(self.code.indices.long(), minlength=self.code.d_sae) > 0

    def moving(self) -> Tensor:
        return self.touched() if self.state.m is None else self.touched() | (self.state.m != 0).any(1)

    def dense_gradient(self, dtype: torch.dtype) -> Tensor:
        grad = (dense(self.code, self.values.to(dtype)).mT @ self.A.to(dtype)).sum(0)
        if self.self_coefficient is None:
            return grad
        return grad + self.self_coefficient.to(dtype)[:, None] * self.state.W.to(dtype) * self.touched()[:, None]


@cache
def make_step(
    B: int, d: int, F: int, S: int = 1, unit: bool = False, own: bool = False, seed: int = 0, density: float = 0.05,
    momentum: bool = False, long: bool = False,
) -> Step:  # fmt: skip
    """v is positive everywhere: from v = 0, Adam with β1 = 0 turns the rounding of a small gradient into a full step.
    With ``momentum`` about half of the rows have some; ``long``: feature 0 has entries in nearly all rows."""
    W = randn(F, d, seed=seed)
    if unit:
        W = torch.nn.functional.normalize(W, dim=1)
    v = randn(F, d, seed=seed + 1).square() + 0.1
    last_step = torch.randint(0, STEP, (F,), generator=torch.Generator().manual_seed(seed))
    code = long_code(B, F, S, seed) if long else random_code(B, F, S, density, seed=seed)
    own_coefficient = randn(F, seed=seed + 3) if own else None
    m = randn(F, d, seed=seed + 4) * (randn(F, 1, seed=seed + 5) > 0) if momentum else None
    if unit and m is not None:  # projected, as gradients are: a row of one element does not move
        m -= (m * W).sum(1, keepdim=True) * W
    return Step(State(W, v, last_step, m), code, code.values - 0.3, randn(S, B, d, seed=seed + 2), own_coefficient)


def stepped(
    body: Body, step: Step, unit_rows: bool = False, adam: dict = ADAM, gradient: RowGradient | None = None, **settings
) -> State:
    """The state after weight_step where a body runs, on the CPU."""
    state, gradient = moved((step.state.clone(), gradient or step.gradient()), body.device)
    settings = {name: moved(value, body.device) for name, value in settings.items()}
    ops.weight_step(*state.tensors(), gradient, m=state.m, unit_rows=unit_rows, **adam, **settings)
    return moved(state, "cpu")


def add_state(judge: Judge, after: State, step: Step, unit_rows: bool, scale: float | None = None, adam: dict = ADAM):
    """W, v and m; only rows with entries or momentum have moved."""
    torchs, exact = (plain_moments(step, dtype, unit_rows, scale or 1.0, adam) for dtype in (torch.float32, torch.float64))
    results = (after.W, after.v_now(adam["beta2"], adam["step"]), after.m)
    for name, result, *others in zip("Wvm", results, torchs, exact, strict=True):
        if result is not None:
            judge.add(name, result, *others)
    idle = ~step.moving()
    assert bool((after.last_step[~idle] == adam["step"]).all())
    assert_same_bits(after.rows(idle), step.state.rows(idle))


def plain(step: Step, dtype: torch.dtype, unit_rows: bool, scale: float = 1.0, adam: dict = ADAM) -> tuple[Tensor, Tensor]:
    """(W, v) after reference.adam_step on every row, from v decayed up to the step before."""
    W, v, _ = plain_moments(step, dtype, unit_rows, scale, adam)
    return W, v


def plain_moments(
    step: Step, dtype: torch.dtype, unit_rows: bool, scale: float, adam: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """(W, v, m) likewise."""
    W = step.state.W.to(dtype, copy=True)
    v = step.state.v_now(adam["beta2"], adam["step"] - 1).to(dtype)
    m = torch.zeros_like(W) if step.state.m is None else step.state.m.to(dtype, copy=True)
    grad, betas = step.dense_gradient(dtype) * scale, (adam.get("beta1", 0.0), adam["beta2"])
    reference.adam_step(W, grad, m, v, adam["step"], adam["lr"], betas, adam["eps"], unit_rows)
    return W, v, m
