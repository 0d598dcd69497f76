"""The tests' own house: a room for every test, and what rooms share in none of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

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
