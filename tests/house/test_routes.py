"""A run of the tests that leaves a path out, or skips for a reason of its own, is a failed run."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import routes
from helpers import randn

from sae_fast import ops, use_backend
from sae_fast.ops.dispatch import _C

TESTS = Path(__file__).parents[1]
CONFTEST = """
import routes

def pytest_configure(config):
    config.pluginmanager.register(routes.Report(config))
"""


@pytest.mark.parametrize("reason, processes", [("not today", 1), ("needs two GPUs", 0)])
def test_a_skip_fails_the_run_unless_nothing_can_be_done_about_it(reason, processes, tmp_path):
    """Of a test or a module; also where pytest-xdist's processes report it."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_a.py").write_text(f'import pytest\npytest.skip("{reason}", allow_module_level=True)\n')
    (tmp_path / "test_b.py").write_text(f'import pytest\ndef test_it():\n    pytest.skip("{reason}")\n')
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider", "-n", str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "PYTEST_ADDOPTS": ""}
    run = subprocess.run([*command, "."], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == (1 if reason == "not today" else 0), run.stdout + run.stderr
    assert ("2 skipped for a reason that is not allowed: Skipped: not today" in run.stdout) == (reason == "not today")


def report_of(**options) -> routes.Report:
    usual = dict(file_or_dir=[], keyword="", markexpr="not slow", verbose=0, lf=False) | options
    return routes.Report(SimpleNamespace(option=SimpleNamespace(**usual), getoption=lambda name, default: usual[name]))


def test_a_whole_run_has_to_fill_every_cell(monkeypatch):
    monkeypatch.setattr(routes, "_blocks", Counter())
    monkeypatch.setattr(routes, "_calls", Counter())
    with use_backend("cpu"):
        ops.encode(randn(3, 5), randn(8, 5), randn(8), activation="relu")
    isa = _C.isa()
    faults = report_of().faults()
    assert f"no test took encode's route 'dots' in {isa}" not in faults
    assert f"no test took encode's route 'screen' in {isa}" in faults
    assert "no test ran encode in its body 'triton'" in faults and "no test ran encode in its body 'cpu'" not in faults
    assert len(faults) == 5 * len(_C.supported_isas()) - 1 + 3
    for part in (
        dict(file_or_dir=["tests/layers/test_nn.py"]),
        dict(keyword="encode"),
        dict(markexpr="slow"),
        dict(lf=True),
    ):
        assert not report_of(**part).faults()
    lines = routes.table()
    assert len({len(line) for line in lines[:8]}) == 1, "aligned"
    missing = [name for name in routes.ISAS if name not in _C.supported_isas()]
    assert lines[1].count("not on this processor") == len(missing)
