"""The Shadow of an encoder's weight, its 16-bit copy and the norms that bound what rounding took: made, refreshed,
compared, kept.  Which form it has follows from the device: the C++ engine's (bfloat16) or the GPU kernels' (float16)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.code import Shadow
from sae_fast.ops import checks
from sae_fast.ops.dispatch import cpu_rejects, triton_rejects
from sae_fast.ops.encode import screen
from sae_fast.ops.native import _C, in_memory, threads


def make_shadow(W: Tensor) -> Shadow:
    """The Shadow of W [F, d], in one pass.  It holds as long as W's values do."""
    checks.memory("W", W)
    W = W.detach().contiguous()
    if triton_rejects(W) is None:
        from sae_fast.kernels.round import rounded

        return Shadow(*rounded(W))
    checks.engine_weight(W)
    return Shadow(*screen.round_rows(W, W.shape[1]))


def refresh_shadow(W: Tensor, shadow: Shadow) -> None:
    """Brings a Shadow up to date with its W, in place."""
    checks.memory("W", W)
    checks.shadow(W, *shadow)
    if shadow.of_gpu:
        from sae_fast.kernels.round import round_rows

        return round_rows(W.detach(), *shadow)
    n, d = W.shape
    _C.round_rows(A=W, n=n, d=d, K=d, out=shadow.rows, norms=shadow.norms, threads=threads())


def stale_rows(W: Tensor, shadow: Shadow, first: int, last: int) -> int:
    """The number of rows of W[first:last] that are no longer what the Shadow was made from.  Synchronises on a GPU."""
    checks.memory("W", W)
    checks.shadow(W, *shadow)
    part = Shadow(*(t[first:last] for t in shadow))
    if shadow.of_gpu:
        from sae_fast.kernels.round import compare_rows

        flags = torch.zeros(last - first, dtype=torch.int32, device=W.device)
        compare_rows(W[first:last], *part, flags)
        return int(flags.count_nonzero())
    return _C.stale_rows(
        A=W[first:last], n=last - first, d=W.shape[1], rounded=part.rows, norms=part.norms, threads=threads()
    )


def stale_columns(W: Tensor, shadow: Shadow, turn: int) -> Tensor:
    """0-d bool: whether, in 16 columns of W, others at each ``turn``, rows are no longer what the Shadow was made from.

    For the price of a cache line a row it finds rows that were replaced, scaled or zeroed, which shows in any column; what
    is finer, or in a few columns only, is left to :func:`stale_rows`.
    """
    first = 16 * (turn % -(-W.shape[1] // 16))
    now, kept = W.detach()[:, first : first + 16], shadow.rows[:, first : min(first + 16, W.shape[1])]
    if shadow.of_gpu:
        now = now * shadow.norms[:, :1]
    # The engine's copy has 0 for subnormals; a NaN is no difference, but for the step to find.
    return (now.to(kept.dtype).float() - kept.float()).abs().amax() >= torch.finfo(kept.dtype).tiny


class KeptShadow:
    """A Shadow that is kept across calls, for whoever knows when its weight changes."""

    def __init__(self) -> None:
        self.shadow: Shadow | None = None
        self._made_from: tuple[Tensor, int] | None = None  # W's memory, held so that nothing else gets its address

    def __reduce__(self) -> tuple:
        return KeptShadow, ()  # a copy starts anew

    def of(self, W: Tensor) -> Shadow | None:
        """The Shadow of W, made anew if W is another tensor or torch has counted a change; None where none serves, or where
        torch wraps what is made: the op makes its own."""
        if not in_memory(W) or (triton_rejects(W) and (cpu_rejects(W) or screen.unavailable())):
            return None
        if not self.serves(W):
            if not in_memory(torch.empty(0, device=W.device)):
                return None
            self.shadow = make_shadow(W)
            self.follows(W)
        return self.shadow

    def serves(self, W: Tensor) -> bool:
        """True if what is kept is W's, as far as torch counts changes, and of the form that its kernels take."""
        if self.shadow is None or self._made_from is None or W.is_inference():  # of which torch counts no changes
            return False
        memory, version = self._made_from
        if not in_memory(W) or (W.shape, W.stride(), W._version) != (memory.shape, memory.stride(), version):
            return False
        return W.data_ptr() == memory.data_ptr() and self.shadow.of_gpu == (triton_rejects(W) is None)

    def follows(self, W: Tensor) -> None:
        """W has changed, and the Shadow with it."""
        self._made_from = W.detach(), 0 if W.is_inference() else W._version
