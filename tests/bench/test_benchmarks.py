"""The benchmarks: every provider passes its check, what is wrong has no figure, and the CSV is what it should be."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import __main__ as main
from benchmarks import candidates, crossover, gate, machine, memory, plan, plots, results, runner
from benchmarks.cases import CASES, kinds
from benchmarks.cases.floors import step_bytes
from benchmarks.cases.step import SETTINGS
from benchmarks.data import FULL, SMALL, Shape, mean_l0, world
from benchmarks.registry import OURS, Goal
from sae_fast import TopKSAE
from sae_fast.objectives import L0, Matryoshka, TopK
from sae_fast.ops import crossovers
from sae_fast.train.eager import EagerTrainer

TINY = Shape(B=33, d=20, F=100, l0=6)
SHAPES = (TINY, TINY.dense, Shape(B=130, d=63, F=513, l0=16))


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """A cache to evict that takes no time."""
    monkeypatch.setattr(machine, "cache_bytes", lambda: 2**16)


def planted(name, providers, **flags):
    """The case of that name, with only ours and these providers."""
    case = replace(CASES[name], providers={OURS: CASES[name].providers[OURS]})
    for provider, start in providers.items():
        case.provider(provider, **flags)(start)
    return case


# ---- correctness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_every_provider_passes_the_check(case, shape):
    faults, skipped = gate.sift(case, world(shape).head(rows=64, batches=3), case.choose(quick=True))
    assert not faults
    assert not skipped
    assert OURS in case.providers


def wrong_l1(sae):
    return EagerTrainer(sae, **{**SETTINGS, "l1_coefficient": 1.1 * SETTINGS["l1_coefficient"]}).step


def wrong_rate(sae):
    return EagerTrainer(sae, **{**SETTINGS, "lr": 1.01 * SETTINGS["lr"]}).step


def wrong_beta(sae):
    return EagerTrainer(sae, **{**SETTINGS, "betas": (0.0, 0.99)}).step


def no_projection(sae):
    trainer = EagerTrainer(sae, **SETTINGS)

    def step(x):
        trainer.optimizer.zero_grad()
        loss = trainer.loss(x, *(getattr(sae, n) for n in ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")), 1.0)
        loss.backward()
        trainer.optimizer.step()

    return step


def no_step(sae):
    return lambda x: None


def non_finite(sae):
    def step(x):
        with torch.no_grad():
            sae.b_gate[0] = float("nan")

    return step


@pytest.mark.parametrize("wrong", [wrong_l1, wrong_rate, wrong_beta, no_projection, no_step, non_finite])
def test_the_check_finds_a_wrong_step(wrong):
    case = planted("step", {"wrong": wrong})
    faults, _ = gate.sift(case, world(TINY).head(rows=33, batches=3), case.providers)
    assert list(faults) == ["wrong"]


WRONG_KINDS = {
    "gated": dict(settings=kinds.MOMENTUM | dict(betas=(0.8, 0.999))),
    "topk": dict(settings=kinds.CLIPPED | dict(grad_clip=None)),
    "topk_dead": dict(dead=False),
    "batchtopk": dict(layer=kinds.grouped(TopKSAE)),
    "matryoshka": dict(objective=lambda sae: Matryoshka(TopK(), fractions=kinds.FRACTIONS[::-1])),
    "jumprelu": dict(objective=lambda sae: L0(target=kinds.l0_of(sae), bandwidth=kinds.BANDWIDTH, positive=False)),
}


@pytest.mark.parametrize("name, changes", WRONG_KINDS.items(), ids=list(WRONG_KINDS))
def test_the_check_finds_a_wrong_step_of_a_kind(name, changes):
    case = planted(f"kind_{name}", {"wrong": replace(kinds.STEPS[name], **changes).start})
    faults, _ = gate.sift(case, world(TINY).head(rows=33, batches=3), case.providers)
    assert list(faults) == ["wrong"]


def test_the_check_finds_a_wrong_shape_and_a_missing_outcome():
    assert "shape" in gate.fault("w", torch.zeros(2), torch.zeros(3), torch.zeros(3))
    assert gate.fault("w", torch.zeros(0), torch.zeros(0), torch.zeros(0)) is None
    assert gate.fault("w", torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.0])) is None
    assert gate.fault("w", torch.tensor([1.001]), torch.tensor([1.0]), torch.tensor([1.0])) is not None


def test_a_wrong_provider_leaves_its_case_without_figures(monkeypatch, tmp_path):
    wrong = planted("decode", {"wrong": lambda sae: lambda e: 1.001 * (e.f @ sae.W_dec.detach())})
    measurement = runner.measure(wrong, TINY, rounds=1)
    assert list(measurement.faults) == ["wrong"]
    assert not measurement.seconds
    assert results.rows(measurement, {}) == []

    monkeypatch.setitem(CASES, "decode", wrong)
    out = tmp_path / "out.csv"
    run = CliRunner().invoke(
        main.app,
        ["--quick", "--rounds", "1", "--no-pictures", "--case", "decode", "--case", "transpose", "--out", str(out)],
    )
    assert run.exit_code == 1
    assert "wrong is wrong" in run.output
    with out.open(newline="") as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"transpose"}


def fails(sae):
    raise RuntimeError("no compiler here")


def test_an_optional_provider_that_fails_is_skipped_with_its_reason():
    measurement = runner.measure(planted("decode", {"absent": fails}, optional=True), TINY, rounds=2)
    assert measurement.skipped == {"absent": "RuntimeError: no compiler here"}
    assert list(measurement.seconds) == [OURS]


def test_any_other_provider_that_fails_is_a_fault():
    measurement = runner.measure(planted("decode", {"broken": fails}), TINY, rounds=2)
    assert measurement.faults == {"broken": ["RuntimeError: no compiler here"]}
    assert not measurement.seconds


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_every_provider_sees_every_batch():
    calls = []
    case = replace(CASES["step"], providers={})
    for name in ("a", "b", "c"):
        case.provider(name, floor=True)(lambda sae, name=name: lambda x: calls.append((name, id(x))))
    measurement = runner.measure(case, TINY, rounds=8)
    assert {name: len(seconds) for name, seconds in measurement.seconds.items()} == {"a": 8, "b": 8, "c": 8}
    timed = calls[3 * runner.WARM_UP :]
    rounds = [timed[k : k + 3] for k in range(0, 24, 3)]
    assert all({name for name, _ in turn} == {"a", "b", "c"} for turn in rounds)
    assert all(len({batch for _, batch in turn}) == 3 for turn in rounds)
    assert len({tuple(name for name, _ in turn) for turn in rounds}) > 1
    assert all(len({batch for name, batch in timed if name == one}) == 8 for one in "abc")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_world_is_as_sparse_as_its_shape_says(shape):
    here = world(shape)
    l0 = sum(mean_l0(here.sae, x) for x in here.batches) / len(here.batches)
    assert l0 == pytest.approx(shape.l0, rel=0.1)


@pytest.mark.slow
def test_peak_memory_counts_what_a_step_needs_and_not_what_it_keeps():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is measured on Linux only")
    shape = Shape(B=512, d=64, F=4096, l0=16)
    dense = 4 * shape.B * shape.F  # bytes of one [B, F]
    eager = min(memory.peak_bytes("step", "eager", shape))
    assert 4 * dense < eager < 16 * dense
    assert 0 < max(memory.peak_bytes("step", OURS, shape)) < eager
    with pytest.raises(ValueError, match="nobody"):
        memory.peak_bytes("step", "nobody", shape)


# ---- the CSV and the command line -----------------------------------------------------------------------------------


def test_quick_prints_the_table_and_writes_the_csv(tmp_path):
    out = tmp_path / "new" / "out.csv"
    run = CliRunner().invoke(
        main.app, ["--quick", "--rounds", "2", "--case", "decode", "--case", "encode", "--out", str(out)]
    )
    assert run.exit_code == 0, run.output
    assert "decode (forward)" in run.output
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == [
        "case", "provider", "mode", "metric", "unit", "x", "p50", "p20", "p80", "device", "versions", "commit", "time",
    ]  # fmt: skip
    timed = {(row["case"], row["provider"]) for row in rows if row["metric"] == "time"}
    wanted = {(name, p) for name in ("decode", "encode") for p in CASES[name].choose(quick=True)}
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        wanted.remove(("encode", "bf16_product"))  # a floor that this processor does not have
    assert timed == wanted
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert row["unit"] == results.UNITS[row["metric"]]
        assert "torch" in row["versions"]
        assert "threads" in row["device"]
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["ops.png"]


@pytest.mark.parametrize("option", ["--case", "--provider"])
def test_an_unknown_name_is_refused(option):
    run = CliRunner().invoke(main.app, [option, "nothing"])
    assert run.exit_code == 2
    assert "nothing" in run.output


def test_writing_replaces_the_same_figure_and_keeps_the_others(tmp_path):
    out = tmp_path / "out.csv"
    row = results.Row("a", "p", "train", "time", "ms", "B=1", 1.0, 1.0, 1.0, "cpu", "torch", "c", "now")
    results.write(out, [row, replace(row, provider="q")])
    results.write(out, [replace(row, p50=2.0)])
    with out.open(newline="") as file:
        assert [(r["provider"], float(r["p50"])) for r in csv.DictReader(file)] == [("p", 2.0), ("q", 1.0)]


def test_percentiles():
    assert results.percentiles([5.0]) == (5.0, 5.0, 5.0)
    assert results.percentiles([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((2.5, 1.0, 4.0))


def test_goals():
    assert Goal("", "time", "a", "b").at == FULL
    assert Goal("", "time", "a", "b", at_most=1.35).reached(1.35)
    assert not Goal("", "time", "a", "b", at_most=1.35).reached(1.36)
    assert Goal("", "time", "a", "b", at_least=7).reached(7.0)
    assert not Goal("", "time", "a", "b", at_least=7).reached(float("nan"))


def test_a_goal_is_judged_at_its_own_shape():
    goals = [Goal(f"goal at {at}", "time", OURS, "bare_product", at_most=1e9, at=at) for at in (TINY, FULL)]
    case = replace(CASES["encode_sparse"], goals=tuple(goals))
    measurement = runner.measure(case, TINY, rounds=1, names=[OURS, "bare_product"])
    with (console := Console(width=200)).capture() as printed:
        results.show(console, measurement, results.rows(measurement, {}))
    assert f"goal at {TINY}" in printed.get()
    assert "reached" in printed.get()
    assert f"goal at {FULL}" not in printed.get()


def test_names_are_unique():
    with pytest.raises(ValueError, match="already"):
        CASES["step"].provider(OURS)(lambda sae: None)


# ---- the plan, floors, candidates and crossovers ---------------------------------------------------------------------


def test_the_sweep_varies_one_size_at_a_time_and_repeats_nothing_of_the_full_run():
    shapes = plan.around(FULL)
    assert len(set(shapes)) == len(shapes)
    assert all(len(plots._differs(FULL, shape)) <= 1 for shape in shapes)
    assert sorted({shape.B for shape in shapes}) == [256, 512, 1024, 2048, 4096, 8192]
    assert sorted({shape.d for shape in shapes}) == [192, 384, 768, 1536]
    assert sorted({shape.F for shape in shapes}) == [6144, 12288, 24576, 49152]
    assert sorted({shape.l0 for shape in shapes}) == [11.5, 46, 184, 736, 2944, 12288]
    full, swept = ([(job.case.name, job.shape) for job in jobs] for jobs in (plan.full(), plan.sweep()))
    assert {("step", FULL), ("step", FULL.dense), ("step", SMALL), ("encode_sparse", FULL)} <= set(full)
    assert not set(full) & set(swept)
    assert set(shapes) == {shape for name, shape in full + swept if name == "encode_sparse"}
    for job in [*plan.full(), *plan.sweep()]:
        assert set(job.providers) <= set(job.case.providers)
        assert OURS in (job.providers or job.case.providers)


@pytest.mark.slow
def test_the_sweep_runs_over_small_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "QUICK", TINY)
    out = tmp_path / "out.csv"
    arguments = ["--quick", "--sweep", "--rounds", "1", "--case", "encode_sparse", "--out", str(out)]
    run = CliRunner().invoke(main.app, arguments)
    assert run.exit_code == 0, run.output
    assert len({row.x for row in plots.read(out)}) > 10
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep.png"]


def test_the_floor_moves_the_bytes_of_a_step():
    assert step_bytes(Shape(B=2, d=4, F=8, l0=1), touched=0) == 4 * 2 * 4 + 2 * 8 * 4
    weights = 100 * 20  # of TINY, when every row is touched
    assert step_bytes(TINY, touched=100) == 4 * 33 * 20 + (2 + 2 + 4 * 8) * weights
    with pytest.raises(ValueError, match="nothing"):
        plots.shape_of("nothing")
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        measurement = runner.measure(CASES["step"], TINY, rounds=2, names=["floor", "bf16_product"])
        assert set(measurement.seconds) == {"floor", "bf16_product"}


def test_the_candidates_contain_the_entries(screened):
    figures = candidates.rows(TINY)
    assert [row.case for row in figures] == ["screen_superposition", "screen_noise", "screen_offset"]
    assert all(1 <= row.p50 < 4 for row in figures)


def test_crossovers():
    assert crossover.meeting([1, 2, 4], [1, 2, 4], [2, 2, 2]) == pytest.approx(2)
    assert crossover.meeting([0.01, 0.04], [1, 4], [2, 2]) == pytest.approx(0.02)
    assert crossover.meeting([1, 2], [3, 4], [1, 1]) == 0
    assert crossover.meeting([1, 2], [1, 1], [3, 3]) == float("inf")
    assert set(crossover.CALLS) == set(crossovers.CROSSOVER)
    committed = dict(crossovers.CROSSOVER)
    for op in committed:
        assert min(crossover.routes(op, TINY, density=0.1, rounds=1)) > 0
    assert committed == crossovers.CROSSOVER


# ---- the pictures ----------------------------------------------------------------------------------------------------


def figures(plan_of, device="cpu, 2 threads", time="2026-01-01T00:00:00+00:00"):
    """A row for everything a plan would measure."""
    made = (device, "torch 2, sae_fast 0", "abc", time)
    return [
        results.Row(job.case.name, name, job.case.mode, metric, results.UNITS[metric], str(job.shape), 3.0, 2.0, 4.0, *made)
        for job in plan_of
        for name in job.providers or job.case.providers
        for metric in ("time", "peak_memory")
    ]


def test_pictures_need_the_csv_only(tmp_path):
    peer = replace(figures(plan.full())[0], case="step", provider="some_peer", mode="train", versions="torch 2, peer 1")
    results.write(tmp_path / "out.csv", [*figures(plan.full()), *figures(plan.sweep()), peer])
    run = CliRunner().invoke(plots.app, [str(tmp_path / "out.csv"), "--out", str(tmp_path / "pictures")])
    assert run.exit_code == 0, run.output
    paths = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in paths] == ["memory.png", "ops.png", "step.png", "sweep.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)
    assert "peer 1" in plots.provenance(plots.read(tmp_path / "out.csv"))


def test_pictures_never_mix_two_machines(tmp_path):
    old = figures(plan.full(), device="old", time="2025-01-01T00:00:00+00:00")
    results.write(tmp_path / "out.csv", [*old, *figures(plan.quick())])
    rows = plots.read(tmp_path / "out.csv")
    assert {row.device for row in rows} == {"cpu, 2 threads"}
    assert str(plots.headline(rows)) == "B=256 d=64 F=1024 L0=16"
    assert plots.headline(figures(plan.full())) == FULL
    with pytest.raises(ValueError, match="no rows"):
        (tmp_path / "empty.csv").write_text(",".join(results.COLUMNS) + "\n")
        plots.read(tmp_path / "empty.csv")
