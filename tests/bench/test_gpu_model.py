"""The cost model of the GPU's kernels, against the committed profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers import PATIENCE

from benchmarks import plots
from benchmarks.gpu import cuts, goals, model, predict, sass
from benchmarks.gpu.profile import read

COUNTS, RUNS = model.counts_of(model.RUN), read(model.RUN / "profile.txt")
ASSEMBLY = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   FFMA R3, R3, R3, R3 ;
        /*0040*/                   FFMA R3, R3, R3, R3 ;
        /*0050*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0060*/              @P0 BRA `(.L_x_0) ;
        /*0070*/                   FADD R3, R3, R3 ;
        /*0080*/              @!P1 STG.E desc[UR6][R4.64], R3 ;
        /*0090*/                   EXIT ;
.L_x_1:
        /*00a0*/                   BRA `(.L_x_1);
        /*00b0*/                   NOP;
"""


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.precision}, {run.shape}")
def test_every_kernel_above_a_tenth_of_a_millisecond_is_explained_within_a_quarter(run):
    rows = {row.name: row for row in model.compare([run], COUNTS, model.Machine())}
    assert {name for name, ms in run.kernels.items() if ms > 0.1} <= rows.keys()
    for row in rows.values():
        assert row.predicted == pytest.approx(row.measured, rel=0.25), row


def test_instructions_are_counted_by_loop_outside_and_after_the_product():
    assert sass.count(ASSEMBLY) == ((6,), 5, 8)


@pytest.mark.slow
def test_the_kernels_of_this_tree_are_counted():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.sass"], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    found, known = json.loads(done.stdout), json.loads((cuts.NOW / "kernels.json").read_text("utf-8"))
    assert found.keys() == sass.WANTED.keys() <= COUNTS.keys()
    for name, it in found.items():
        assert it["loops"] and it["outside"] > 0 and (it["epilogue"] > 0) == name.startswith("screen"), name
        for what in ("registers", "outside", "epilogue"):
            want = pytest.approx(known[name][what], rel=0.25)
            assert it[what] == want, f"{name}: python -m benchmarks.gpu.sass > benchmarks/gpu/kernels.json"
    assert found["screen"]["epilogue"] <= 220 and found["screen of wide rows"]["epilogue"] <= 400, "it only compares"


def test_more_of_anything_takes_no_less_time_and_a_cut_saves():
    here, (large, *_) = model.Machine(), RUNS
    for kernel in model.step(large.shape, large.precision, COUNTS, here):
        before = model.cost(kernel, here).total
        for n, phase in enumerate(kernel.phases):
            for resource in phase._fields:
                more = phase._replace(**{resource: 3 * getattr(phase, resource)})
                phases = [*kernel.phases[:n], more, *kernel.phases[n + 1 :]]
                assert model.cost(kernel._replace(phases=phases), here).total >= before
    assert all(ms > 0 for ms in cuts.saved(large, COUNTS, here).values())


ROWS = plots.read(model.RUN / "results.csv")
MEASURED = goals.figures(ROWS)


@pytest.mark.parametrize("at", [goals.LARGE, goals.SMALL], ids=str)
def test_a_dense_step_and_ours_memory_are_as_measured(at):
    """What is taken for kinds that were never measured, where it was."""
    at_ = str(at)
    product = MEASURED["step", goals.PRODUCT, "time", at_]
    dense = predict.dense("gated", at, product, model.Machine())
    assert dense == pytest.approx(MEASURED["step", "compiled_bf16", "time", at_], rel=0.2)
    assert predict.peak(at) / 2**20 == pytest.approx(MEASURED["step", goals.OURS, "peak_memory", at_], rel=0.2)


def test_a_prediction_is_what_was_measured_less_the_cuts_that_are_made(monkeypatch):
    run, here = RUNS[0], model.Machine()
    none = [cut._replace(made=False) for cut in cuts.CUTS]
    monkeypatch.setattr(cuts, "CUTS", none)
    assert predict.gated(run, COUNTS, here) == run.total
    before = predict.largest(run, COUNTS, here)
    assert before > run.total, "momentum visits every row"
    monkeypatch.setattr(cuts, "CUTS", [cut._replace(made=True) for cut in none])
    assert predict.gated(run, COUNTS, here) == pytest.approx(run.total - sum(cuts.saved(run, COUNTS, here).values()))
    assert predict.largest(run, COUNTS, here) < before


def test_the_printed_goals_show_a_miss_as_a_miss(monkeypatch):
    """Every goal of a step at uniform frequencies has a prediction, but for sparsify's."""
    asked = [it for it in goals.reach(predict.figures(ROWS)) if it.frequencies == "uniform" and it.goal.numerator != "best"]
    assert {it.goal.numerator for it in asked if not it.verdict} == {"sparsify"}
    slow = predict.gated
    monkeypatch.setattr(predict, "gated", lambda *of: 100 * slow(*of))
    (exact, *_) = (it for it in goals.reach(predict.figures(ROWS)) if it.goal.label == "exact step ÷ bare bf16 product")
    assert exact.verdict == "not met"
    cells = list(model.reached().columns[-1].cells)
    assert "not met" in cells and len(cells) >= 17
