"""Results as JSON files: whole or not there, and with ``null`` for what is not finite."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write(path: Path, value: Any) -> None:
    """Writes ``value`` (dicts, lists, tuples, numbers, strings) to ``path``, replacing what was there only when done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(_finite(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """As JSON has it: null for what was not reached."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
