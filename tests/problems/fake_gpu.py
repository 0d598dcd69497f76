"""A GPU that is not there, for a rehearsal of `make gpu`: `python fake_gpu.py -m MODULE ARGUMENTS`.

torch.cuda answers, tensors "on cuda" are on the CPU, kernels run in Triton's interpreter, torch.compile compiles nothing,
and worlds are tiny.  The rest is what runs on a GPU.  REHEARSAL in the environment is JSON:

results  the folder that benchmarks/results stands for
tests    the folder that tests/ stands for
hung     a file; a part's time is out as soon as it is there, for no machine is so busy that it would not have come so far
hang     a job's case that never ends, once it has made that file
wrong    a contender whose check finds a fault
broken   a module that fails as a process
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import interpreter  # noqa: E402
import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

NAME = "Made-up GPU 1"


class Event:
    def __init__(self, enable_timing: bool = False):
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.time - self.time)


def on_the_cpu(it: Any) -> Any:
    return "cpu" if isinstance(it, (str, torch.device)) and str(it).startswith("cuda") else it


class OnTheCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*map(on_the_cpu, args), **{name: on_the_cpu(it) for name, it in (kwargs or {}).items()})


class Generator(torch.Generator):
    def __new__(cls, device: str = "cpu"):
        return super().__new__(cls, "cpu")


class Part(subprocess.Popen):
    """A process whose time is out when it hangs."""

    hung: Path

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None and timeout > 10:
            while self.poll() is None and not self.hung.exists():
                time.sleep(0.1)
            self.hung.unlink(missing_ok=True)
            timeout = 0.1
        return super().wait(timeout)


def take(module: Any, **names: Any) -> None:
    for name, it in names.items():
        setattr(module, name, it)


def install(asked: dict[str, str]) -> None:
    interpreter.quicken()
    nothing = lambda *_, **__: None  # noqa: E731
    gpu = SimpleNamespace(name=NAME, multi_processor_count=2, total_memory=2**30, L2_cache_size=2**20, major=9, minor=0)
    take(
        torch.cuda, is_available=lambda: True, get_device_name=lambda *_: NAME, get_device_properties=lambda *_: gpu,
        get_device_capability=lambda *_: (9, 0), Event=Event, synchronize=nothing, empty_cache=nothing,
        reset_peak_memory_stats=nothing, memory_allocated=lambda *_: 0, max_memory_allocated=lambda *_: 2**20,
    )  # fmt: skip
    take(torch, Generator=Generator, compile=lambda it, **_: it)
    OnTheCpu().__enter__()

    from benchmarks.data import Shape
    from benchmarks.gpu import budget, environment, measure, record, suite, tune, world
    from sae_fast.kernels import _config

    take(world, LARGE=Shape(B=16, d=24, F=200, l0=6), SMALL=Shape(B=16, d=24, F=100, l0=6))
    # Each walk over all objects would take longer than what is measured.
    take(measure, SAMPLE=0.1, ROUNDS=2, WARM_UP=1, gc=SimpleNamespace(collect=nothing, enable=nothing, disable=nothing))
    take(measure, _optimizer_bytes=lambda: 0)
    take(_config, TRIED={"columns": (128,), "group": (4,)})
    known = tune.pieces
    take(tune, ROUNDS=2, pieces=lambda: {op: it for op, it in known().items() if op in ("sampled_dots", "screen")})
    take(budget, RESERVE=2.0, GRACE=2.0)
    take(record, RESULTS=Path(asked["results"]))
    take(suite, TESTS=Path(asked["tests"]))
    take(environment, build=lambda *_, **__: {"_C": None, "_C_cuda": "no nvcc is made up"}, BUILD="")

    from benchmarks.gpu import __main__ as command
    from benchmarks.gpu import cases

    Part.hung = Path(asked["hung"])
    take(command, PYTHON=[sys.executable, __file__], GRACE=2.0)
    take(subprocess, Popen=Part)
    jobs = cases.jobs
    take(cases, jobs=lambda **arguments: (changed(it, asked) for it in jobs(**arguments) if it.shape == world.LARGE))


def changed(job: Any, asked: dict[str, str]) -> Any:
    def start(contender: Any) -> Any:
        def started(here: Any) -> Any:
            if job.case == asked.get("hang"):
                Path(asked["hung"]).touch()
                time.sleep(3600)
            it = contender.start(here)
            return replace(it, check=lambda: ["is wrong on purpose"]) if contender.name == asked.get("wrong") else it

        return replace(contender, start=started)

    return replace(job, contenders=tuple(map(start, job.contenders)), needs=0.1)


def main() -> None:
    asked = json.loads(os.environ["REHEARSAL"])
    module, *arguments = sys.argv[2:]
    if module == asked.get("broken"):
        sys.exit("it is broken on purpose")
    install(asked)
    sys.argv = [module, *arguments]
    if module == "benchmarks.gpu":
        from benchmarks.gpu import __main__ as command

        sys.exit(command.main(arguments))
    if module == "pytest":
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:  # as it was changed
        sys.exit(importlib.import_module(module).main())


if __name__ == "__main__":
    main()
