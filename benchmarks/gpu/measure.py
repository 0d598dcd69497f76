"""The check, the clock and the CSV.

A job is a piece of work on a world, with its contenders.  Each contender is checked, then timed in turns with the others:
every round calls each of them, in an order drawn afresh, a few times in a row on batches in rotation, between two events of
the device.  Every figure is on the disk before the next one is measured.
"""

from __future__ import annotations

import csv
import gc
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from math import ceil, nan
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import machine
from benchmarks.data import Shape, World
from benchmarks.gate import reason
from benchmarks.gpu import environment
from benchmarks.gpu.record import BEGUN, DONE, Record, lines
from benchmarks.memory import _optimizer_bytes
from benchmarks.registry import OURS
from benchmarks.results import COLUMNS, Row, percentiles

# Rounds; milliseconds a sample lasts at least, so that the host of a step that nothing waits for is ahead of the device
# for most of it; calls before any.
ROUNDS, SAMPLE, WARM_UP = 15, 30.0, 2
UNITS = {
    "time": "ms", "rate": "GB/s", "tflops": "TFLOP/s", "peak_memory": "MiB", "l0": "features", "flops": "GFLOP",
    "bytes": "MB", "floor": "ms", "skipped": "", "fault": "",
}  # fmt: skip


TOLERANCE = {"exact": 1e-4, "fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2}  # of a loss, relative


class Unavailable(RuntimeError):
    """A contender that this machine or this version cannot run."""


def wrong(got: dict[str, float], truth: dict[str, float], precision: str) -> list[str]:
    """The terms of a loss that are not what they are in float64; the whole is under "loss"."""
    return [
        f"{name}: got {value:.6g}, want {truth[name]:.6g} within {TOLERANCE[precision]:g}"
        for name, value in got.items()
        if not abs(value - truth[name]) <= TOLERANCE[precision] * max(abs(truth[name]), 1e-6 * truth["loss"])
    ]


@dataclass
class Running:
    """A contender at work: ``run`` is timed, of one of ``inputs``.  ``check`` says what is wrong with it; ``own`` are the
    bytes of its parameters; ``moved`` and ``flops`` turn its time into rates."""

    run: Callable[[Any], Any]
    inputs: Sequence[Any]
    check: Callable[[], list[str]] = list
    own: int = 0
    moved: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Contender:
    """``optional``: not ours, so an exception in it is no fault, only a row with a note."""

    name: str
    start: Callable[[World], Running]
    note: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Job:
    case: str
    mode: str
    shape: Shape
    frequencies: str
    contenders: tuple[Contender, ...]
    memory: bool = False
    needs: float = 5.0  # seconds that must be left for it to begin

    @property
    def name(self) -> str:
        who = ", ".join(contender.name for contender in self.contenders)
        return f"{self.case} ({self.mode}), {self.shape}, {self.frequencies}: {who}"


class Sink:
    """results.csv, a row at a time: what is there stays there, whatever happens next.  It goes on with what the file holds,
    and ``known`` (another CSV) counts as measured."""

    def __init__(self, path: Path, known: Path | None = None, device: str | None = None):
        self.rows = [] if known is None else list(map(row_of, lines(known)))
        self.notes = [""] * len(self.rows)
        kept = lines(path)
        self.about = device or name_of_device(), environment.versions(), machine.commit()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: TextIO = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, [*COLUMNS, "note"], lineterminator="\n")
        self.writer.writeheader()
        for line in kept:
            self._write(row_of(line), line["note"])
        self._flush()

    def add(
        self, case: str, provider: str, mode: str, metric: str, x: object, values: Sequence[float], note: str = ""
    ) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = Row(case, provider, mode, metric, UNITS[metric], str(x), *percentiles(values), *self.about, now)
        self._write(row, note)
        self._flush()
        value = "" if row.p50 != row.p50 else f"{row.p50:.4g} {row.unit}"
        print(f"{case:18s} {provider:24s} {metric:12s} {value:20s} {x}  {note}", flush=True)

    def __getitem__(self, key: tuple[str, str, str, object]) -> float:
        """The latest median of (case, provider, metric, x); NaN where there is none."""
        wanted = (*key[:3], str(key[3]))
        found = (row.p50 for row in reversed(self.rows) if (row.case, row.provider, row.metric, row.x) == wanted)
        return next(found, nan)

    def _write(self, row: Row, note: str) -> None:
        line = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
        self.writer.writerow(line | {"note": note})
        self.rows.append(row)
        self.notes.append(note)

    def _flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


def row_of(line: dict[str, str]) -> Row:
    numbers = {name: float(line[name]) for name in ("p50", "p20", "p80")}
    return Row(**{name: line[name] for name in COLUMNS} | numbers)  # type: ignore[arg-type]


def name_of_device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else machine.device()


