"""Every gradient of every objective against autograd through plain PyTorch in float64 (MATH.md §8–§11)."""

from __future__ import annotations

import pytest
import torch
from helpers import Judge, seeds
from problems.objectives import CASES, problem

SHAPES = [  # (B, d, F)
    (57, 33, 100), (1, 1, 1), (5, 100, 4),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((3, 1, 31), (2, 63, 33), (130, 16, 257))),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_autograds(case, shape):
    judge = Judge()
    for seed in seeds(shape[2]):
        step = problem(case, *shape, seed=10 * seed)
        found, torchs, exact = step.by_engine(), step.by_autograd(torch.float32), step.by_autograd(torch.float64)
        for name, value in found.items():
            judge.add(name, value, torchs[name], exact[name])
        for name in set(exact) - set(found):  # a parameter that the objective gives no gradient
            assert not exact[name].any(), name
    judge.verdict()
