"""The tests' own house: a room for every test, and what rooms share in none of them."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import mutants
import pytest
import torch
from helpers import randn, random_code
from problems.ranks import of_two_ranks, with_ranks

from sae_fast import ops, use_backend

TESTS = Path(__file__).parents[1]
FILES = sorted(path for path in TESTS.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, and the names that it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(alias.name for alias in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_nothing_imports_a_test_module(path):
    """What two of them need is in problems/ or helpers.py."""
    tests = {file.stem for file in FILES if file.name.startswith("test_")}
    assert not {part for name in imported(path) for part in name.split(".")} & tests


def test_every_test_is_in_a_room_under_a_name_of_its_own():
    """pytest imports them by their names alone."""
    tests = [file for file in FILES if file.name.startswith("test_")]
    assert all(len(file.relative_to(TESTS).parts) == 2 for file in tests)
    assert len({file.name for file in tests}) == len(tests)


def test_every_planted_fault_has_its_place():
    """What moves takes its faults along (tests/mutants.py)."""
    faults = [mutant for group in mutants.GROUPS.values() for mutant in group]
    lost = [it.name for it in faults if (TESTS.parent / it.file).read_text("utf-8").count(it.old) != 1]
    assert len(faults) > 200 and not lost


# Besides wait_until: how long a write takes, which is killed in its midst; a page's goal, ten times over; what took long; a
# GPU's events.
LOOK_AT_THE_CLOCK = {
    "helpers.py", "fake_gpu.py", "test_files.py", "test_page_browser.py", "test_gpu_runner.py", "matrix.py", "mutants.py",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_verdict_hangs_on_how_busy_the_machine_is(path):
    """What may hang has PATIENCE, or as long as it gets on."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("monotonic", "perf_counter"):
            assert path.name in LOOK_AT_THE_CLOCK, f"line {node.lineno}: wait_until of helpers.py waits"
        elif isinstance(node, ast.keyword) and node.arg == "timeout" and path.name != "ranks.py":
            assert not isinstance(node.value, ast.Constant), f"line {node.value.lineno}: a limit that is not PATIENCE"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which runs the kernels")
def test_a_kernel_in_the_quickened_interpreter_leaves_tritons_language_as_it_was():
    tl = pytest.importorskip("triton.language")

    def after_a_kernel() -> list[dict]:
        with use_backend("triton"):
            ops.decode(random_code(3, 8), randn(8, 5))
        return [dict(vars(space)) for space in (tl, tl.core, tl.math, tl.tensor)]

    assert after_a_kernel() == after_a_kernel()
    assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.core.load)


def wait_for_nobody(rank, log):
    """One rank waits for a sum to which the other adds nothing, which stands still meanwhile."""
    if rank == 0:
        torch.distributed.all_reduce(torch.ones(1))
    threading.Event().wait()


@pytest.mark.slow
@with_ranks
def test_ranks_that_wait_for_each_other_fail_and_say_where_they_stand(tmp_path):
    with pytest.raises(pytest.fail.Exception) as failure:
        of_two_ranks(wait_for_nobody, tmp_path, patience=20)
    first, second = str(failure.value).split("rank1.log")
    assert "all_reduce" in first and "in wait_for_nobody" in first
    assert "all_reduce" not in second and "in wait_for_nobody" in second
