"""Options of `pytest benchmarks`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-size", action="store_true", help="the benchmarks at full size instead of small shapes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_only"):
        config.option.benchmark_enable = True  # over the --benchmark-disable that pyproject.toml gives the tests
