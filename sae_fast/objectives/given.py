"""Checks of what an objective and its parts are given: plain values, or a ``ValueError`` that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from numbers import Real
from typing import Any

import numpy as np


def number(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
    """A Python number, of numpy's too, that ``fits``; a bool is none."""
    plain = value.item() if isinstance(value, np.generic) else value
    if not isinstance(plain, Real) or isinstance(plain, bool) or not fits(plain):
        raise ValueError(f"{name}: got {value!r}, want {wanted}")
    return plain


def numbers(name: str, values: Any, fits: Callable[[Any], bool], wanted: str) -> tuple[Any, ...]:
    """Those of a list, a tuple or an array, each of which ``fits``."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name}: got {values!r}, want {wanted}")
    try:
        return tuple(number(name, value, fits, wanted) for value in values)
    except ValueError:
        raise ValueError(f"{name}: got {tuple(values)}, want {wanted}") from None


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: got {value!r}, want True or False")
    return bool(value)


def positive(value: Any) -> bool:
    return 0 < value < inf


def counts(value: Any) -> bool:
    return isinstance(value, int) and value > 0
