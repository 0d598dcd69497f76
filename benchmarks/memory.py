"""Peak memory of a provider, above the parameters and the optimizer's state.

Every provider has a process of its own (this module, run as a script).  There it first does its work at a toy shape, so
that libraries, threads and compilers are loaded; then the resident size R0 is read, with the batches and the SAE in place.
After a warm-up step that creates the optimizer's state, the kernel's high-water mark is reset before each step and read
after it:

    peak = high-water mark − R0 − bytes of the optimizers' state

Everything else counts: gradients, copies of weights that are kept between steps, and memory freed but not given back.
Needs Linux (/proc).
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.cases import CASES
from benchmarks.data import Shape, world
from benchmarks.runner import Measurement

STEPS = 3
MODULE = "benchmarks.memory"  # this one: its name is another where it runs as a script


def peaks(measurement: Measurement, console: Console, module: str = MODULE) -> dict[str, list[int]]:
    """Peak memory of the providers that were timed, floors apart, where the case asks for it."""
    found: dict[str, list[int]] = {}
    case = measurement.case
    for name in measurement.seconds:
        if case.memory and not case.providers[name].floor:
            try:
                found[name] = peak_bytes(case.name, name, measurement.shape, module)
            except RuntimeError as error:
                console.print(f"[yellow]{case.name}: no peak memory of {name}: {error}")
    return found


def peak_bytes(case: str, provider: str, shape: Shape, module: str = MODULE) -> list[int]:
    """One peak a step; ``RuntimeError`` says why where it cannot be measured.  ``module`` is what the child runs: one that
    knows the provider."""
    if provider not in CASES[case].providers:
        raise ValueError(f"provider: got {provider!r}, want one of {', '.join(CASES[case].providers)}")
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("peak memory needs /proc/self/clear_refs, which is Linux's")
    command = [sys.executable, "-m", module, case, provider, json.dumps(asdict(shape))]
    root = Path(__file__).parent.parent
    child = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError((child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1])
    return json.loads(child.stdout.splitlines()[-1])


def _resident(which: str = "VmRSS") -> int:
    return 1024 * int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def _give_back() -> None:
    """Frees what is free: Python's garbage, and the C library's."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _measure(case_name: str, provider_name: str, shape: dict) -> list[int]:
    case = CASES[case_name]
    start = case.providers[provider_name].start

    toy = world(Shape(B=8, d=16, F=32, l0=4), n_batches=1)
    run = start(toy.new_sae())
    run(case.inputs(toy)[0])
    del run

    here = world(Shape(**shape), n_batches=2)
    inputs, sae = case.inputs(here), here.new_sae()
    _give_back()
    before = _resident()
    run = start(sae)
    run(inputs[0])
    before += _optimizer_bytes()
    peaks = []
    for k in range(STEPS):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run(inputs[k % len(inputs)])
        peaks.append(_resident("VmHWM") - before)
    return peaks


def _optimizer_bytes() -> int:
    """The state of all optimizers alive: so a provider need not say where it keeps its own."""
    gc.collect()
    optimizers = [o for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer)]
    states = [value for o in optimizers for state in o.state.values() for value in state.values()]
    tensors = {id(value): value.nbytes for value in states if isinstance(value, torch.Tensor)}
    return sum(tensors.values())


def main() -> None:
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))


if __name__ == "__main__":
    main()
