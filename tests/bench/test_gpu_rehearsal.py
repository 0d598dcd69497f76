"""`make gpu` rehearsed: the runner's own code from end to end, on a GPU that is made up (problems/fake_gpu.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE
from problems import fake_gpu

from benchmarks.gpu.record import BEGUN, DONE, RECORD, lines

HOME = "made-up-gpu-1"
NOTE = "open({log!r}, 'a').write({name!r} + chr(10))"
HANGS = """while not all(it in Path({record!r}).read_text() for it in ('"done"', '"1 failed"')):
        time.sleep(0.1)
    Path({hung!r}).touch()
    time.sleep({patience})"""


@pytest.fixture
def rehearse(tmp_path):
    """A function that runs `make gpu`, and gives (exit code, what it said, the record at home)."""
    for name in ("results", "tests"):
        (tmp_path / name).mkdir()

    def run(out: str, **asked: str):
        asked |= {name: str(tmp_path / name) for name in ("results", "tests", "hung")}
        kept = {name: it for name, it in os.environ.items() if not name.startswith(("SAE_FAST", "PYTEST"))}
        asked_for = ["-m", "benchmarks.gpu", "--out", tmp_path / out, "--minutes", f"{PATIENCE / 60}"]
        done = subprocess.run(
            [sys.executable, fake_gpu.__file__, *asked_for],
            capture_output=True, text=True, env=kept | {"REHEARSAL": json.dumps(asked)}, timeout=PATIENCE,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, json.loads((tmp_path / "results" / HOME / RECORD).read_text())

    return run


def write(folder: Path, name: str, body: str) -> None:
    note = NOTE.format(log=str(folder / "log"), name=name)
    head = "import time\nfrom pathlib import Path"
    (folder / f"test_cuda_{name}.py").write_text(f"{head}\n\ndef test_{name}():\n    {note}\n    {body}\n")


def states(record: dict, part: str) -> dict[str, str]:
    return {re.sub(r"tests/test_cuda_|\.py|[ ,].*", "", name): it["state"] for name, it in record.get(part, {}).items()}


@pytest.mark.slow
def test_a_run_that_is_cut_and_the_next_one_that_goes_on(tmp_path, rehearse):
    tests, home = tmp_path / "tests", tmp_path / "results" / HOME
    hangs = HANGS.format(record=str(tmp_path / "first" / RECORD), hung=str(tmp_path / "hung"), patience=PATIENCE)
    for name, body in {"fine": "pass", "faulty": "assert 1 == 2", "stuck": hangs}.items():
        write(tests, name, body)

    # A test and a job never end, and a part fails: all others happen.
    code, said, record = rehearse("first", hang="ceilings", broken="benchmarks.gpu.tune")
    assert code == 1, said
    summary = (home / "summary.txt").read_text()
    assert summary == (tmp_path / "first" / "summary.txt").read_text() and summary.strip() in said
    for part, state in {"tests": "stopped at its limit", "bench": "stopped at its limit", "tune": "exit code 1"}.items():
        assert f"\n{part}: {state}\n" in f"\n{summary}", said
    assert states(record, "tests") == {"fine": DONE, "faulty": "1 failed", "stuck": BEGUN}
    assert states(record, "bench") == {"ceilings": BEGUN} and "tune" not in record
    assert "  failed: tests/test_cuda_faulty.py::test_faulty" in summary
    assert "  next: tests/test_cuda_stuck.py (begun)" in summary and re.search(r"tune: 0 of 2 done", summary)

    # The next begins with what has changed, then what is left over, and merges into what is there.
    old = "step,sae_fast,train,time,ms,B=1 d=1 F=1 L0=1,2,2,2,Made-up GPU 1,torch 1,abc,2020-01-01T00:00:00+00:00,"
    head = "case,provider,mode,metric,unit,x,p50,p20,p80,device,versions,commit,time,note"
    (home / "results.csv").write_text(f"{head}\n{old}\n")
    write(tests, "stuck", "pass")
    (tests / "log").unlink()
    code, said, record = rehearse("second", wrong="copy")
    assert code == 1, said
    assert (tests / "log").read_text().split() == ["stuck", "faulty", "fine", "stuck"]  # the last two by "rest"
    assert states(record, "tests") == {"fine": DONE, "faulty": "1 failed", "stuck": DONE}
    jobs = {name: it["state"] for name, it in record["bench"].items()}
    assert {state for name, state in jobs.items() if not name.startswith("ceilings")} == {DONE}
    assert jobs[next(iter(jobs))] == "wrong: copy" and len(jobs) > 20
    times = {name: it["time"] for name, it in record["bench"].items()}
    assert max(times, key=lambda name: times[name]).startswith("ceilings"), "what was begun before comes last"
    assert set(states(record, "tune").values()) == {DONE}

    rows = lines(home / "results.csv")
    assert rows[0]["commit"] == "abc" and {row["device"] for row in rows} == {fake_gpu.NAME}
    found = {(row["case"], row["provider"], row["metric"]) for row in rows}
    assert {("step", "sae_fast", "time"), ("kind_topk", "sae_fast_bf16", "time"), ("screen", "persistent", "time")} <= found
    assert {("step", "sae_fast", "peak_memory"), ("ceilings", "copy", "fault")} <= found
    assert ("ceilings", "copy", "time") not in found and not any(row["metric"] == "skipped" for row in rows)
    assert (tmp_path / "second" / "step.png").exists()
    summary = (home / "summary.txt").read_text()
    assert "fault: ceilings copy" in summary and re.search(r"exact step ÷ bare bf16 product, uniform.* (not )?met", summary)