class Clock:
    """Milliseconds of calls, by the device's own events where it has them; the host waits once a sample."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Of one call, on average."""
        gc.disable()
        try:
            if not self.cuda:
                start = time.perf_counter()
                for call in calls:
                    call()
                return 1e3 * (time.perf_counter() - start) / len(calls)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for call in calls:
                call()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / len(calls)
        finally:
            gc.enable()


def times(runs: dict[str, Running], clock: Clock, rounds: int, deadline: float, seed: int = 0) -> dict[str, list[float]]:
    """Milliseconds by name, interleaved; at least one round, and no other after the deadline (of time.monotonic)."""
    length = {}
    for name, it in runs.items():
        once = clock([lambda it=it: it.run(it.inputs[0])])
        length[name] = max(1, min(50, ceil(SAMPLE / max(once, 1e-3))))
    found: dict[str, list[float]] = {name: [] for name in runs}
    order, names = random.Random(seed), list(runs)
    for turn in range(rounds):
        if turn and time.monotonic() > deadline:
            break
        gc.collect()
        for name in order.sample(names, len(names)):
            it, k = runs[name], length[name]
            inputs = [it.inputs[(turn + names.index(name) + j) % len(it.inputs)] for j in range(k)]
            found[name].append(clock([lambda x=x, it=it: it.run(x) for x in inputs]))
    return found


def measure(job: Job, here: World, sink: Sink, device: str, deadline: float, rounds: int = ROUNDS) -> str:
    """Checks and times a job's contenders; a faulty one has no time, one that cannot run a row that says why.  What became
    of it: DONE, or what it lacks."""
    runs: dict[str, Running] = {}
    wrong: list[str] = []
    for contender in job.contenders:
        place = (job.case, contender.name, job.mode)
        try:
            _free(device)
            memory = job.memory and device.startswith("cuda")
            before = (torch.cuda.memory_allocated(), _optimizer_bytes()) if memory else (0, 0)
            it = contender.start(here)
            faults = it.check()
            if faults:
                wrong.append(contender.name)
                sink.add(*place, "fault", job.shape, [nan], "; ".join(faults))
                continue
            for k in range(WARM_UP):
                it.run(it.inputs[k % len(it.inputs)])
            if memory:
                state = it.own + _optimizer_bytes() - before[1]
                peak = _peak(it) - before[0] - state
                sink.add(*place, "peak_memory", job.shape, [peak / 2**20], contender.note)
            runs[contender.name] = it
        except torch.OutOfMemoryError:
            sink.add(*place, "skipped", job.shape, [nan], "out of memory")
        except Exception as error:
            harmless = contender.optional or isinstance(error, Unavailable)
            wrong += [] if harmless else [contender.name]
            sink.add(*place, "skipped" if harmless else "fault", job.shape, [nan], reason(error))
    try:
        found = times(runs, Clock(device), rounds, deadline)
    except torch.OutOfMemoryError:
        sink.add(job.case, "all", job.mode, "skipped", job.shape, [nan], "out of memory beside each other")
        return "out of memory"
    for name, values in found.items():
        it = runs[name]
        note = next(c.note for c in job.contenders if c.name == name)
        sink.add(job.case, name, job.mode, "time", job.shape, values, note)
        if it.moved:
            sink.add(job.case, name, job.mode, "rate", job.shape, [it.moved / ms / 1e6 for ms in values])
        if it.flops:
            sink.add(job.case, name, job.mode, "tflops", job.shape, [it.flops / ms / 1e9 for ms in values])
    if wrong:
        return f"wrong: {', '.join(wrong)}"
    return "cut" if any(len(values) < rounds for values in found.values()) else DONE


def run(
    jobs: Callable[[], Iterable[Job]], world: Callable[[Shape, str], World], sink: Sink, record: Record, sources: str,
    device: str, seconds: float, rounds: int = ROUNDS, after: Callable[[Job, World, Sink], None] = lambda *_: None,
) -> None:  # fmt: skip
    """Job after job until the time is out, first what the record does not have of these sources.  ``jobs`` is asked again
    after each, as what is worth measuring hangs on what was measured.  ``after``: of ours."""
    end, tried = time.monotonic() + seconds, set()
    while True:
        named = {job.name: job for job in jobs() if job.needs <= end - time.monotonic()}
        left = [name for name in record.order("bench", dict.fromkeys(named, sources)) if name not in tried]
        if not left:
            return
        tried.add(left[0])
        job = named[left[0]]
        record.note("bench", job.name, sources, BEGUN)
        try:
            here = world(job.shape, job.frequencies)
            state = measure(job, here, sink, device, end, rounds)
            if any(contender.name == OURS for contender in job.contenders):
                after(job, here, sink)
        except Exception as error:
            state = reason(error)
        record.note("bench", job.name, sources, state)


def _peak(it: Running) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    it.run(it.inputs[0])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
