"""`make gpu` without a GPU: it says so; and its parts, with the host's clock in place of the device's."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from math import isnan, nan
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers import PATIENCE, wait_until

sys.path.insert(0, str(Path(__file__).parents[2]))

import benchmarks.gpu.__main__ as command
from benchmarks import plots
from benchmarks.cases import CASES
from benchmarks.cases.step import L1, SETTINGS, by_autograd
from benchmarks.data import Shape, mean_l0
from benchmarks.gpu import cases, environment, measure, rivals, tune, world
from benchmarks.gpu.budget import RESERVE, Budget
from benchmarks.registry import OURS
from sae_fast.kernels import _config

ROOT = Path(__file__).parents[2]
TINY = Shape(B=96, d=24, F=200, l0=6)
NEVER = float("inf")


@pytest.fixture(autouse=True)
def fresh_worlds():
    yield
    world.world.cache_clear()
    cases.true_losses.cache_clear()


def tiny(frequencies="uniform", shape=TINY):
    return world.world(shape, frequencies, "cpu", batches=3)


def job(*contenders, **flags):
    return measure.Job("step", "train", TINY, "uniform", contenders, **{"needs": 0.0, **flags})


def running(run=lambda x: None, **arguments):
    return lambda here: measure.Running(run, here.batches, **arguments)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1 and "no NVIDIA GPU" in found.stderr
    assert not found.stdout and not (tmp_path / "out").exists()


def test_every_part_has_a_share_and_the_last_one_what_is_left():
    now = [0.0]
    budget = Budget(480.0, lambda: now[0])
    tests = budget.share("tests", last=False)
    assert tests == pytest.approx(0.45 * (480 - RESERVE))
    now[0] += tests
    assert 0.1 < budget.share("sanitizer", last=False) / (480 - RESERVE) < 0.15
    assert budget.share("bench", last=True) == pytest.approx(480 - RESERVE - tests)
    assert budget.share("tune", last=True) == budget.left - RESERVE
    now[0] = 500.0
    assert budget.left == 0.0 and budget.share("bench", last=True) == 0.0


def test_a_part_that_does_not_end_is_stopped_with_all_it_started(tmp_path):
    assert command.run([sys.executable, "-c", ""], 20) == ""
    assert command.run([sys.executable, "-c", "raise SystemExit(3)"], 20) == "exit code 3"
    child = f"import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep({PATIENCE})"
    start = f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); p.wait()"
    script = tmp_path / "stuck.py"
    script.write_text(f"import sys; sys.stdout = open({str(tmp_path / 'pid')!r}, 'w')\nimport subprocess\n{start}\n")
    started = tmp_path / "pid"
    for seconds in (1.5, 15.0, 150.0):  # until a busy machine has started both
        start = time.monotonic()
        assert command.run([sys.executable, str(script)], seconds) == command.STOPPED
        assert time.monotonic() - start < PATIENCE
        if started.exists() and started.read_text():
            break
    wait_until(lambda: _ended(int(started.read_text())))


def _ended(pid: int) -> bool:
    """Whether the process has; a zombie has."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def test_tests_that_are_interrupted_leave_what_they_had(tmp_path):
    (tmp_path / "test_triton_slow.py").write_text(
        "import time, pytest\n"
        "def test_fine(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='not today')\ndef test_skipped(): pass\n"
        "def test_wait(): time.sleep(2.1)\n"
        f"def test_stuck(): time.sleep({PATIENCE})\n"
    )
    (tmp_path / "test_other.py").write_text("def test_of_the_host(): raise AssertionError\n")
    xml = tmp_path / "tests.xml"
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.live", "--live-xml", xml, "-p", "no:cacheprovider",
         "--rootdir", tmp_path, tmp_path], cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    wait_until(lambda: xml.exists() and len(ElementTree.parse(xml).getroot()[0]) == 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    suite = ElementTree.parse(xml).getroot()[0]
    assert {case.get("name") for case in suite} == {"test_fine", "test_wrong", "test_skipped", "test_wait"}
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "1")
    assert suite.get("complete") == "false"
    assert "assert 1 == 2" in next(case for case in suite if case.get("name") == "test_wrong").find("failure").get(
        "message"
    )


