"""encode on a GPU: the rows' blocks one after another, each by the way that its candidates ask for.

screen    float16 product with a proven bound, its candidates decided by float32 dots (precision "exact"; with "bf16" the
          product alone decides a threshold; of the largest, the dots of the 16-bit copies do)
product   torch's product decides, row chunk by row chunk: precision "fp32" and "tf32", and blocks so dense that gathering
          rows of W for each candidate would take longer

The largest are looked for above a floor of each row: a guess, then one from some of the features, then, for the rows whose
k-th largest lies below, one from torch's product that they cannot fail.  docs/screen.md, "Against a floor" on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor

from sae_fast.code import Layer, Shadow
from sae_fast.ops import crossovers
from sae_fast.ops.encode import dense

WIDEST = 2**15  # columns for which the float32 sums of squares are as exact as the bound assumes
MASK = 2**31  # entries of a block of rows: a bit each, 256 MiB


def rejects(x: Tensor, choice: dense.Choice | None = None) -> str | None:
    if choice is not None and (choice.signed or choice.k != int(choice.k)):
        return f"support {choice.support!r} with k = {choice.k:g} takes the dense route on a GPU"
    if x.shape[1] > WIDEST:
        return f"rows of {x.shape[1]} are wider than {WIDEST}, up to which the bound is proven"
    return None


def screened_code(x: Tensor, layer: Layer, precision: str) -> dense.Found:
    """The code of x [B, d], whose support is by threshold."""
    from sae_fast.kernels.compact import pack
    from sae_fast.kernels.encode import candidates, members

    if precision in ("fp32", "tf32") or x.shape[0] == 0:
        with _tf32(precision == "tf32"):
            return dense.dense_code(x, layer, chunked=True)
    exact, layer = precision == "exact", _with_shadow(layer)
    parts = []
    for rows in _blocks(x, layer):
        screened = candidates(rows, layer, exact)
        total = screened.total()
        if crossovers.gpu_rejects(total, rows.shape[0], layer.W.shape[0]):
            with _tf32(False):
                parts.append(dense.dense_code(rows, layer, chunked=True))
            continue
        flag = torch.zeros((), dtype=torch.int32, device=x.device)
        parts.append(pack(*members(rows, layer, screened, total, flag, exact)))
    return dense.join(parts)


def _with_shadow(layer: Layer) -> Layer:
    from sae_fast.kernels.round import rounded

    return layer._replace(shadow=layer.shadow or Shadow(*rounded(layer.W)))


def _blocks(x: Tensor, layer: Layer) -> tuple[Tensor, ...]:
    return x.split(max(1, MASK // layer.W.shape[0]))


# ---- The largest ------------------------------------------------------------------------------------------------------

EVERY = 8  # features, and rows of a batch, of which one is in a sample
DEVIATIONS = 3  # by which a sample's floor is below what it estimates: few rows come short
EXCESS = 8  # candidates for each entry that is wanted, from which on another floor is looked for
Floor = Callable[[Tensor], Tensor]  # of rows x [B, d], [B] float32; what is not above 0 is none


def largest_code(
    x: Tensor, layer: Layer, k: int, whole: bool, precision: str, guess: Tensor | None = None
) -> dense.Found:  # fmt: skip
    """The code of the k largest π > 0 of each row of x [B, d], or, if ``whole``, of the k · B largest."""
    from sae_fast.kernels.compact import pack
    from sae_fast.kernels.largest import Largest

    B, exact, layer = x.shape[0], precision == "exact", layer._replace(cut=None)
    if precision in ("fp32", "tf32") or B == 0 or crossovers.gpu_rejects(k * B, B, layer.W.shape[0]):
        with _tf32(precision == "tf32"):
            return dense.dense_code(x, layer, dense.Choice("batch_topk" if whole else "topk", k))
    layer, parts = _with_shadow(layer), []
    floors: list[Floor] = [
        lambda rows: floor_of_sample(rows, layer, k, whole),
        lambda rows: sure_floor(rows, layer, k, whole, exact),
        lambda rows: rows.new_zeros(rows.shape[0], dtype=torch.float32),
    ]
    first = 0
    for rows in (x,) if whole else _blocks(x, layer):
        own = [] if guess is None else [lambda rows, at=first: guess[at : at + rows.shape[0]].float()]
        parts.append(pack(*_above_floors(rows, layer, Largest(k, whole), exact, own + floors)))
        first += rows.shape[0]
    return dense.join(parts)


def _above_floors(x: Tensor, layer: Layer, which: Any, exact: bool, floors: list[Floor]) -> Any:
    """The Gapped code of the largest; rows that come short of a floor are taken with the next."""
    from sae_fast.kernels.encode import candidates, members

    floor, *others = floors
    which = which._replace(floor=floor(x))
    screened = candidates(x, layer, exact, floor=which.floor)
    total = screened.total()
    if len(others) > 1 and total > EXCESS * which.k * x.shape[0]:
        return _above_floors(x, layer, which, exact, others)
    flag = torch.zeros((), dtype=torch.int32, device=x.device)
    code = members(x, layer, screened, total, flag, exact, which)
    if not int(flag):
        return code
    if which.whole:
        return _above_floors(x, layer, which, exact, others)
    short = ((code.begin == code.end) & (which.floor > 0)).nonzero()[:, 0]
    again = _above_floors(x[short], layer, which, exact, others)
    begin, end = code.begin.clone(), code.end.clone()
    begin[short], end[short] = again.begin + total, again.end + total
    entries = (torch.cat(pair, -1) for pair in zip(code[2:], again[2:], strict=True))
    return type(code)(begin, end, *entries)


def floor_of_sample(x: Tensor, layer: Layer, k: int, whole: bool, deviations: float = DEVIATIONS) -> Tensor:
    """[B] float32: what the k-th largest π of each row of x [B, d] reaches in all likelihood, judged by some of the
    features, or, if ``whole``, the k · B-th of all, by some of the rows too.  Does not wait for a GPU."""
    W, bias = layer.W[::EVERY], layer.bias[::EVERY]
    rows = x[::EVERY] if whole else x
    share, wanted = W.shape[0] / layer.W.shape[0], k * rows.shape[0] if whole else k
    # For each entry in the sample there are 1 / share in all, give or take some deviations.
    spread = deviations * (1 - share) ** 0.5
    rank = ceil(((spread + (spread * spread + 4 * wanted * share) ** 0.5) / 2) ** 2)
    with _tf32(True):
        if whole:
            return _nth((rows @ W.T + bias).float().flatten(), rank).expand(x.shape[0]).contiguous()
        chunks = crossovers.chunks(x.shape[0], W.shape[0], x.device.type)
        return torch.cat([_nth((x[first:last] @ W.T + bias).float(), rank) for first, last in chunks])


def _nth(pi: Tensor, n: int) -> Tensor:
    """The n-th largest along the last dimension, 0 where there are fewer."""
    return pi.topk(n, sorted=False).values.amin(-1) if n <= pi.shape[-1] else pi.new_zeros(pi.shape[:-1])


def sure_floor(x: Tensor, layer: Layer, k: int, whole: bool, exact: bool) -> Tensor:
    """[B] float32: a floor that k entries of each row reach, or, if ``whole``, k · B of all: by torch's product, less all
    by which the dots that decide may differ from it."""
    W, bias = layer.W.float(), layer.bias.float()
    # Two float32 sums, or one of rounded operands, for which 2^-10 is enough.
    error = 2.1 * (x.shape[1] + 8) * 2.0**-23 + 2.0**-20 + (0 if exact else 2.0**-9)
    sizes, slack = error * W.norm(dim=1), 2.0**-20 * bias.abs()
    parts, best = [], W.new_empty(0)
    for first, last in crossovers.chunks(x.shape[0], W.shape[0], x.device.type):
        rows = x[first:last].float()
        with _tf32(False):
            least = rows @ W.T + (bias - slack) - rows.norm(dim=1)[:, None] * sizes
        if whole:
            best = torch.cat([best, least.flatten()])
            best = best.topk(min(k * x.shape[0], best.shape[0])).values
        else:
            parts.append(_nth(least, k))
    return _nth(best, k * x.shape[0]).expand(x.shape[0]).contiguous() if whole else torch.cat(parts)


@contextmanager
def _tf32(allowed: bool):
    """True if CUDA's products of float32 may round their operands."""
    matmul: Any = torch.backends.cuda.matmul
    name, value = "allow_tf32", allowed  # type: tuple[str, str | bool]
    try:
        before = matmul.allow_tf32
    except RuntimeError:  # the program has used the newer name, after which the older one raises
        name, value = "fp32_precision", "tf32" if allowed else "ieee"
        before = matmul.fp32_precision
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)
