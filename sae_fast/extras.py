"""Optional dependencies: import one when it is first needed, and say what to install when it is not there."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """A feature was asked for whose optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise MissingExtra with the command that installs the extra it belongs to."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:  # it is there, and something of its own is broken
            raise
        remedy = f"pip install 'sae-fast[{extra}]'"
        raise MissingExtra(f"this needs {error.name!r}, which is not installed: {remedy}") from error