@pytest.mark.parametrize(
    ("states", "failures", "fault", "code"),
    [
        ({"tests": "", "bench": ""}, 0, False, 0),
        ({"tests": "", "bench": command.STOPPED}, 0, False, 0),
        ({"tests": command.STOPPED, "bench": ""}, 0, False, 1),
        ({"tests": "", "bench": "exit code 1"}, 0, False, 1),
        ({"tests": "exit code 1", "bench": ""}, 2, False, 1),
        ({"tests": "", "bench": ""}, 0, True, 1),
        ({"tests": "", "run": "interrupted"}, 0, False, 1),
    ],
)
def test_the_summary_and_the_exit_code(tmp_path, capsys, states, failures, fault, code):
    suite = f'<testsuite tests="5" failures="{failures}" errors="0" skipped="1" complete="true"/>'
    (tmp_path / "tests.xml").write_text(f"<testsuites>{suite}</testsuites>")
    sink = measure.Sink(tmp_path / "results.csv", device="gpu")
    for provider, ms in ((OURS, 9.0), (cases.PRODUCT, 3.0), ("compiled_bf16", 30.0)):
        sink.add("step", provider, "train", "time", cases.LARGE, [ms])
    if fault:
        sink.add("step", cases.OURS_BF16, "train", "fault", cases.LARGE, [nan], "loss: got 2, want 1")
    assert command.finish(tmp_path, states) == code
    text = (tmp_path / "summary.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    if "bench" in states:
        assert "exact step ÷ bare bf16 product, uniform" in text and "not met" not in text and "not measured" in text
        assert ("loss: got 2, want 1" in text) == fault
        assert [row.metric for row in measure.Sink(tmp_path / "results.csv", append=True).rows].count("goal") == 2
        assert (tmp_path / "step.png").exists()


# ---- the environment ------------------------------------------------------------------------------------------------


def test_an_environment_is_made_of_what_is_there(tmp_path):
    python = environment.make(venv=tmp_path / "venv")
    code = (
        "import json, sys, torch, sae_fast, sae_fast.kernels._config as c\n"
        "from benchmarks.gpu import environment as e\n"
        "print(json.dumps([sys.prefix, sae_fast.__file__, c.__file__, e.installed()]))"
    )
    found = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    prefix, package, config, installed = json.loads(found.stdout)
    assert (prefix, installed) == (str(tmp_path / "venv"), True)
    assert Path(package).parent == ROOT / "sae_fast" and Path(config).parent == ROOT / "kernels"
    assert environment.installed()
    assert environment.make(venv=tmp_path / "venv") == python  # again, on what is there


def test_an_engine_that_is_newer_than_its_sources_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    said = "import os; raise SystemExit('error: no compiler here, ' + os.environ['SAE_FAST_CUDA'])"
    monkeypatch.setattr(environment, "BUILD", said)
    monkeypatch.setattr(environment, "BUILD_CUDA", said)
    monkeypatch.setattr(environment, "_output", lambda *_: ".so")
    (tmp_path / "sae_fast").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("")
    failed = {"_C": "error: no compiler here, 0", "_C_cuda": "error: no compiler here, 1"}
    assert environment.build(Path(sys.executable), 60) == failed
    (tmp_path / "sae_fast" / "_C.so").write_text("")
    assert environment.build(Path(sys.executable), 60) == failed | {"_C": None}
    (tmp_path / "sae_fast" / "_C_cuda.so").write_text("")
    assert environment.build(Path(sys.executable), 60) == {"_C": None, "_C_cuda": None}


def test_without_nvcc_the_cuda_kernels_are_not_built_and_why_is_one_line(monkeypatch, tmp_path):
    """The script itself, in a folder that holds no engine."""
    for name in ("sae_fast", "csrc"):
        (tmp_path / name).mkdir()
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = environment._build(Path(sys.executable), "_C_cuda", environment.BUILD_CUDA, "1", 60)
    assert found == "SAE_FAST_CUDA=1: no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda"


def test_the_machine_is_described():
    about = environment.describe()
    assert json.loads(json.dumps(about)) == about
    assert about["torch"] == torch.__version__ and {"date", "commit", "dirty", "python", "cuda", "triton"} <= set(about)


# ---- the world ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frequencies", world.FREQUENCIES)
def test_the_world_is_as_sparse_as_its_shape_says(frequencies):
    shape = Shape(B=1024, d=64, F=1024, l0=16)
    here = tiny(frequencies, shape)
    l0 = sum(mean_l0(here.sae, x) for x in here.batches) / len(here.batches)
    assert l0 == pytest.approx(shape.l0, rel=0.25)
    often = torch.bincount(here.sae.encode_sparse(here.batches[0]).indices.long(), minlength=shape.F).double()
    rate = world.rates(shape, frequencies, "cpu")
    assert float(rate.sum()) == pytest.approx(shape.l0, rel=1e-3) and float(rate.max()) <= 0.5
    if frequencies == "zipf":
        assert float(often[:10].mean()) > 20 * float(often[500:].mean())
    assert here.sae.d_sae == shape.F and here.new_sae().W_enc.shape == (shape.F, shape.d)


def test_an_unknown_kind_of_frequencies_is_refused():
    with pytest.raises(ValueError, match="zipf"):
        world.rates(TINY, "normal", "cpu")


# ---- rivals and ours ------------------------------------------------------------------------------------------------


def outcomes(make, here, steps=3):
    one = make(here.new_sae())
    losses = [float(one(x)) for x in here.batches[:steps]]
    return losses, {name: p.detach().clone() for name, p in one.parameters().items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda sae: rivals.DictionaryLearning(sae, 1e-3, L1),
        lambda sae: rivals.Dense(sae, 1e-3, L1),
        lambda sae: rivals.Dense(sae, 1e-3, L1, "tf32"),
    ],
    ids=["dictionary_learning", "dense", "tf32"],
)
def test_the_rivals_take_the_reference_s_steps(monkeypatch, make):
    monkeypatch.setitem(SETTINGS, "lr", 1e-3)
    here = tiny()
    sae = here.new_sae().double()
    run = by_autograd(sae)
    first = cases.true_losses(here)[0]
    for x in here.batches:
        run(x.double())
    losses, got = outcomes(make, here)
    assert losses[0] == pytest.approx(first, rel=1e-5)
    start = dict(here.sae.named_parameters())
    for name, p in sae.named_parameters():
        moved = (p.detach() - start[name].detach().double()).norm()
        # Adam at β₁ = 0 turns a gradient that is rounding into a whole step: few of them, and not the rest.
        assert float((got[name].double() - p.detach()).norm()) <= 0.02 * float(moved), name


