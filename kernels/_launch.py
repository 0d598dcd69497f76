"""The launch of every kernel: on its tensors' device; or only recorded, for compilation without a GPU (aot.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sae_fast.devices import on_device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once, when a kernel is defined


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: tuple
    options: dict[str, Any]


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches in the block are listed, not run; their tensors may be on the ``meta`` device."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def is_recording() -> bool:
    return _recorded is not None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``options``: the kernel's constexprs, num_warps and num_stages.  An empty grid is no launch."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, options))
        return
    if 0 in grid:
        return
    with on_device(next(a.device for a in arguments if isinstance(a, Tensor))):
        kernel[grid](*arguments, **options)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
