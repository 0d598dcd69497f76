"""Every gradient of every objective against autograd through plain PyTorch in float64 (MATH.md §8–§11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Judge, seeds
from problems.objectives import CASES, problem

from sae_fast.ops import crossovers

SHAPES = [  # (B, d, F)
    (57, 33, 100), (1, 1, 1), (5, 100, 4),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((3, 1, 31), (2, 63, 33), (130, 16, 257))),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_autograds(case, shape):
    judged(case, shape)


@pytest.mark.parametrize("case", [case for case, (_, objective) in CASES.items() if objective.prefixes is None])
def test_gradients_of_a_dense_code_are_autograds(case, dense_way, monkeypatch):
    monkeypatch.setattr(crossovers, "CHUNK", 2 * 100 * 10)  # 10 rows a chunk, a ragged last one
    judged(case, (57, 33, 100))


@pytest.mark.parametrize("crossover", [0.11, -1.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("case", ["step", "target of f"])
def test_gradients_where_all_thresholds_are_negative_are_autograds(case, crossover, monkeypatch):
    monkeypatch.setitem(crossovers.CROSSOVER, "step", crossover)
    judged(case, (57, 33, 100), lambda sae: sae.threshold.sub_(2.0))


def judged(case: str, shape: tuple[int, int, int], change: Callable[[Any], Any] = lambda sae: None) -> None:
    judge = Judge()
    for seed in seeds(shape[2]):
        step = problem(case, *shape, seed=10 * seed)
        with torch.no_grad():
            change(step.sae)
        found, torchs, exact = step.by_engine(), step.by_autograd(torch.float32), step.by_autograd(torch.float64)
        for name, value in found.items():
            judge.add(name, value, torchs[name], exact[name])
        for name in set(exact) - set(found):  # a parameter that the objective gives no gradient
            assert not exact[name].any(), name
    judge.verdict()
