"""Results as JSON files: whole or not there, and with ``null`` for what is not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sae_fast import files


def write(path: Path, value: Any) -> None:
    """Writes ``value`` (dicts, lists, tuples, numbers, strings) to ``path``, replacing what was there only when done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, _finite(value), indent=1)


def _finite(value: Any) -> Any:
    """As JSON has it: null for what was not reached."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
