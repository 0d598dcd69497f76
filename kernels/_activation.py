"""The activations in Triton, by their numbers in sae_fast/activations: values and pullback of a block of entries.

``first_ptr`` and ``second_ptr`` are the activation's vectors [F], None where it has fewer; ``i`` says of which features.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _relu(a):
    return tl.where(a <= 0, 0.0, a)  # keeps a NaN


@triton.jit
def magnitude_of(KIND: tl.constexpr, u, pi, first_ptr, second_ptr, i, inside):
    """The magnitudes of entries."""
    if KIND == 0:  # gated
        scale = tl.load(first_ptr + i, mask=inside, other=0.0).to(tl.float32)
        b_mag = tl.load(second_ptr + i, mask=inside, other=0.0).to(tl.float32)
        magnitude = tl.where(pi <= 0, 0.0, _relu(scale * u + b_mag))
    elif KIND == 1:  # relu
        magnitude = _relu(pi)
    elif KIND == 2:  # jumprelu
        threshold = tl.load(first_ptr + i, mask=inside, other=0.0).to(tl.float32)
        magnitude = tl.where(pi <= threshold, 0.0, _relu(pi))
    else:
        tl.static_assert(False, "an activation without its magnitudes")
    return magnitude


@triton.jit
def gate_of(pi):
    """The gates of entries, where the activation has two value sets."""
    return _relu(pi)


@triton.jit
def pullback_of(KIND: tl.constexpr, u, g_mag, g_gate, first_ptr, second_ptr, i, inside):
    """The gradients of u, the bias and the activation's parameters, 0 for those that it lacks, from those of the magnitudes
    and gates."""
    if KIND == 0:  # gated
        scaled = g_mag * tl.load(first_ptr + i, mask=inside, other=0.0).to(tl.float32)
        delta, bias, first, second = g_gate + scaled, g_gate, scaled * u, g_mag
    elif KIND <= 2:  # relu, jumprelu
        delta, bias, first, second = g_mag, g_mag, tl.zeros_like(g_mag), tl.zeros_like(g_mag)
    else:
        tl.static_assert(False, "an activation without its pullback")
    return delta, bias, first, second
