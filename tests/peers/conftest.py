"""Tests against the packages whose place the drop-ins take, in an environment of their own (make test-peers)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if not (find_spec("dictionary_learning") and find_spec("sae_lens")):
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if "peers" in item.path.parts:
            item.add_marker(pytest.mark.peers)
