"""`make gpu` without a GPU: it says so; and its parts, with the host's clock in place of the device's."""

import csv
import json
import os
import re
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
from benchmarks.gpu import cases, environment, goals, kinds, measure, record, rivals, tune, world
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
    kinds.true_loss.cache_clear()


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
    assert tests == pytest.approx(0.4 * (480 - RESERVE))
    now[0] += tests
    assert 0.05 < budget.share("sanitizer", last=False) / (480 - RESERVE) < 0.15
    assert budget.share("bench", last=False) == pytest.approx(0.8 * (480 - RESERVE - tests))
    assert budget.share("bench", last=True) == budget.share("rest", last=True) == budget.left - RESERVE
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
    options = ["-p", "benchmarks.gpu.live", "--live", xml, tmp_path, "-p", "no:cacheprovider", "--rootdir", tmp_path]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", *options, tmp_path],
        cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    wait_until(lambda: xml.exists() and len(ElementTree.parse(xml).getroot()[0]) == 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    suite = ElementTree.parse(xml).getroot()[0]
    assert {case.get("name") for case in suite} == {"test_fine", "test_wrong", "test_skipped", "test_wait"}
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "1")
    assert suite.get("complete") == "false"
    assert record.Record(tmp_path, tmp_path).state("tests", "test_triton_slow.py", "") == record.BEGUN
    assert "assert 1 == 2" in next(case for case in suite if case.get("name") == "test_wrong").find("failure").get(
        "message"
    )


@pytest.mark.parametrize(
    ("states", "failures", "fault", "code"),
    [
        ({"tests": "", "bench": ""}, 0, False, 0),
        ({"tests": "", "bench": command.STOPPED}, 0, False, 0),
        ({"tests": command.STOPPED, "bench": command.NOTHING}, 0, False, 0),
        ({"tests": "", "bench": "exit code 1"}, 0, False, 1),
        ({"tests": "exit code 1", "bench": ""}, 2, False, 1),
        ({"tests": command.STOPPED, "bench": ""}, 2, False, 1),
        ({"tests": "", "bench": ""}, 0, True, 1),
        ({"tests": "", "run": "interrupted"}, 0, False, 1),
    ],
)
def test_the_summary_and_the_exit_code(tmp_path, capsys, states, failures, fault, code):
    out, home = tmp_path / "out", tmp_path / "home"
    out.mkdir()
    wrong = '<testcase classname="test_a.py" name="test_b"><failure/></testcase>' * failures
    suite = f'<testsuite tests="5" failures="{failures}" errors="0" skipped="1" complete="true">{wrong}</testsuite>'
    (out / "tests.xml").write_text(f"<testsuites>{suite}</testsuites>")
    sink = measure.Sink(out / "results.csv", device="gpu")
    for provider, ms in ((OURS, 9.0), (goals.PRODUCT, 3.5), ("compiled_bf16", 30.0)):
        sink.add("step", provider, "train", "time", goals.LARGE, [ms])
    if fault:
        sink.add("step", goals.OURS_BF16, "train", "fault", goals.LARGE, [nan], "loss: got 2, want 1")
    record.merge(out, home)
    assert command.finish(out, home, states) == code
    text = (out / "summary.txt").read_text()
    assert text.strip() in capsys.readouterr().out and text == (home / "summary.txt").read_text()
    label = f"exact step ÷ bare bf16 product, uniform, {goals.LARGE}"
    assert re.search(rf"^{label} +≤ 2.9 +2.57  met$", text, re.MULTILINE)
    assert ("loss: got 2, want 1" in text) == fault and text.count("test_a.py::test_b") == failures
    assert re.search(r"^bench: 0 of \d+ done of the present sources$", text, re.MULTILINE)
    assert f"  next: ceilings (floor), {goals.LARGE}, uniform: bf16_product, copy, gather (not begun)" in text
    assert (out / "step.png").exists()


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
        lambda sae: rivals.Dense(sae, rivals.gated_loss(L1), 1e-3),
        lambda sae: rivals.Dense(sae, rivals.gated_loss(L1), 1e-3, "tf32"),
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
        cases.rival(lambda sae: rivals.Dense(sae, rivals.gated_loss(L1), SETTINGS["lr"], "bf16"), "bf16"),
        *(cases.op(name) for name in cases.OPS),
        cases.product(torch.bfloat16), cases.copy, cases.gather,
    ):  # fmt: skip
        it = start(here)
        assert it.check() == []
        it.run(it.inputs[0])


