"""The ways to a code's support (sae_fast/ops/cpu.py), each forced on any machine.

The screen needs a bfloat16 product that sums in float32.  Where the processor has none it is emulated: the same operands in
float32, rounded to bfloat16 at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sae_fast.ops.encode import bound, cpu, largest, screen

TERMS = ("x_residual", "low_residual", "accumulation", "w_residual", "w_outliers", "bias", "least")  # Screen::Term
BOUNDED = ("screen", "bound")  # the ways by a product that bounds
WAYS = (*BOUNDED, "dots")
OF_TORCH = screen.product
WHY_NOT = screen.unavailable()  # why this processor has no such product, or None


def emulated_product(rows: Tensor, operand: Tensor, out: Tensor) -> Tensor:
    return out.copy_(rows.float() @ operand.float().T)


def product_in_order(rows: Tensor, operand: Tensor, out: Tensor) -> Tensor:
    """A column after the other: what is small beside the sum so far is lost."""
    total = torch.zeros(out.shape, device=out.device)
    for a, b in zip(rows.float().T, operand.float().T, strict=True):
        total.addr_(a, b)
    return out.copy_(total)


def take_product(patch: pytest.MonkeyPatch, way: str) -> None:
    """A processor with a bfloat16 product ("screen") or without one ("bound"), whatever this one has."""
    if way == "bound":
        patch.setattr(screen, "unavailable", lambda: "this is a test")
    elif screen.unavailable() is not None:
        patch.setattr(screen, "unavailable", lambda: None)
        if screen.product is OF_TORCH:
            patch.setattr(screen, "product", emulated_product)


def take_bf16_away() -> None:
    """The whole run is one on a processor without a bfloat16 product (--without-bf16)."""
    global WHY_NOT
    WHY_NOT = "taken away by --without-bf16"
    screen.unavailable = lambda: WHY_NOT


@contextmanager
def forced(way: str, dense_above: float = 2.0, without: dict[str, float] | None = None, **settings: int) -> Iterator[None]:
    """Every batch takes one of WAYS.  ``without``: factors of the bound's terms; ``settings``: of _support, or ROOM."""
    rows = 2**62 if way == "dots" else 0
    terms = torch.ones(len(TERMS), dtype=torch.float64)
    for term, factor in (without or {}).items():
        terms[TERMS.index(term)] = factor
    with pytest.MonkeyPatch.context() as patch:
        if way in BOUNDED:
            take_product(patch, way)
        patch.setattr(cpu, "FEW_ROWS", {"shadow": rows, "no shadow": rows})
        patch.setattr(cpu, "DENSE_ABOVE", dense_above)
        patch.setattr(largest, "DENSE_ABOVE", 2.0)
        patch.setattr(screen, "TERMS", terms)
        patch.setattr(bound, "ROWS", 0)
        for name, value in settings.items():
            patch.setattr(largest if name == "ROOM" else cpu, name, value)
        yield
