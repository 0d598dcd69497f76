"""Transposed codes and steps, where Triton's kernels run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from helpers import Judge, code_of, dense, randn

from problems.weight_step import ADAM, State, Step, plain
from sae_fast import ops, use_backend
from sae_fast.code import RowGradient, SparseCode, Transposed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, D, F = 70, 20, 21  # three words of rows, three slices of columns, six tiles of features; each with a ragged last one


@cache
def a_code(S: int, rows: int = B, features: int = F, seed: int = 0) -> SparseCode:
    """Feature 0 fires in every row but two, which have no entries: fourteen runs, the last one ragged.  Feature 3 and the
    last never fire."""
    g = torch.Generator().manual_seed(seed)
    member = torch.rand(rows, features, generator=g) < 0.12
    member[:, 0] = True
    member[:, [min(3, features - 1), features - 1]] = False
    member[[1, rows - 1]] = False
    return code_of(member, S, g)


@cache
def a_step(S: int = 1, d: int = D, unit: bool = False, own: bool = False, rows: int = B, features: int = F) -> Step:
    code = a_code(S, rows, features)
    W = randn(features, d)
    W = torch.nn.functional.normalize(W, dim=1) if unit else W
    last_step = torch.arange(features) % ADAM["step"]  # idle for 1 to 7 steps
    state = State(W, randn(features, d, seed=1).square() + 0.1, last_step)
    return Step(state, code, code.values - 0.3, randn(S, rows, d, seed=2), randn(features, seed=3) if own else None)


def there(*given):
    """Tensors, and what is made of them, on the device."""
    moved = [
        Transposed(*there(it.colptr, it.rows, it.perm)) if isinstance(it, Transposed)
        else [there(t) for t in it] if isinstance(it, (list, tuple))
        else it if it is None else it.to(DEVICE, copy=True)
        for it in given
    ]  # fmt: skip
    return moved if len(moved) > 1 else moved[0]


def csc_of(code: SparseCode) -> Transposed:
    with use_backend("reference"):
        return there(ops.transpose(code))


def gradient_of(step: Step) -> RowGradient:
    values, A, own = there(list(step.values), list(step.A), step.self_coefficient)
    return RowGradient(csc_of(step.code), values, A, own)


def stepped(step: Step, unit_rows: bool, adam: dict = ADAM, **arguments) -> State:
    """The state after ops.weight_step, on the CPU."""
    state = State(*there(*step.state.tensors()))
    ops.weight_step(*state.tensors(), gradient_of(step), unit_rows=unit_rows, **adam, **arguments)
    return State(*(t.cpu() for t in state.tensors()))


def judge_state(after: State, step: Step, unit_rows: bool, scale: float = 1.0, adam: dict = ADAM) -> None:
    judge, results = Judge(), [plain(step, dtype, unit_rows, scale, adam) for dtype in (torch.float32, torch.float64)]
    judge.add("W", after.W, *(W for W, _ in results))
    judge.add("v", after.v_now(adam["beta2"], adam["step"]), *(v for _, v in results))
    judge.verdict()
    assert torch.equal(after.last_step == adam["step"], step.touched())


def gradient_rows(step: Step, dtype: torch.dtype) -> torch.Tensor:
    """[F, d] from values and A as ``dtype``, in that dtype."""
    return (dense(step.code, step.values.to(dtype)).mT @ step.A.to(dtype)).sum(0)


def judge_rows(rows: torch.Tensor, step: Step, dtype: torch.dtype, start=None, chosen=slice(None)) -> None:
    judge = Judge()
    held = replace(step, values=step.values.to(dtype).double(), A=step.A.to(dtype).double())
    expected = [gradient_rows(step, dtype)[chosen], gradient_rows(held, torch.float64)[chosen]]
    if start is not None:
        expected = [start + expected[0], start.double() + expected[1]]
    judge.add("rows", rows.cpu(), *expected)
    judge.verdict()


def arguments(step: Step, dtype: torch.dtype) -> tuple:
    return csc_of(step.code), there(list(step.values.to(dtype))), there(list(step.A.to(dtype)))
