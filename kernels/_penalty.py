"""The penalties of objectives in Triton, by their numbers in sae_fast/penalty.py."""

from __future__ import annotations

import triton
import triton.language as tl

from sae_fast import penalty

# What a kernel can read of them.
LINEAR, POWER, ROOTED = tl.constexpr(penalty.LINEAR), tl.constexpr(penalty.POWER), tl.constexpr(penalty.ROOTED)
STEP, QUADRATIC, TARGET = tl.constexpr(penalty.STEP), tl.constexpr(penalty.QUADRATIC), tl.constexpr(penalty.TARGET)
TANH, TO_INPUT, OF_F = tl.constexpr(penalty.TANH), tl.constexpr(penalty.TO_INPUT), tl.constexpr(penalty.OF_F)


@triton.jit
def power(a, p):
    """aᵖ of what is positive, else 0; in float64."""
    return tl.where(a > 0, tl.exp2(p * tl.log2(tl.where(a > 0, a, 1).to(tl.float64))), 0.0)


@triton.jit
def of_row(PENALTY: tl.constexpr, values_ptr, begin, end, l0_ptr, b, c, number, ENTRIES: tl.constexpr):
    """An example's (penalty, slope that its entries share) in float64 [1], c the coefficient: of Σ aᵖ, a its values and p
    the number; or of its l0, for TARGET the batch's mean, of which the number is the target."""
    total = tl.zeros((1,), tl.float64)
    penalty, slope = total, total
    if (PENALTY == POWER) | (PENALTY == ROOTED):
        powers = tl.zeros((ENTRIES,), tl.float64)
        for j in range(begin, end, ENTRIES):
            at = j + tl.arange(0, ENTRIES)
            powers += power(tl.load(values_ptr + at, mask=at < end, other=0.0).to(tl.float32), number)
        total += tl.sum(powers, axis=0)
        penalty, slope = c * total, c + 0 * total
        if PENALTY == ROOTED:
            exponent = 1 / (number + 0 * total)
            penalty, slope = c * power(total, exponent), c * power(total, exponent - 1) * exponent
    elif (PENALTY == STEP) | (PENALTY == QUADRATIC):
        total += tl.load(l0_ptr + b).to(tl.float64)
        penalty, slope = c * total, c + 0 * total
        if PENALTY == QUADRATIC:
            off = total - number
            penalty, slope = c * (2 / number) * off * off, c * (4 / number) * off
    elif PENALTY == TARGET:
        off = (total + tl.load(l0_ptr)) / number - 1
        penalty, slope = c * off * off, c * (2 / number) * off
    return penalty, slope


@triton.jit
def of_entries(PENALTY: tl.constexpr, ZEROS: tl.constexpr, last, g, slope, c, norm, one, number):
    """(what entries of values ``last`` add to the penalty, g with the penalty's gradient, n / c times that
    with respect to the row's norm).  slope and one are divided by n."""
    own, of_norm = tl.zeros_like(last), tl.zeros_like(last)
    if PENALTY == TANH:
        x = number * last * norm
        e = tl.exp(-2 * tl.abs(x).to(tl.float64))
        squashed = (1 - e) / (1 + e)
        its_slope = (4 * e / ((1 + e) * (1 + e))).to(tl.float32)
        own, g = c * tl.where(x < 0, -squashed, squashed).to(tl.float32), g + its_slope * (norm * (number * c * one))
        of_norm = its_slope * (number * last)
    else:
        if PENALTY == LINEAR:
            own, penalised = c * norm * last, g + one * (c * norm)
        elif (PENALTY == POWER) | (PENALTY == ROOTED):
            penalised = g + slope * (number * power(last, number - 1)).to(tl.float32)
        else:
            penalised = g
        g = tl.where(last == 0, g if ZEROS else 0.0, penalised)
    return own, g, of_norm


@triton.jit
def estimate(WINDOW: tl.constexpr, PENALTY: tl.constexpr, pi, threshold, g, slope, bandwidth):
    """The gradients of (π, the threshold) by the windows of MATH.md §9, from those of the values."""
    fires = pi > threshold
    z, rest = (pi - threshold) / bandwidth, threshold / bandwidth
    inside = (z > -0.5) & (z < 0.5)
    ours = tl.where(inside, g * rest, 0.0)
    if PENALTY != TANH:
        step = inside.to(tl.float32)
        if WINDOW == OF_F:  # less what the feature's constant has for all examples
            step = (inside & fires).to(tl.float32) - (fires & (rest > -0.5) & (rest < 0.5)).to(tl.float32)
        ours += step * (slope / bandwidth)
    delta = tl.where(fires, g, 0.0)
    if WINDOW == TO_INPUT:
        delta += ours
    return delta, -ours