def test_every_contender_passes_its_own_check():
    here = tiny()
    for start in (
        *(cases.step(precision) for precision in ("exact", "bf16")),
        *(cases.encode(precision) for precision in ("exact", "bf16")),
        cases.rival(lambda sae: rivals.Dense(sae, SETTINGS["lr"], L1, "bf16"), "bf16"),
        *(cases.op(name) for name in cases.OPS),
        cases.product(torch.bfloat16), cases.copy, cases.gather,
    ):  # fmt: skip
        it = start(here)
        assert it.check() == []
        it.run(it.inputs[0])


def test_a_wrong_loss_or_support_is_found():
    here = tiny()
    assert cases.wrong_losses(here, {"loss": cases.true_losses(here)[0] * 1.001}, 1e-4)
    assert cases.wrong_losses(here, {"loss": nan}, 1e-4)
    x, sae = here.batches[0], here.sae
    code = sae.encode_sparse(x)
    assert not cases.wrong_support(sae, x, code, "exact")
    shifted = code.indices.clone()
    shifted[0] = shifted[0] + 1 if shifted[0] + 1 != shifted[1] else shifted[0] - 1
    assert cases.wrong_support(sae, x, replace(code, indices=shifted), "exact")


# ---- the runner -----------------------------------------------------------------------------------------------------


def test_rows_are_on_the_disk_at_once_and_outlive_an_interruption(tmp_path):
    path = tmp_path / "results.csv"

    def interrupted(here):
        with path.open(newline="") as file:
            assert [row["provider"] for row in csv.DictReader(file)] == ["a", "a"]
        raise KeyboardInterrupt

    sink = measure.Sink(path, device="gpu")
    jobs = [
        job(measure.Contender("a", running(moved=10**6))),
        job(measure.Contender("b", interrupted), measure.Contender("c", running())),
    ]
    with pytest.raises(KeyboardInterrupt):
        measure.run(jobs, lambda *_: tiny(), sink, "cpu", NEVER, rounds=3)
    with path.open("a") as file:
        file.write("step,b,train,ti")  # as a killed process may leave it
    again = measure.Sink(path, append=True)
    assert [(row.provider, row.metric, row.unit) for row in again.rows] == [("a", "time", "ms"), ("a", "rate", "GB/s")]
    assert again["step", "a", "time", TINY] > 0 and isnan(again["step", "b", "time", TINY])
    assert len(plots.read(path)) == 2


