"""`python -m benchmarks.gpu` (or `make gpu`): tests, benchmark or tuning on this machine's GPU, into one folder.

environment.json, then tests.xml, then sanitizer.txt, then results.csv and its pictures, summary.txt last; with --only tune,
tuning.json.  Every file is valid at any time.  Exits with 0 if the tests passed and every check held, 2 without a GPU,
else 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from xml.etree import ElementTree

from benchmarks.gpu import environment
from benchmarks.gpu.budget import GRACE, PARTS, Budget
from benchmarks.gpu.live import is_of_kernels

STARTED = "SAE_FAST_GPU_STARTED"  # when the first of the processes of a run began, in seconds since the epoch
STOPPED = "stopped at its limit"
CUT = ("bench", "sanitizer")  # parts that the limit may cut


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the folder")
    parser.add_argument(
        "--only", choices=("tests", "sanitizer", "bench", "tune"), help="one part; by default tests, sanitizer, bench"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it ends within so many")
    given = parser.parse_args(arguments)
    reason = environment.no_gpu()
    if reason:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    began = float(os.environ.get(STARTED, time.time()))
    budget = Budget(began + 60 * given.minutes)
    if not environment.installed():
        return _again(began)

    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    os.chdir(environment.ROOT)  # where tests and benchmark are found
    signal.signal(signal.SIGTERM, _interrupt)
    missing = environment.build(Path(sys.executable), seconds=max(30.0, 0.25 * budget.left))
    if missing["_C"]:
        print(f"no CPU engine: {missing['_C']}; nothing on the GPU needs it", flush=True)
    if missing["_C_cuda"]:
        print(f"no CUDA kernels: {missing['_C_cuda']}; Triton's run", flush=True)
    about = environment.describe() | {"cpu_engine": missing["_C"] or "built", "cuda_engine": missing["_C_cuda"] or "built"}
    (out / "environment.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"{about.get('gpu')}   {about['versions']}   Triton {about['triton']}   into {out}", flush=True)

    states: dict[str, str] = {}
    try:
        parts = [given.only] if given.only else list(PARTS)
        for part in parts:
            seconds = budget.share(part, last=part == parts[-1])
            print(f"\n{part}: at most {seconds:.0f} s", flush=True)
            states[part] = run(command(part, out, seconds), seconds)
    except KeyboardInterrupt:
        states["run"] = "interrupted"
    return finish(out, states)


def _again(began: float) -> int:
    """The same in an environment of its own, which has sae_fast in it."""
    print(f"making {environment.VENV.name} of {sys.executable}", flush=True)
    python = environment.make()
    script = [str(python), "-m", "benchmarks.gpu", *sys.argv[1:]]
    os.environ[STARTED] = str(began)
    sys.stdout.flush()
    os.execv(python, script)
    return 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def command(part: str, out: Path, seconds: float) -> list[str]:
    if part != "tests":
        # It ends by itself when its time is out, and is stopped if it does not.
        return [sys.executable, "-m", f"benchmarks.gpu.{part}", "--out", str(out), "--seconds", f"{seconds - GRACE:.0f}"]
    files = [
        str(path.relative_to(environment.ROOT))
        for path in sorted((environment.ROOT / "tests").rglob("test_*.py"))
        if is_of_kernels(path.name) or re.search(r"mark\.gpu|@bodies\.", path.read_text(encoding="utf-8"))
    ]
    if importlib.util.find_spec("xdist"):  # most of a first run is compilation, on one core a process
        files += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    live = ["-p", "benchmarks.gpu.live", "--live-xml", str(out / "tests.xml"), "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *live, "--continue-on-collection-errors", *files]


def run(command: list[str], seconds: float) -> str:
    """What became of a process, and of all that it started: "" if it ended well."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(timeout=max(seconds, 0.0))
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return STOPPED
    finally:
        _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """An interrupt first, for it to write what it has; then the end of its whole group, of which some may outlive it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3.0)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- The end --------------------------------------------------------------------------------------------------------


def finish(out: Path, states: dict[str, str]) -> int:
    """Pictures, and the summary of whatever there is."""
    lines, good = [], not any(state for part, state in states.items() if part not in CUT or state != STOPPED)
    for part, state in states.items():
        lines.append(f"{part}: {state or 'done'}")
    if (out / "tests.xml").exists() and "tests" in states:
        suite = ElementTree.parse(out / "tests.xml").getroot()[0]
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        good &= not counts["failures"] and not counts["errors"] and suite.get("complete") == "true"
        lines.append("tests.xml: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        bad = [case for case in suite if case.find("failure") is not None or case.find("error") is not None]
        lines += [f"  failed: {case.get('classname')}::{case.get('name')}" for case in bad[:20]]
    if (out / "sanitizer.txt").exists() and "sanitizer" in states:
        said = (out / "sanitizer.txt").read_text(encoding="utf-8").splitlines()
        lines += [f"sanitizer.txt: {line}" for line in said if "SUMMARY" in line or line.startswith("no ")]
    if (out / "results.csv").exists() and "bench" in states:
        faults, table = _results(out)
        good &= not faults
        lines += ["", *table, *faults]
    if (out / "tuning.json").exists() and "tune" in states:
        lines.append("tuning.json: " + (out / "tuning.json").read_text(encoding="utf-8").strip())
    text = "\n".join(lines)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\nwritten to {out}", flush=True)
    return 0 if good else 1


def _results(out: Path) -> tuple[list[str], list[str]]:
    """(faults, table of goals) of results.csv, which gets the goals' rows; its pictures, if matplotlib is there."""
    from benchmarks import plots
    from benchmarks.gpu.cases import reach, twins
    from benchmarks.gpu.measure import Sink
    from sae_fast.extras import MissingExtra

    sink = Sink(out / "results.csv", append=True)
    faults = [
        f"fault: {row.case} {row.provider} {row.x}: {note}"
        for row, note in zip(sink.rows, sink.notes, strict=True)
        if row.metric == "fault"
    ]
    goals = reach(sink)
    width = max(len(label) for label, *_ in goals)
    table = [
        f"{label:{width}s}  {want:>7s}  {f'{got:.3g}' if verdict else '':>8s}  {verdict or 'not measured'}"
        for label, want, got, verdict in goals
    ]
    try:
        if any(row.metric == "time" for row in sink.rows):
            plots.draw(out / "results.csv", out)
    except MissingExtra as error:
        table.append(f"no pictures: {error}")
    table += ["", *twins(sink)[1]]
    return faults, [f"{'goal':{width}s}  {'want':>7s}  {'got':>8s}", *table]


if __name__ == "__main__":
    sys.exit(main())