def test_a_wrong_loss_or_support_is_found():
    here = tiny()
    assert cases.wrong_losses(here, {"loss": cases.true_losses(here)[0] * 1.001}, "exact")
    assert cases.wrong_losses(here, {"loss": nan}, "exact")
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
        run(jobs, sink, tmp_path)
    states = record.Record(tmp_path, tmp_path)
    assert [states.state("bench", it.name, "now") for it in jobs] == [record.DONE, record.BEGUN]
    with path.open("a") as file:
        file.write("step,b,train,ti")  # as a killed process may leave it
    again = measure.Sink(path)
    assert [(row.provider, row.metric, row.unit) for row in again.rows] == [("a", "time", "ms"), ("a", "rate", "GB/s")]
    assert again["step", "a", "time", TINY] > 0 and isnan(again["step", "b", "time", TINY])
    assert len(plots.read(path)) == 2
    later = measure.Sink(tmp_path / "later.csv", known=path)  # another run knows of it, and does not say it again
    assert later["step", "a", "time", TINY] > 0 and not record.lines(tmp_path / "later.csv")


def run(jobs, sink, folder, seconds=NEVER, rounds=3, **options):
    known = record.Record(folder, folder)
    measure.run(lambda: jobs, lambda shape, kind: tiny(kind, shape), sink, known, "now", "cpu", seconds, rounds, **options)
    return known


def test_a_run_goes_on_where_the_last_one_ended(tmp_path):
    """First what was not begun, then what went wrong or did not end, then what is done, the oldest first."""
    begun = []

    def contender(name, check=list):
        return measure.Contender(name, lambda here: begun.append(name) or measure.Running(len, here.batches, check))

    sink = measure.Sink(tmp_path / "results.csv", device="gpu")
    good, wrong, new = job(contender("good")), job(contender("wrong", lambda: ["off"])), job(contender("new"))
    long = job(contender("long"), needs=NEVER)
    known = run([good, wrong, long], sink, tmp_path, PATIENCE)
    assert begun == ["good", "wrong"]
    assert [known.state("bench", it.name, "now") for it in (good, wrong, long)] == [record.DONE, "wrong: wrong", None]
    assert known.left("bench", {it.name: "now" for it in (good, wrong, new)}) == [new.name, wrong.name]
    begun.clear()
    run([good, wrong, new], sink, tmp_path)
    assert begun == ["new", "wrong", "good"]
    begun.clear()
    run([good, wrong, new], sink, tmp_path, seconds=0.0)  # what has no time is not begun
    assert not begun


def test_a_job_s_end_keeps_no_other_from_beginning(tmp_path):
    def breaks(shape, kind):
        raise RuntimeError("no memory for a world")

    jobs = [job(measure.Contender(name, running())) for name in "ab"]
    known = record.Record(tmp_path, tmp_path)
    sink = measure.Sink(tmp_path / "results.csv", device="gpu")
    measure.run(lambda: jobs, breaks, sink, known, "now", "cpu", NEVER)
    assert [known.state("bench", it.name, "now") for it in jobs] == ["RuntimeError: no memory for a world"] * 2


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
    one = job(*contenders)
    known = run([one], sink, tmp_path, PATIENCE, rounds=2)
    found = [(row.provider, row.metric, note) for row, note in zip(sink.rows, sink.notes, strict=True)]
    assert found[:4] == [
        ("wrong", "fault", "loss: off"), ("broken", "fault", "RuntimeError: no kernel"),
        ("rival", "skipped", "RuntimeError: no compiler"), ("large", "skipped", "out of memory"),
    ]  # fmt: skip
    assert found[4][:2] == ("fine", "time")
    assert known.state("bench", one.name, "now") == "wrong: wrong, broken"


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


def figures(*rows):
    """Of (case, provider, metric, milliseconds) at the large shape."""
    return {(*place, str(goals.LARGE)): ms for *place, ms in rows}


def found(of):
    """(ratio, verdict) by label, of those at the large shape."""
    return {(it.goal.label, it.frequencies): (it.got, it.verdict) for it in goals.reach(of) if it.goal.at == goals.LARGE}


def test_a_goal_takes_the_best_compiled_step():
    times = {OURS: 10.0, goals.PRODUCT: 4.0, "compiled_bf16": 30.0, "compiled_bf16_autotuned": 24.0}
    of = figures(*(("step", provider, "time", ms) for provider, ms in times.items()))
    got = found(of)
    assert got["exact step ÷ bare bf16 product", "uniform"] == (2.5, "met")
    assert got["compiled bf16 dense step ÷ exact step", "uniform"] == (pytest.approx(2.4), "not met")
    assert got["bf16 step ÷ bare bf16 product", "uniform"][1] == ""
    got = found(of | figures(("step_zipf", OURS, "time", 8.0)))  # dense rivals take as long on any data
    assert got["compiled bf16 dense step ÷ exact step", "zipf"][0] == pytest.approx(3.0)