@pytest.mark.slow
def test_what_is_wrong_or_fails_has_a_row_and_no_time(tmp_path):
    def fails(error):
        def start(here):
            raise error

        return start

    sink = measure.Sink(tmp_path / "results.csv", device="gpu")
    contenders = (
        measure.Contender("fine", running()),
        measure.Contender("wrong", running(check=lambda: ["loss: off"])),
        measure.Contender("broken", fails(RuntimeError("no kernel"))),
        measure.Contender("rival", fails(RuntimeError("no compiler")), optional=True),
        measure.Contender("large", fails(torch.OutOfMemoryError("2 TiB"))),
    )
    measure.run([job(*contenders), job(needs=NEVER)], lambda *_: tiny(), sink, "cpu", PATIENCE, rounds=2)
    found = [(row.provider, row.metric, note) for row, note in zip(sink.rows, sink.notes, strict=True)]
    assert found[:4] == [
        ("wrong", "fault", "loss: off"), ("broken", "fault", "RuntimeError: no kernel"),
        ("rival", "skipped", "RuntimeError: no compiler"), ("large", "skipped", "out of memory"),
    ]  # fmt: skip
    assert found[4][:2] == ("fine", "time")
    assert found[5][:2] == ("all", "skipped") and "want inf" in found[5][2]


