"""`python -m benchmarks.gpu` (or `make gpu`): tests, benchmark and tuning on this machine's GPU, into one folder.

Each part has a share of the time.  It begins with what is not done of the present sources, by the record in the device's
folder of benchmarks/results, into which the run's files are merged after every part; with what is left over the next run
goes on.  In the folder: environment.json, tests.xml, rest.xml, sanitizer.txt, results.csv, tuning.json, record.json, and at
the end the pictures and summary.txt.  Every file is valid at any time.  Exits with 0 if nothing was found wrong, 2 without
a GPU, else 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
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

STARTED = "SAE_FAST_GPU_STARTED"  # when the first of the processes of a run began, in seconds since the epoch
STOPPED, NOTHING = "stopped at its limit", "nothing left to do"
PYTHON = [sys.executable]  # of the parts
SHOWN = 20  # of a list in the summary


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the folder")
    parser.add_argument("--only", choices=PARTS, help="one part; by default all, in this order")
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

    from benchmarks.gpu import record

    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    os.chdir(environment.ROOT)  # where tests and benchmark are found
    signal.signal(signal.SIGTERM, _interrupt)
    about = prepare(out, budget)
    home = record.home(about["gpu"])
    states: dict[str, str] = {}
    try:
        for part in [given.only] if given.only else PARTS:
            seconds = budget.share(part, last=part in (PARTS[-1], given.only))
            print(f"\n{part}: at most {seconds:.0f} s", flush=True)
            asked = command(part, out, home, seconds)
            states[part] = run(asked, seconds) if asked else NOTHING
            record.merge(out, home)
    except KeyboardInterrupt:
        states["run"] = "interrupted"
        record.merge(out, home)
    return finish(out, home, states)


def prepare(out: Path, budget: Budget) -> dict[str, str]:
    """Builds what can be built, and describes the machine in environment.json."""
    missing = environment.build(Path(sys.executable), seconds=max(30.0, 0.25 * budget.left))
    if missing["_C"]:
        print(f"no CPU engine: {missing['_C']}; nothing on the GPU needs it", flush=True)
    if missing["_C_cuda"]:
        print(f"no CUDA kernels: {missing['_C_cuda']}; Triton's run", flush=True)
    about = environment.describe() | {"cpu_engine": missing["_C"] or "built", "cuda_engine": missing["_C_cuda"] or "built"}
    (out / "environment.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"{about['gpu']}   {about['versions']}   into {out}", flush=True)
    return about


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


def command(part: str, out: Path, home: Path, seconds: float) -> list[str]:
    """What runs a part; empty where nothing of it is left."""
    from benchmarks.gpu import sanitizer, suite, tune
    from benchmarks.gpu.record import Record

    known = Record(out, home)
    if part not in ("tests", "rest"):
        of = {"sanitizer": sanitizer.pieces, "tune": tune.pieces}.get(part)
        if of and not known.left(part, of()):
            return []
        # It ends by itself when its time is out, and is stopped if it does not.
        limits = ["--out", str(out), "--known", str(home), "--seconds", f"{seconds - GRACE:.0f}"]
        return [*PYTHON, "-m", f"benchmarks.gpu.{part}", *limits]
    pieces = suite.pieces()
    left = known.left("tests", pieces)
    files = left if part == "tests" else [name for name in known.order("tests", pieces) if name not in left]
    if not files:
        return []
    options = ["-p", "benchmarks.gpu.live", "--live", str(out / f"{part}.xml"), str(home), "-p", "no:cacheprovider"]
    options += ["--rootdir", str(suite.TESTS.parent), "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):  # most of a first run is compilation, on one core a process; a file at a time
        options += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--dist", "loadfile"]
    return [*PYTHON, "-m", "pytest", *options, *(str(suite.TESTS.parent / file) for file in files)]


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


def finish(out: Path, home: Path, states: dict[str, str]) -> int:
    """Pictures, and the summary of whatever there is."""
    lines = [f"{part}: {state or 'done'}" for part, state in states.items()]
    bad = {part for part, state in states.items() if state not in ("", STOPPED, NOTHING)}
    for part in ("tests", "rest"):
        xml = out / f"{part}.xml"
        if xml.exists() and states.get(part, NOTHING) != NOTHING:
            suite = ElementTree.parse(xml).getroot()[0]
            counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
            lines.append(f"{xml.name}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
            failed = [case for case in suite if case.find("failure") is not None or case.find("error") is not None]
            lines += [f"  failed: {case.get('classname')}::{case.get('name')}" for case in failed[:SHOWN]]
            bad |= {part} if failed else set()
    if (out / "sanitizer.txt").exists() and "sanitizer" in states:
        said = (out / "sanitizer.txt").read_text(encoding="utf-8").splitlines()
        lines += [f"sanitizer.txt: {line}" for line in said if "SUMMARY" in line or line.startswith("no ")]
    if (out / "tuning.json").exists() and "tune" in states:
        lines.append("tuning.json: " + (out / "tuning.json").read_text(encoding="utf-8").strip())
    lines += ["", *_left(out, home)]
    if (home / "results.csv").exists():
        faults, table = _results(out, home)
        bad |= {"bench"} if faults else set()
        lines += ["", *table, *faults]
    text = "\n".join(lines)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(out / "summary.txt", home / "summary.txt")
    print(f"\n{text}\nwritten to {out}, merged into {home}", flush=True)
    return 1 if bad else 0


def _left(out: Path, home: Path) -> list[str]:
    """What the next run begins with, part by part."""
    from benchmarks.gpu import bench, suite, tune
    from benchmarks.gpu.record import Record

    known, lines = Record(out, home), []
    for part, pieces in {"tests": suite.pieces(), "bench": bench.pieces(home), "tune": tune.pieces()}.items():
        left = known.left(part, pieces)
        lines.append(f"{part}: {len(pieces) - len(left)} of {len(pieces)} done of the present sources")
        states = {name: known.state(part, name, pieces[name]) or "not begun" for name in left}
        lines += [f"  next: {name} ({states[name]})" for name in left[:SHOWN]]
    return lines


def _results(out: Path, home: Path) -> tuple[list[str], list[str]]:
    """(faults, table of goals) of what is known of the device; its pictures, if matplotlib is there."""
    from benchmarks import plots
    from benchmarks.gpu import goals
    from benchmarks.gpu.measure import row_of
    from benchmarks.gpu.record import lines
    from sae_fast.extras import MissingExtra

    rows = lines(home / "results.csv")
    faults = [
        f"fault: {row['case']} {row['provider']} {row['x']}: {row['note']}" for row in rows if row["metric"] == "fault"
    ]
    table = goals.lines(list(map(row_of, rows)))
    try:
        if any(row["metric"] == "time" for row in rows):
            plots.draw(home / "results.csv", out)
    except MissingExtra as error:
        table.append(f"no pictures: {error}")
    return faults, table


if __name__ == "__main__":
    sys.exit(main())