def test_batchtopk_is_held_against_the_only_kind_that_sparsify_has():
    of = figures(("kind_topk", "sparsify", "time", 50.0), ("kind_batchtopk", OURS, "time", 4.0))
    assert found(of)["sparsify's step ÷ BatchTopK step, momentum", "uniform"] == (12.5, "met")
    assert ("sparsify's step ÷ BatchTopK step, momentum", "zipf") not in found(of)


@pytest.mark.parametrize("kind", [kind for kind, step in kinds.STEPS.items() if not step.dead])
def test_a_kind_and_its_dense_rival_have_the_loss_of_float64(kind):
    here = tiny()
    for start in (
        kinds.ours(kind, "exact"),
        kinds.rival(kind, lambda layer: rivals.Dense(layer, kinds.STEPS[kind].loss, 1e-5), "fp32"),
    ):
        it = start(here)
        assert it.check() == []
        it.run(it.inputs[1])


def test_without_sparsify_its_contender_is_left_out():
    """It is in another environment."""
    start = next(it.start for it in kinds.job("topk", TINY).contenders if it.name == "sparsify")
    with pytest.raises(measure.Unavailable, match="sparsify"):
        start(tiny())


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


def test_what_is_faster_at_every_shape_earns_its_place_and_then_a_step():
    assert goals.twins({}) == (frozenset(), ["CUDA bodies beside Triton's: not measured"])
    assert not [c for j in cases.jobs() for c in j.contenders if c.name.endswith("faster_bodies")]
    times = {"decode_loss": (1.2, 1.0), "encode": (1.1, 1.0), "outer": (2.0, 1.0)}
    of = {(case, body, "time", str(goals.LARGE)): ms for case, both in times.items()
          for body, ms in zip(("triton", "cuda"), both, strict=True)}  # fmt: skip
    of |= {("outer", body, "time", str(goals.SMALL)): 1.0 for body in ("triton", "cuda")}
    earned, lines = goals.twins(of)
    assert earned == {"decode_loss"} and len(lines) == 5
    assert lines[-1] == "earn a place in kernels/_generations.py's faster (≥ 1.15 ×): decode_loss"
    assert any(line.startswith("verify ") and "1.10 ×" in line for line in lines)
    steps = [c for j in cases.jobs(earned=earned) for c in j.contenders if c.name.endswith("faster_bodies")]
    assert [c.note for c in steps] == ["cuda: decode_loss"]


def test_the_gathers_goal_is_of_the_faster_body():
    rows = ("triton", "time", 3.0), ("cuda", "time", 2.0), ("gather_floor", "floor", 1.5)
    got = found(figures(*(("decode_loss", *row) for row in rows)))
    assert got["decode_loss ÷ gathered bytes", "uniform"] == (pytest.approx(4 / 3), "met")


def test_the_kernels_own_tests_run_on_the_gpu_and_the_host_s_do_not():
    wanted = " ".join(command.command("tests", ROOT / "out", ROOT / "out", 100.0))
    for name in (
        "ops/test_cuda_decode_loss.py",
        "ops/test_triton_rows.py",
        "ops/test_gpu.py",
        "train/test_device_runner.py",
    ):
        assert f"tests/{name}" in wanted
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
    arguments = ["--out", str(tmp_path), "--known", str(tmp_path), "--seconds", seconds]
    monkeypatch.setattr(sys, "argv", ["sanitizer", *arguments])
    assert sanitizer.main() == code
    text = (tmp_path / "sanitizer.txt").read_text()
    assert all(line in text for line in says), text
    (tmp_path / "home").mkdir()
    assert command.finish(tmp_path, tmp_path / "home", {"sanitizer": command.STOPPED}) == 0
    left = record.Record(tmp_path, tmp_path).left("sanitizer", sanitizer.pieces())
    assert left == ([] if len(says) == 3 else ["memcheck", "racecheck"])  # whose next run asks again
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
    states = []
    note = lambda *of: states.append(of)  # noqa: E731
    got = tune.tune(lambda op: here, shipped, tmp_path, measure.Clock("cpu"), NEVER, note)
    assert got == {"sampled_dots": {"columns": faster}} and [state for _, state in states] == [record.BEGUN, record.DONE]
    assert _config.config("sampled_dots")["columns"] == now
    monkeypatch.setenv("SAE_FAST_TUNING", str(tmp_path / record.TUNING))
    assert _config.config("sampled_dots") == {**_config.SHIPPED[80]["sampled_dots"], "columns": faster}


def test_what_ships_can_be_tuned():
    for op, values in _config.SHIPPED[90].items():
        assert tune.CASE_OF.get(op, op) in CASES
        assert set(values) <= set(_config.TRIED), op