def test_rounds_are_interleaved_batches_rotate_and_the_deadline_holds(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE", 10.0)
    calls = []
    runs = {
        name: measure.Running(lambda x, name=name: calls.append((name, x)) or time.sleep(0.011), [0, 1, 2]) for name in "ab"
    }
    found = measure.times(runs, measure.Clock("cpu"), rounds=4, deadline=NEVER)
    assert {name: len(values) for name, values in found.items()} == {"a": 4, "b": 4}
    turns = [calls[k : k + 2] for k in range(2, 10, 2)]
    assert all({name for name, _ in turn} == {"a", "b"} for turn in turns)
    assert {x for name, x in calls[2:] if name == "a"} == {0, 1, 2}
    assert all(len(v) == 1 for v in measure.times(runs, measure.Clock("cpu"), rounds=9, deadline=0.0).values())


@pytest.mark.slow
def test_the_jobs_run_and_are_drawn(tmp_path, monkeypatch):
    """All of them, small and on the CPU; what needs a GPU or a compiler may be missing."""
    monkeypatch.setattr(measure, "SAMPLE", 0.1)
    monkeypatch.setattr(cases, "LARGE", TINY)
    small = replace(TINY, F=100)
    jobs = [replace(one, needs=0.0) for one in cases.jobs(TINY, small) if one.case != "screen"]
    needs_more = ("compiled", "cuda")
    jobs = [replace(one, contenders=tuple(c for c in one.contenders if not c.name.startswith(needs_more))) for one in jobs]
    sink = measure.Sink(tmp_path / "results.csv", device="gpu")
    after = cases.roofline
    measure.run(jobs, lambda shape, kind: tiny(kind, shape), sink, "cpu", 300.0, rounds=2, after=after)
    assert not [note for row, note in zip(sink.rows, sink.notes, strict=True) if row.metric in ("fault", "skipped")]
    timed = {(row.case, row.provider) for row in sink.rows if row.metric == "time"}
    assert {
        ("step", OURS),
        ("step_zipf", cases.OURS_BF16),
        ("encode_sparse", OURS),
        ("step", "dictionary_learning"),
    } <= timed
    assert {(name, OURS) for name in cases.OPS} <= timed
    assert {(name, "triton") for name in cases.TWINS} <= timed
    assert sink["decode_loss", "floor", "floor", TINY] > 0 and sink["decode_loss", OURS, "flops", TINY] > 0
    assert sink["decode_loss", "gather_floor", "floor", TINY] > 0 and sink["weight_step", "gather_floor", "floor", TINY] > 0
    assert "step.png" in [path.name for path in plots.draw(tmp_path / "results.csv", tmp_path)]


def test_a_goal_takes_the_best_compiled_step(tmp_path):
    sink = measure.Sink(tmp_path / "results.csv", device="gpu")
    times = {OURS: 10.0, cases.PRODUCT: 4.0, "compiled_bf16": 30.0, "compiled_bf16_autotuned": 24.0}
    for provider, ms in times.items():
        sink.add("step", provider, "train", "time", cases.LARGE, [ms])
    found = {label: (got, verdict) for label, _, got, verdict in cases.reach(sink)}
    place = f"uniform, {cases.LARGE}"
    assert found[f"exact step ÷ bare bf16 product, {place}"] == (2.5, "met")
    assert found[f"compiled bf16 dense step ÷ exact step, {place}"] == (pytest.approx(2.4), "not met")
    assert found[f"bf16 step ÷ bare bf16 product, {place}"][1] == ""
    sink.add("step_zipf", OURS, "train", "time", cases.LARGE, [8.0])  # dense rivals take as long on any data
    found = {label: got for label, _, got, _ in cases.reach(sink)}
    assert found[f"compiled bf16 dense step ÷ exact step, zipf, {cases.LARGE}"] == pytest.approx(3.0)


# ---- two bodies an op -------------------------------------------------------------------------------------------------


def test_a_contender_s_ops_take_the_bodies_it_names_while_it_runs(monkeypatch):
    from sae_fast.kernels import native

    seen = []
    look = lambda *_: seen.append({ops for ops in native.FASTER.values()}) or []  # noqa: E731

    def start(here):
        look()
        return measure.Running(look, [None], look)

    monkeypatch.setattr(native, "module", object())
    before, ops = dict(native.FASTER), frozenset({"outer", "verify"})
    it = cases.with_bodies(start, ops)(None)
    it.check()
    it.run(None)
    assert seen == [{ops}] * 3 and before == native.FASTER
    monkeypatch.setattr(native, "module", None)
    cases.with_bodies(start, frozenset())(None)  # Triton's are always there
    with pytest.raises(measure.Unavailable, match="_C_cuda is not built"):
        cases.with_bodies(start, ops)(None)


def test_what_is_faster_at_every_shape_earns_its_place_and_then_a_step(tmp_path):
    sink = measure.Sink(tmp_path / "results.csv", device="gpu")
    assert cases.twins(sink) == (frozenset(), ["CUDA bodies beside Triton's: not measured"])
    assert not [j for j in cases.jobs(sink=sink) for c in j.contenders if c.name.endswith("faster_bodies")]
    times = {"decode_loss": (1.2, 1.0), "encode": (1.1, 1.0), "outer": (2.0, 1.0)}
    for case, bodies in times.items():
        for body, ms in zip(("triton", "cuda"), bodies, strict=True):
            sink.add(case, body, "forward", "time", cases.LARGE, [ms])
    sink.add("outer", "triton", "forward", "time", cases.SMALL, [1.0])
    sink.add("outer", "cuda", "forward", "time", cases.SMALL, [1.0])
    earned, lines = cases.twins(sink)
    assert earned == {"decode_loss"} and len(lines) == 5
    assert lines[-1] == "earn a place in kernels/native.FASTER (≥ 1.15 ×): decode_loss"
    assert any(line.startswith("verify ") and "1.10 ×" in line for line in lines)
    steps = [c for j in cases.jobs(sink=sink) for c in j.contenders if c.name.endswith("faster_bodies")]
    assert [c.note for c in steps] == ["cuda: decode_loss"]


def test_the_gathers_goal_is_of_the_faster_body(tmp_path):
    sink = measure.Sink(tmp_path / "results.csv", device="gpu")
    for provider, metric, ms in (("triton", "time", 3.0), ("cuda", "time", 2.0), ("gather_floor", "floor", 1.5)):
        sink.add("decode_loss", provider, "forward", metric, cases.LARGE, [ms])
    found = {label: (got, verdict) for label, _, got, verdict in cases.reach(sink)}
    assert found[f"decode_loss ÷ gathered bytes, uniform, {cases.LARGE}"] == (pytest.approx(4 / 3), "met")


def test_the_kernels_own_tests_run_on_the_gpu_and_the_host_s_do_not():
    wanted = " ".join(command.command("tests", ROOT / "out", 100.0))
    assert "tests/ops/test_cuda_decode_loss.py" in wanted and "tests/ops/test_triton_rows.py" in wanted
    assert "test_cuda_build.py" not in wanted and "test_cuda_shim.py" not in wanted


# ---- compute-sanitizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "code", "says"), [
    (None, 0, ["no compute-sanitizer is installed here"]),
    ("echo ERROR SUMMARY: 0 errors", 0, ["==== memcheck", "ERROR SUMMARY: 0 errors", "==== racecheck"]),
    ("echo ERROR SUMMARY: 3 errors; exit 9", 1, ["ERROR SUMMARY: 3 errors"]),
    (f"sleep {PATIENCE}", 0, ["no result within 1 s"]),
])  # fmt: skip
def test_the_sanitizer_s_report_is_written_and_counts(monkeypatch, tmp_path, script, code, says):
    from benchmarks.gpu import sanitizer

    if script:
        (tmp_path / "compute-sanitizer").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if script else str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    seconds = "2" if says == ["no result within 1 s"] else str(PATIENCE)
    monkeypatch.setattr(sys, "argv", ["sanitizer", "--out", str(tmp_path), "--seconds", seconds])
    assert sanitizer.main() == code
    text = (tmp_path / "sanitizer.txt").read_text()
    assert all(line in text for line in says), text
    assert command.finish(tmp_path, {"sanitizer": command.STOPPED}) == 0
    assert ("SUMMARY" in text) == ("SUMMARY" in (tmp_path / "summary.txt").read_text())


