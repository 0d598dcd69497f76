"""The bits of the flag by which a step on a GPU says, without being waited for, that it did not happen, and why."""

import triton.language as tl

OVERFLOW = 1  # more entries than the buffers have room for
NOT_FINITE = 2  # in x
STALE = 4  # W is not what its 16-bit copy was made from
NOT_FINITE_LOSS = 8
SHORT = 16  # a floor hid entries that are among the largest
DEAD = 32  # features that an aid is to revive

# What a kernel can read of this module.
overflow, not_finite, stale, short = map(tl.constexpr, (OVERFLOW, NOT_FINITE, STALE, SHORT))
not_finite_loss = tl.constexpr(NOT_FINITE_LOSS)
