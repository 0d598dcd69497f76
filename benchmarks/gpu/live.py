"""pytest plugin (`-p benchmarks.gpu.live`): takes what needs the GPU, and keeps tests.xml complete while tests run.

pytest's own --junitxml is written at the end: what is killed leaves nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from xml.etree import ElementTree

EVERY = 2.0  # seconds between two writings
ON_THE_HOST = ("test_cuda_build.py", "test_cuda_shim.py")


def is_of_kernels(name: str) -> bool:
    """Whether a file holds the kernels' own tests: on a GPU they run there instead of in the interpreter or the shim."""
    return name.startswith(("test_triton_", "test_cuda_")) and name not in ON_THE_HOST


def pytest_addoption(parser):
    parser.addoption("--live-xml", type=Path, help="the file to keep up to date")
    parser.addoption("--all-tests", action="store_true", help="do not leave out what needs no GPU")


def pytest_configure(config):
    path = config.getoption("--live-xml")
    if path and not hasattr(config, "workerinput"):  # of pytest-xdist, where one process collects the reports
        config.pluginmanager.register(LiveXml(path))


def pytest_collection_modifyitems(config, items):
    """The tests marked ``gpu`` or ``kernels``, and all of the kernels' own."""
    if config.getoption("--all-tests"):
        return
    marked = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("kernels")]
    kept = [item for item in items if item in set(marked) or is_of_kernels(item.path.name)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


class LiveXml:
    def __init__(self, path: Path):
        self.path, self.cases, self.written = path, [], 0.0

    def pytest_runtest_logreport(self, report):
        """A test is its call, or what kept it from being called or went wrong after."""
        if report.when == "call" or not report.passed:
            name, _, test = report.nodeid.partition("::")
            case = ElementTree.Element("testcase", classname=name, name=test, time=f"{report.duration:.3f}")
            if report.failed:
                kind = "failure" if report.when == "call" else "error"
                ElementTree.SubElement(case, kind, message=_last_line(report.longreprtext)).text = _clean(
                    report.longreprtext
                )
            elif report.skipped:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(getattr(report, "wasxfail", ""))
                ElementTree.SubElement(case, "skipped", message=_clean(reason))
            self.cases.append(case)
        if time.monotonic() - self.written > EVERY:
            self.write()

    def pytest_collectreport(self, report):
        if report.failed:
            case = ElementTree.Element("testcase", classname=report.nodeid, name="collection", time="0")
            ElementTree.SubElement(case, "error", message="collection").text = _clean(report.longreprtext)
            self.cases.append(case)

    def pytest_sessionfinish(self):
        self.write(complete=True)

    def write(self, complete: bool = False) -> None:
        counts = {kind: sum(case.find(kind) is not None for case in self.cases) for kind in ("failure", "error", "skipped")}
        totals = dict(tests=len(self.cases), failures=counts["failure"], errors=counts["error"], skipped=counts["skipped"])
        suite = ElementTree.Element("testsuite", name="gpu", complete=str(complete).lower())
        suite.attrib |= {name: str(total) for name, total in totals.items()}
        suite.extend(self.cases)
        root = ElementTree.Element("testsuites")
        root.append(suite)
        part = self.path.with_suffix(".part")
        ElementTree.ElementTree(root).write(part, encoding="utf-8", xml_declaration=True)
        part.replace(self.path)  # whole or not at all
        self.written = time.monotonic()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("E ")]
    return _clean(lines[0][1:].strip() if lines else text[:200])


def _clean(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(c for c in text if c in "\t\n\r" or ord(c) >= 32)
