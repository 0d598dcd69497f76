"""Checks of what a constructor is given: plain values come out, or a ``ValueError`` that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def number(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
    """An int or a float, of numpy's too, that ``fits``; a bool is none."""
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, Real) and not isinstance(plain, bool):
        plain = int(plain) if isinstance(plain, Integral) else float(plain)
        if fits(plain):
            return plain
    raise ValueError(f"{name}: got {value!r}, want {wanted}")


def numbers(name: str, values: Any, fits: Callable[[Any], bool], wanted: str) -> tuple[Any, ...]:
    """Those of a list, a tuple or an array, each of which ``fits``."""
    try:
        listed = tuple(() if isinstance(values, str) else values)
        return tuple(number(name, value, fits, wanted) for value in listed or [None])
    except (TypeError, ValueError):  # a number, None, an array without dimensions
        raise ValueError(f"{name}: got {values!r}, want {wanted}") from None


def whole(name: str, value: Any, low: int = 1, high: float = inf, wanted: str = "a positive int") -> int:
    """An int from ``low`` to ``high``; a float is none."""
    return number(name, value, lambda n: isinstance(n, int) and low <= n <= high, wanted)


def average(name: str, value: Any, high: float, wanted: str) -> int | float:
    """A number 0 < value ≤ ``high``; an int where it is whole."""
    given = number(name, value, lambda n: 0 < n <= high, wanted)
    return int(given) if given == int(given) else given


def sizes(name: str, values: Any, total: int) -> tuple[int, ...]:
    """Positive ints that add up to ``total``."""
    wanted = f"positive ints whose sum is d_sae = {total}"
    listed = numbers(name, values, counts, wanted)
    if sum(listed) != total:
        raise ValueError(f"{name}: got {values!r}, want {wanted}")
    return listed


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: got {value!r}, want True or False")
    return bool(value)


def floating(name: str, value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype) or value not in FLOATS:
        raise ValueError(f"{name}: got {value!r}, want a floating-point dtype of 16 bits or more")
    return value


def positive(value: Any) -> bool:
    return 0 < value < inf


def counts(value: Any) -> bool:
    return isinstance(value, int) and value > 0
