"""Checks of what a layer's constructor is given: plain values come out, or a ``ValueError`` that names it."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from sae_fast.objectives.given import flag

__all__ = ["FLOATS", "average", "flag", "floating", "sizes", "whole"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def whole(name: str, value: Any, low: int = 1, high: int | None = None, wanted: str = "a positive int") -> int:
    """An int, numpy's too, from ``low`` to ``high``; a bool and a float are none."""
    if not _is_int(value) or value < low or (high is not None and value > high):
        raise ValueError(f"{name}: got {value!r}, want {wanted}")
    return int(value)


def average(name: str, value: Any, high: float, wanted: str) -> int | float:
    """A number 0 < value ≤ ``high``; an int where it is whole."""
    plain = value.item() if isinstance(value, np.generic) else value
    number: Any = plain if isinstance(plain, Real) and not isinstance(plain, bool) else 0
    if not 0 < number <= high:
        raise ValueError(f"{name}: got {value!r}, want {wanted}")
    return int(number) if number == int(number) else float(number)


def sizes(name: str, values: Any, total: int) -> tuple[int, ...]:
    """Positive ints that add up to ``total``, of a list, a tuple or an array."""
    try:
        listed = list(values)
    except TypeError:  # a number, None, an array without dimensions
        listed = []
    if not listed or not all(_is_int(n) and n > 0 for n in listed) or sum(map(int, listed)) != total:
        raise ValueError(f"{name}: got {values!r}, want positive ints whose sum is d_sae = {total}")
    return tuple(map(int, listed))


def floating(name: str, value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype) or value not in FLOATS:
        raise ValueError(f"{name}: got {value!r}, want a floating-point dtype of 16 bits or more")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
