"""Penalty: an objective's penalty as a GPU's kernels know it, by number.

The formulas are in kernels/_penalty.py for Triton, and in csrc/include/sae_fast/cuda/penalty.cuh for CUDA.
"""

from __future__ import annotations

from typing import NamedTuple

NONE, LINEAR, POWER, ROOTED, STEP, QUADRATIC, TARGET, TANH = range(8)
PI, TO_INPUT, OF_F = 1, 2, 3  # straight-through windows: around the threshold, with a slope for π too, L0's "f"


class Penalty(NamedTuple):
    """``native``: its number.  ``number``: the exponent of a power, the target of l0, the scale of tanh.  ``window``: the
    number of the straight-through windows, 0 for none, and ``bandwidth`` theirs."""

    native: int = NONE
    number: float = 0.0
    window: int = 0
    bandwidth: float = 1.0