@pytest.mark.slow
def test_what_the_sanitizer_runs_runs(capsys):
    from benchmarks.gpu import sanitizer
    from sae_fast.kernels import native

    before = dict(native.FASTER)
    try:
        sanitizer.small_ops("cpu")
    finally:
        native.FASTER.update(before)
    assert capsys.readouterr().out.startswith("ran ")


# ---- tuning ---------------------------------------------------------------------------------------------------------


def test_whatever_tuning_may_find_can_be_read(tmp_path, monkeypatch):
    for generation in _config.SHIPPED.values():
        for op, shipped in generation.items():
            for key in shipped:
                for value in _config.TRIED.get(key, ()):
                    path = tmp_path / f"{op}-{key}-{value}.json"
                    path.write_text(json.dumps({op: {key: value}}))
                    monkeypatch.setenv("SAE_FAST_TUNING", str(path))
                    assert _config.config(op)[key] == value


@pytest.mark.slow
def test_what_tuning_writes_is_read_back(tmp_path, monkeypatch):
    """The op takes as long as its configuration says: only a right result that is faster by 3 % is kept."""
    out = tmp_path / "tuning.json"
    now = _config.config("sampled_dots")["columns"]
    faster, alike, wrong = (columns for columns in _config.TRIED["columns"] if columns != now)
    milliseconds = {now: 12.0, faster: 8.0, alike: 11.9, wrong: 2.0}
    here = tiny()
    case = CASES["sampled_dots"]

    def start(sae):
        right = case.providers[OURS].start(sae)

        def run(e):
            columns = _config.config("sampled_dots")["columns"]
            time.sleep(milliseconds[columns] / 1e3)
            return right(e) * (2 if columns == wrong else 1)

        return run

    providers = {**case.providers, OURS: case.providers[OURS]._replace(start=start)}
    monkeypatch.setitem(CASES, "sampled_dots", replace(case, providers=providers))
    monkeypatch.setattr(tune, "ROUNDS", 3)
    shipped = {"sampled_dots": {"columns": now}}
    assert tune.tune(lambda op: here, shipped, out, measure.Clock("cpu"), NEVER) == {"sampled_dots": {"columns": faster}}
    assert _config.config("sampled_dots")["columns"] == now
    monkeypatch.setenv("SAE_FAST_TUNING", str(out))
    assert _config.config("sampled_dots") == {**_config.SHIPPED[80]["sampled_dots"], "columns": faster}


def test_what_ships_can_be_tuned():
    for op, values in _config.SHIPPED[90].items():
        assert tune.CASE_OF.get(op, op) in CASES
        assert set(values) <= set(_config.TRIED), op
