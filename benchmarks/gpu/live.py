"""pytest plugin (`-p benchmarks.gpu.live`): takes what needs the GPU, and keeps an XML and the record of files up to date
while tests run.

pytest's own --junitxml is written at the end: what is killed leaves nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.gpu import suite
from benchmarks.gpu.record import BEGUN, DONE, Record

EVERY = 2.0  # seconds between two writings


def pytest_addoption(parser):
    parser.addoption(
        "--live", type=Path, nargs=2, help="the XML to keep up to date, and the folder of what is known before"
    )
    parser.addoption("--all-tests", action="store_true", help="do not leave out what needs no GPU")


def pytest_configure(config):
    folders = config.getoption("--live")
    if folders and not hasattr(config, "workerinput"):  # of pytest-xdist, where one process collects the reports
        config.pluginmanager.register(Live(*folders))


def pytest_collection_modifyitems(config, items):
    """The tests marked ``gpu`` or ``kernels``, and all of the kernels' own."""
    if config.getoption("--all-tests"):
        return
    marked = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("kernels")]
    kept = [item for item in items if item in set(marked) or suite.is_of_kernels(item.path.name)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


class Live:
    def __init__(self, path: Path, known: Path):
        self.path, self.cases, self.written = path, [], 0.0
        self.record, self.sources = Record(path.parent, known), suite.pieces()
        self.left: Counter[str] = Counter()  # tests of a file that did not end
        self.failed: Counter[str] = Counter()  # or were not even collected

    def pytest_collection_finish(self, session):
        self._expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self._expect(ids)

    def _expect(self, ids):
        """Every worker of pytest-xdist collects the same."""
        self.left = self.left or Counter(map(_file, ids))

    def _note(self, file, state=None):
        count = self.failed[file]
        self.record.note("tests", file, self._sources(file), state or (f"{count} failed" if count else DONE))

    def _sources(self, file):
        return self.sources.get(file, "")

    def pytest_runtest_logstart(self, nodeid, location):
        file = _file(nodeid)
        if self.record.state("tests", file, self._sources(file)) != BEGUN:
            self._note(file, BEGUN)

    def pytest_runtest_logfinish(self, nodeid, location):
        file = _file(nodeid)
        self.left[file] -= 1
        if not self.left[file]:
            self._note(file)
            self.write()

    def pytest_runtest_logreport(self, report):
        """A test is its call, or what kept it from being called or went wrong after."""
        if report.when == "call" or not report.passed:
            name, _, test = report.nodeid.partition("::")
            case = ElementTree.Element("testcase", classname=name, name=test, time=f"{report.duration:.3f}")
            if report.failed:
                kind = "failure" if report.when == "call" else "error"
                self.failed[name] += 1
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
            self.failed[_file(report.nodeid)] += 1
            case = ElementTree.Element("testcase", classname=report.nodeid, name="collection", time="0")
            ElementTree.SubElement(case, "error", message="collection").text = _clean(report.longreprtext)
            self.cases.append(case)

    def pytest_sessionfinish(self, exitstatus):
        self.write(complete=exitstatus < 2)

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


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("E ")]
    return _clean(lines[0][1:].strip() if lines else text[:200])


def _clean(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(c for c in text if c in "\t\n\r" or ord(c) >= 32)
