"""Each peer passes the gate, one that is set up wrongly does not, and the trainings of the time to quality agree.

Only in the environment that `make test` builds for the peers.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("dictionary_learning", reason="the peers are in an environment of their own: make test-peers builds it")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import gate, machine
from benchmarks.cases import CASES
from benchmarks.cases.step import L1, SETTINGS
from benchmarks.data import Shape, Superposition, world
from benchmarks.peers import PACKAGES, dictionary_learning_loop, quality, quality_kinds
from benchmarks.peers.__main__ import PROVIDERS, jobs
from benchmarks.peers.dictionary_learning import trainer_of
from benchmarks.peers.handover import hand_over
from benchmarks.peers.trainers import KINDS
from sae_fast.runs.train import Recipe

TINY = Shape(B=33, d=20, F=100, l0=6)
SHAPES = (TINY, Shape(B=130, d=63, F=513, l0=16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("job", list(jobs(quick=True)), ids=lambda job: job.case.name)
def test_every_peer_passes_the_check(job, shape):
    faults, skipped = gate.sift(job.case, world(shape).head(rows=64, batches=3), job.case.choose(job.providers))
    assert not faults
    assert not skipped


def test_every_peer_has_a_case():
    assert set(PACKAGES) < {name for providers in PROVIDERS.values() for name in providers}


@pytest.mark.parametrize("schedule", [dict(warmup_steps=1000), dict(sparsity_warmup_steps=2000)], ids=str)
def test_a_peer_left_on_its_own_schedule_is_found_wrong(schedule):
    def start(sae):
        trainer = trainer_of(sae, SETTINGS["lr"], L1, **schedule)
        return lambda x: trainer.update(0, x)

    case = replace(CASES["step"], providers={})
    case.provider("wrong")(start)
    faults, _ = gate.sift(case, world(TINY).head(rows=33, batches=3), case.providers)
    assert list(faults) == ["wrong"]


def test_a_handed_over_parameter_keeps_the_peers_layout_and_is_seen_from_both_sides():
    ours, theirs = nn.Parameter(torch.rand(5, 3)), nn.Parameter(torch.zeros(3, 5))
    values, address = ours.detach().clone(), theirs.data_ptr()
    hand_over(ours, theirs, transposed=True)
    assert torch.equal(theirs, values.T)
    assert theirs.is_contiguous()
    assert theirs.data_ptr() == ours.data_ptr() == address
    with torch.no_grad():
        theirs.mul_(2)
    assert torch.equal(ours, 2 * values)
    with pytest.raises(ValueError, match="shape"):
        hand_over(ours, nn.Parameter(torch.zeros(3, 5)))


# ---- time to quality ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    recipe = Recipe(d_sae=128, batch_size=64, steps=20, init_l0=6, device="cpu")
    source = Superposition(d=24, features=128, active=4, seed=0)
    batches = [source.batch(recipe.batch_size) for _ in range(recipe.steps)]
    runs = quality.start_runs(torch.cat(batches).mean(0), batches[0], recipe)
    quality.train(runs, batches, source.batch(256), recipe.steps, progress=False)
    return runs


def test_curves_are_equal_step_by_step(runs):
    by = {run.name: run for run in runs}
    for start in (quality.ZERO, quality.CALIBRATED):
        ours, theirs = by[f"{quality.OURS}, {start}"].curve, by[f"{quality.THEIRS}, {start}"].curve
        assert [p.step for p in ours] == [p.step for p in theirs] == quality.evaluation_steps(20)
        for a, b in zip(ours, theirs, strict=True):
            assert a.fvu == pytest.approx(b.fvu, rel=1e-3)
            assert a.l0 == pytest.approx(b.l0, rel=1e-2)
            assert a.density == pytest.approx(b.density, rel=1e-2)
        assert ours[-1].fvu < ours[0].fvu
        assert all(a.seconds < b.seconds for a, b in itertools.pairwise(ours))


def test_the_starts_are_half_dense_and_calibrated(runs):
    density = {run.start: run.curve[0].density for run in runs}
    assert density[quality.ZERO] == pytest.approx(0.5, abs=0.1)
    assert density[quality.CALIBRATED] == pytest.approx(6 / 128, rel=0.5)


def test_a_target_is_reached_when_fvu_and_l0_both_are(runs):
    points = [(0, 0.0, 0.9, 50.0), (1, 1.0, 0.5, 40.0), (2, 2.0, 0.5, 20.0), (3, 3.0, 0.3, 20.1)]
    curve = [quality.Point(*p, density=0.1) for p in points]
    run = replace(runs[0], curve=curve)
    assert run.first_as_good(0.5, 20.0) == curve[2]
    assert run.first_as_good(0.3, 20.0) == curve[3]  # within 1 %
    assert run.first_as_good(0.1, 20.0) is None
    slow = replace(run, curve=[p._replace(seconds=10 * p.seconds) for p in curve])
    end = quality.targets(quality.Pair("", run, slow, 4))[-1]
    assert (end.theirs_seconds, end.ours_seconds, end.times_sooner) == (30.0, 3.0, 10.0)


def test_what_is_written(runs, tmp_path):
    quality.write(runs, quality.pairs(runs), {"device": machine.device()}, tmp_path / "quality")
    quality.draw(runs, tmp_path / "quality.png")
    with (tmp_path / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(quality.evaluation_steps(20))
    result = json.loads((tmp_path / "quality.json").read_text())
    assert len(result["pairs"]) == 3
    assert all(len(pair["targets"]) == 4 for pair in result["pairs"].values())
    assert (tmp_path / "quality.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What a quick run of the kinds that keep the largest writes: its folder, and its pairs and curves."""
    out = tmp_path_factory.mktemp("quality")
    kinds = [argument for kind in quality_kinds.OF_K for argument in ("--kind", kind)]
    result = CliRunner().invoke(quality_kinds.app, ["--quick", *kinds, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with (out / "quality_kinds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return out, json.loads((out / "quality_kinds.json").read_text()), rows


def test_curves_of_the_kinds_that_keep_the_largest_are_equal_step_by_step(written):
    out, found, rows = written
    assert quality_kinds.OF_K == tuple(found["pairs"]) == ("topk", "batchtopk", "matryoshka")
    for kind in quality_kinds.OF_K:
        ours, theirs = (
            [row for row in rows if (row["provider"], row["start"]) == (provider, kind)]
            for provider in (quality.OURS, quality.THEIRS)
        )
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert float(a["fvu"]) == pytest.approx(float(b["fvu"]), rel=1e-3)
            assert float(a["l0"]) == pytest.approx(found["about"]["task"]["k"], rel=1e-2) == float(b["l0"])
        assert float(ours[-1]["fvu"]) < float(ours[0]["fvu"])
    assert (out / "quality_kinds.png").stat().st_size > 10_000


def test_a_kind_that_is_penalised_has_no_place_there():
    result = CliRunner().invoke(quality_kinds.app, ["--quick", "--kind", "gated"])
    assert result.exit_code == 2 and "got gated, want one of topk, batchtopk, matryoshka" in " ".join(result.output.split())


# ---- the package's own loop -----------------------------------------------------------------------------------------


def test_the_loop_runs_every_kind_from_its_starts_and_leaves_figures(tmp_path):
    result = CliRunner().invoke(
        dictionary_learning_loop.app, ["--quick", "--out", str(tmp_path / "f")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "f").read_text())["results"]
    assert [each["kind"] for each in found] == [kind for kind, about in KINDS.items() for _ in about.starts]
    for each in found:
        assert list(each["ratios"])[-1] == f"0–{each['task']['steps']}"
        assert all(ratio > 0 for ratio in each["ratios"].values())
        first = each["l0"]["0"]
        if each["kind"] in quality_kinds.OF_K:
            assert first == each["task"]["k"]
        else:  # of 1024: half of all, or calibrated to 16
            assert first < 40 if each["start"].startswith("calibrated") else first > 300


def test_a_kind_that_is_not_there_is_refused():
    result = CliRunner().invoke(dictionary_learning_loop.app, ["--kind", "sparse"])
    assert result.exit_code == 2 and "got sparse, want one of gated, standard, april" in " ".join(result.output.split())
