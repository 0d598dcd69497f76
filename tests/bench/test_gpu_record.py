"""What a run of `make gpu` remembers: what a result hangs on, which piece is done, and how folders are merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import record, sources, suite
from benchmarks.gpu.record import BEGUN, DONE, Record, lines, merge

ROOT = Path(__file__).parents[2]
HEAD = "case,provider,mode,metric,unit,x,p50,p20,p80,device,versions,commit,time,note"


def names(test: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in sources.of_test(ROOT / "tests" / test)}


@pytest.mark.parametrize(
    ("test", "within", "without"),
    [
        ("ops/test_decode.py", ["sae_fast/ops/decode.py", "kernels/decode.py", "kernels/_launch.py", "tests/helpers.py"],
         ["kernels/weight_step.py", "sae_fast/nn/gated.py", "sae_fast/train/trainer.py"]),
        ("ops/test_encode.py", ["sae_fast/ops/encode/gpu.py", "kernels/screen.py"], ["kernels/outer.py"]),
        ("ops/test_cuda_decode_loss.py", ["csrc/cuda/decode_loss.cu", "csrc/include/sae_fast/activation.hpp"], []),
        ("train/test_device_runner.py", ["sae_fast/train/device_steps.py", "kernels/weight_step.py"], []),
    ],
)  # fmt: skip
def test_a_test_hangs_on_what_it_imports_and_on_the_ops_it_names(test, within, without):
    found = names(test)
    assert found >= {f"tests/{test}", *within} and not found & set(without)


def test_every_kernel_is_a_source_of_a_test_that_a_gpu_runs():
    found = {path for name in suite.pieces() for path in sources.of_test(ROOT / name)}
    for kernel in (ROOT / "kernels").glob("*.py"):
        assert kernel in found or kernel.name.startswith(("__init__", "aot")), kernel.name


def test_a_hash_changes_with_a_name_a_content_and_a_version(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("a")
    found = {sources.digest([one]), sources.digest([two]), sources.digest([one, two]), sources.digest([one], "Triton 3.6")}
    one.write_text("b")
    assert len({*found, sources.digest([one])}) == 5
    one.write_text("a")
    assert sources.digest([one]) in found


def test_a_state_holds_for_its_sources_and_is_on_the_disk(tmp_path):
    known = Record(tmp_path, tmp_path / "home")
    known.note("tests", "a", "1", DONE)
    again = Record(tmp_path / "other", tmp_path)
    assert again.state("tests", "a", "1") == DONE
    assert again.state("tests", "a", "2") is None is again.state("bench", "a", "1")


def test_what_was_not_begun_comes_first_and_what_is_done_last_the_oldest_first(tmp_path):
    known = Record(tmp_path, tmp_path)
    for n, (piece, state) in enumerate({"newer": DONE, "older": DONE, "hung": BEGUN, "wrong": "2 failed"}.items()):
        known.note("tests", piece, "1", state)
        known.pieces["tests"][piece]["time"] = f"2026-01-0{9 - n}"
    pieces = dict.fromkeys(("newer", "older", "hung", "wrong", "new"), "1") | {"changed": "1"}
    known.note("tests", "changed", "0", DONE)
    assert known.order("tests", pieces) == ["new", "changed", "wrong", "hung", "older", "newer"]
    assert known.left("tests", pieces) == ["new", "changed", "wrong", "hung"]


def row(provider: str, value: float, day: int, metric: str = "time", **more: str) -> str:
    it = dict(case="step", mode="train", x="B=1", device="gpu", note="") | more
    time = f"2026-01-{day:02d}T00:00:00+00:00"
    first = (
        it["case"],
        provider,
        it["mode"],
        metric,
        "ms",
        it["x"],
        *[f"{value}"] * 3,
        it["device"],
        "torch 2",
        f"c{day}",
        time,
    )
    return ",".join((*first, it["note"]))


def folder(path: Path, *rows: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / record.ROWS).write_text("\n".join((HEAD, *rows, "")))
    return path


def found(home: Path) -> list[tuple[str, str, str, str]]:
    return [(row["provider"], row["metric"], row["p50"], row["commit"]) for row in lines(home / record.ROWS)]


def test_a_new_row_takes_the_place_of_an_old_one_and_the_others_stay(tmp_path):
    home = folder(tmp_path / "home", row("a", 1, 1), row("b", 2, 1), row("a", 3, 1, x="B=2"))
    new = folder(tmp_path / "new", row("a", 9, 5), row("c", 4, 5), row("d", 5, 5, "skipped", note="too late"))
    for _ in range(2):  # again, which changes nothing
        merge(new, home)
        assert sorted(found(home)) == [
            ("a", "time", "3", "c1"),
            ("a", "time", "9", "c5"),
            ("b", "time", "2", "c1"),
            ("c", "time", "4", "c5"),
        ]
    merge(folder(tmp_path / "old", row("a", 7, 2)), home)  # a folder that was kept for long
    assert ("a", "time", "9", "c5") in found(home) and len(found(home)) == 4


def test_a_fault_goes_with_a_later_time_and_a_time_with_a_later_fault(tmp_path):
    home = folder(tmp_path / "home", row("a", 1, 1), row("b", 0, 1, "fault", note="off"))
    merge(folder(tmp_path / "new", row("b", 2, 3), row("a", 0, 3, "fault", note="off"), row("a", 8, 3, "l0")), home)
    assert found(home) == [("b", "time", "2", "c3"), ("a", "fault", "0", "c3"), ("a", "l0", "8", "c3")]


def test_states_and_tuned_values_are_merged_piece_by_piece(tmp_path):
    home, new = tmp_path / "home", tmp_path / "new"
    for path in (home, new):
        path.mkdir()
    Record(home, home).note("tests", "a", "1", DONE)
    merge(home, home)
    known = Record(new, home)
    known.note("tests", "b", "1", BEGUN)
    (home / record.TUNING).write_text(json.dumps({"screen": {"rows": 64}, "outer": {"run": 256}}))
    (new / record.TUNING).write_text(json.dumps({"screen": {}, "decode": {"entries": 4}}))
    (new / record.ENVIRONMENT).write_text(json.dumps({"gpu": "NVIDIA H200 (of someone)"}))
    merge(new, home)
    assert {name: it["state"] for name, it in Record(tmp_path, home).pieces["tests"].items()} == {"a": DONE, "b": BEGUN}
    assert json.loads((home / record.TUNING).read_text()) == {"outer": {"run": 256}, "decode": {"entries": 4}}
    assert (home / record.ENVIRONMENT).read_text() == (new / record.ENVIRONMENT).read_text()
    assert record.home("NVIDIA H200 (of someone)").name == "nvidia-h200-of-someone"


def test_a_row_that_was_cut_is_left_out(tmp_path):
    home = folder(tmp_path / "home", row("a", 1, 1), "step,b,train,ti")
    assert found(home) == [("a", "time", "1", "c1")] and lines(tmp_path / "nowhere") == []
