"""Which routes and bodies the tests ran: counted in every process, printed after a run, and held against what there is.

A route of encode counts once a block of rows, a body of an op once a call.  A run of the whole first tier that leaves a
cell empty fails: no path may depend on the machine that happens to run the tests.  So does one that skips for a reason
that is not one of ALLOWED.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
import ways

from sae_fast import ops
from sae_fast.ops.dispatch import _C
from sae_fast.ops.encode import cpu, largest, screen

ISAS = ("avx512", "avx2", "plain")
ROUTES = ("screen", "bound", "dots", "product", "rounded")
# What no emulation replaces: devices, a platform's own, and tools that do not come from a package index.
ALLOWED = re.compile(
    "torch.cuda is not available|needs two GPUs|there is a GPU|a GPU has its own schedule|_C_cuda is not built"
    "|there is no (nvcc|cuobjdump)|g\\+\\+ has no libasan|(g\\+\\+|nm) is not installed|needs a browser"
    "|os.fork is not there|on Linux only|torch is built without distributed|csrc/ is not next to tests/"
)

_blocks: Counter[tuple[str, str, str]] = Counter()  # (route, instruction set, "native" or "emulated")
_calls: Counter[tuple[str, str]] = Counter()  # (op, body), with 0 for a body that an op has and no test took


def count() -> None:
    """Counts from now on, in this process."""
    cpu.fill = _counted_block(cpu.fill, lambda compactor, way, *_, **__: way)
    largest._bounded = _counted_block(largest._bounded, lambda *_, **__: "bound")
    for module in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{module.name}")
        if hasattr(module, "pick") and module.__name__ != "sae_fast.ops.dispatch":
            module.pick = partial(_counting_pick, module.pick)


def _counted_block(body: Callable, way_of: Callable) -> Callable:
    def counted(*arguments, **keywords):
        way = way_of(*arguments, **keywords)
        emulated = way in ("screen", "rounded") and screen.product is not ways.OF_TORCH
        _blocks[way, _C.isa(), "emulated" if emulated else "native"] += 1
        return body(*arguments, **keywords)

    return counted


def _counting_pick(
    pick: Callable, op: str, bodies: Mapping[str, Callable], rejections: Mapping[str, str | None]
) -> Callable:
    def counted(name: str, body: Callable, *arguments):
        _calls[op, name] += 1
        return body(*arguments)

    for name in bodies:
        _calls[op, name] += 0
    return pick(op, {name: partial(counted, name, body) for name, body in bodies.items()}, rejections)


class Report:
    """The pytest plugin."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.skipped: Counter[str] = Counter()  # reasons that are not allowed
        whole = not (config.option.file_or_dir or config.option.keyword or config.getoption("lf", False))
        self.whole = whole and config.option.markexpr in ("", "not slow")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._see(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._see(report)

    def _see(self, report) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and not ALLOWED.search(reason := report.longrepr[2]):
            self.skipped[reason] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        """Of pytest-xdist: a process has ended."""
        blocks, calls = getattr(node, "workeroutput", {}).get("routes", ((), ()))
        _blocks.update({tuple(key): n for *key, n in blocks})
        for *key, n in calls:
            _calls[tuple(key)] += n

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(self.config, "workeroutput"):
            found = [[[*key, n] for key, n in counter.items()] for counter in (_blocks, _calls)]
            self.config.workeroutput["routes"] = found
        elif exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and self.faults():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def faults(self) -> list[str]:
        """What is wrong with the run as a whole."""
        found = [f"{n} skipped for a reason that is not allowed: {reason}" for reason, n in self.skipped.items()]
        if self.whole:
            found += [f"no test took encode's route {cell}" for cell, n in self._cells().items() if n == 0]
            found += [f"no test ran {op} in its body {body!r}" for (op, body), n in sorted(_calls.items()) if n == 0]
        return found

    def _cells(self) -> dict[str, int]:
        return {
            f"{route!r} in {isa}": sum(_blocks[route, isa, how] for how in ("native", "emulated"))
            for route in ROUTES
            for isa in _C.supported_isas()
        }

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.whole or self.config.option.verbose > 0:
            terminalreporter.section("routes and bodies")
            for line in table():
                terminalreporter.write_line(line)
        for fault in self.faults():
            terminalreporter.write_line(f"FAILED: {fault}", red=True)


def table() -> list[str]:
    """Two tables, as lines of text."""
    absent = {isa: "not on this processor" for isa in ISAS if isa not in _C.supported_isas()}
    rows = [["encode, in blocks of rows", *ISAS]]
    for route in ROUTES:
        for how in ("native", "emulated") if route in ("screen", "rounded") else ("native",):
            counts = [absent.get(isa) or str(_blocks[route, isa, how] or "") for isa in ISAS]
            rows.append([f"{route}{' (emulated product)' if how == 'emulated' else ''}", *counts])
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    bodies = {
        "reference": "reference", "cpu": "cpu", "triton": "triton (interpreter)" if interpreted else "triton",
        "cuda": "cuda" if torch.cuda.is_available() else "cuda (shim)",
    }  # fmt: skip
    calls = [["op, in calls", *bodies.values()]]
    for op in sorted({op for op, _ in _calls}):
        calls.append([op, *(str(_calls[op, body]) if (op, body) in _calls else "" for body in bodies)])
    product = ways.WHY_NOT or "native"
    return [*_aligned(rows), "", *_aligned(calls), "", f"bfloat16 product: {product}"]


def _aligned(rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
