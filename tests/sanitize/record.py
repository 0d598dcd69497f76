"""Writes down every call that the ops make to the C++ engine, with its arrays before and after: what driver.cpp replays
under the sanitizers, without Python or torch.  ``python record.py FILE``.

The file is a sequence of lines:
    bytes SIZE              and then so many bytes; they are numbered from 0 and stored once
    call NAME COUNT         and then COUNT arguments, each one of
      number VALUE
      array DTYPE OLD NEW     the numbers of the bytes before and after the call
    result VALUE            of the call
Objects of the engine (Screen, Layer, Adam) and tuples are written as their parts, sources after their number.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import torch
from torch import Tensor

import sae_fast.ops
from sae_fast import _C, ops
from sae_fast.activations import named
from sae_fast.code import Layer, RowGradient, SparseCode
from sae_fast.ops import crossovers
from sae_fast.ops.encode import bound, cpu, largest, screen

DTYPES = {torch.bfloat16: "h", torch.int32: "i", torch.int64: "l", torch.float32: "f", torch.float64: "d"}
LONG = 2 * _C.run + 57  # rows: more than two runs of a feature that is active on each

# (B, d, F).  Above 8 and 64, the grains by which rows and features are shared, several threads have work.
SHAPES = [
    (1, 1, 1), (3, 1, 33), (57, 1, 400), (57, 63, 1), (1, 63, 33), (3, 63, 400), (3, 100, 1), (57, 100, 33), (1, 100, 400),
    (1, 129, 1), (3, 129, 33), (57, 129, 400),
]  # fmt: skip


# ---- Recording ------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for sae_fast._C."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.stored: dict[bytes, int] = {}  # by digest
        for name in ("Screen", "Layer", "Adam"):  # constants: what they are made of is written where they are used
            setattr(self, name, _remembers_its_arguments(getattr(_C, name)))

    def __getattr__(self, name: str) -> Callable:
        return partial(self.call, name, getattr(_C, name))

    def Compactor(self, **of: Any) -> Methods:
        return Methods(self, "Compactor", self.call("Compactor", _C.Compactor, **of))

    def Largest(self, **of: Any) -> Methods:
        return Methods(self, "Largest", self.call("Largest", _C.Largest, **of))

    def call(self, name: str, function: Callable, *args: Any, **of: Any) -> Any:
        flat = list(_flatten([*args, *of.values()]))
        before = [self._store(a) if isinstance(a, Tensor) else None for a in flat]
        result = function(*args, **of)
        lines: list[tuple] = [("call", name, len(flat))]
        for a, old in zip(flat, before, strict=True):
            if isinstance(a, Tensor):
                lines.append(("array", DTYPES[a.dtype], old, self._store(a)))
            else:
                lines.append(("number", float(a or 0).hex()))
        for line in (*lines, ("result", int(result) if isinstance(result, int) else 0)):
            self._line(*line)
        return result

    def _store(self, tensor: Tensor) -> int:
        content = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""
        digest = hashlib.sha256(content).digest()
        if digest not in self.stored:
            self.stored[digest] = len(self.stored)
            self._line("bytes", len(content))
            self.file.write(content)
        return self.stored[digest]

    def _line(self, *words: object) -> None:
        self.file.write(" ".join(map(str, words)).encode() + b"\n")


class Methods:
    def __init__(self, recorder: Recorder, kind: str, of: Any):
        self.recorder, self.kind, self.of = recorder, kind, of

    def __getattr__(self, name: str) -> Callable:
        return partial(self.recorder.call, f"{self.kind}.{name}", getattr(self.of, name))


def _remembers_its_arguments(base: type) -> type:
    def __init__(self, **of):
        base.__init__(self, **of)
        self.of = of

    return type(base.__name__, (base,), {"__init__": __init__})


def _flatten(args: Iterable[Any]) -> Iterator[Any]:
    for a in args:
        if isinstance(a, tuple) and isinstance(a[0], list | tuple):  # sources
            yield len(a[0])
            yield from (*a[0], *a[1])
        elif isinstance(a, tuple):
            yield from a
        elif isinstance(a, list):
            yield torch.tensor(a, dtype=torch.int64)
        elif hasattr(a, "of"):
            yield from a.of.values()
        else:
            yield a


# ---- Problems -------------------------------------------------------------------------------------------------------


def grid(*shape: int, reach: int, seed: int) -> Tensor:
    """Integers up to ±reach: sums of their products are exact in float32, so that the instruction sets agree on what is
    active, whichever way they sum."""
    return torch.randint(-reach, reach + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def code_of(member: Tensor, V: int) -> SparseCode:
    nnz = int(member.sum())
    indptr = torch.zeros(member.shape[0] + 1, dtype=torch.int64)
    indptr[1:] = member.sum(1).cumsum(0)
    values = randn(V, nnz, seed=nnz).abs() * (randn(V, nnz, seed=nnz + 1) > -1)
    return SparseCode(member.shape, indptr, member.nonzero()[:, 1].int(), randn(nnz, seed=nnz + 2), values)


def layer(B: int, d: int, F: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and bias with a twentieth of the entries active, and everything that the screen has a way of its own for."""
    fine, coarse = (grid(n, d, reach=reach, seed=B + n) for n, reach in ((B, 511), (F, 31)))
    if d % 2:
        x, W = fine, coarse
        x[:, :: max(d // 3, 2)] *= 64  # outlier columns
    else:
        x, W = fine.clamp(-31, 31), grid(F, d, reach=511, seed=B)
    u = x @ W.T
    bias = -u.quantile(0.95, dim=0).round()
    if B > 9:
        x[1], x[2], x[3], x[4, 0], x[5, 0] = 0, x[2] * 2.0**50, x[3] * 2.0**-60, torch.nan, torch.inf
    if F > 9:
        W[1], W[2], W[3], bias[4], bias[5], bias[6] = 0, W[2] * 2.0**45, W[3] * 2.0**-60, 2.0**101, -torch.inf, 2.0**30
    return x, W, bias


# ---- Calls ----------------------------------------------------------------------------------------------------------


def record_encode(B: int, d: int, F: int) -> None:
    """Every way to the support, in one tile and row block or in several."""
    x, W, bias = layer(B, d, F) if B else (torch.empty(0, d), torch.ones(F, d), torch.ones(F))
    r_mag, b_mag, threshold = (0.1 * randn(F, seed=s) for s in (1, 2, 3))
    ways: dict[str, dict] = {
        "exact": {"precision": "exact"},
        "shadow": {"precision": "exact", "shadow": ops.make_shadow(W)},
        "fp32": {"precision": "fp32"},
        "bf16": {"precision": "bf16"},
    }
    activations: list[dict] = [
        {"activation": "gated", "r_mag": r_mag, "b_mag": b_mag},
        {"activation": "relu", "slack": 500.0},
        {"activation": "jumprelu", "threshold": 100 * threshold.round()},
    ]
    for i, kinds in enumerate(ways.values()):
        for activation in activations:
            with patch.multiple(cpu, TILE=1 if i % 2 else 2**21, ROWS=2048 if i % 2 else 20):
                ops.encode(x, W, bias, **activation, **kinds)
    for dense_above in (0.0, 1.0):  # all candidates dotted densely; none
        with patch.object(cpu, "DENSE_ABOVE", dense_above):
            ops.encode(x, W, bias, **activations[0])
    for activation in activations:
        for dense_above in (0.2, 2.0):
            with (
                patch.object(screen, "unavailable", lambda: "torch's product is the bound"),
                patch.multiple(cpu, TILE=1, ROWS=20, FEW_ROWS={"shadow": 0, "no shadow": 0}, DENSE_ABOVE=dense_above),
                patch.object(bound, "ROWS", 0),
            ):
                ops.encode(x, W, bias, **activation)
    with patch.object(cpu, "FEW_ROWS", {"shadow": 10**9, "no shadow": 10**9}):
        ops.encode(x, W, bias, **activations[0])
        ops.encode(x, W, bias + 10.0**6, activation="relu")  # all active
        ops.encode(x, W, bias - 10.0**38, activation="relu")  # none


def record_largest(B: int, d: int, F: int) -> None:
    """topk and batch_topk, by every way; floors after each tile, and blocks that the floor does not thin."""
    x, W, bias = layer(B, d, F) if B else (torch.empty(0, d), torch.ones(F, d), torch.ones(F))
    often = bias + 10.0 ** (3 if d > 1 else 1)  # more than the k, and ties
    guess = torch.linspace(-1.0, 10.0**4, B)  # too low for some rows, too high for others
    for support, k in (("topk", 1), ("topk", F), ("topk", max(1, F // 20)), ("batch_topk", max(1, F // 20))):
        kind: dict = {"activation": "relu", "support": support, "k": k}
        for precision, dense_above in (("exact", 0.0), ("exact", 1.0), ("fp32", 1.0), ("bf16", 1.0)):
            with (
                patch.multiple(cpu, TILE=1, ROWS=20, DENSE_ABOVE=dense_above),
                patch.multiple(largest, ROOM=0, DENSE_ABOVE=2.0),
            ):
                ops.encode(x, W, often, **kind, precision=precision)
                ops.encode(x, W, often, **kind, precision=precision, guess=guess)
        with patch.object(largest, "DENSE_ABOVE", -1.0):
            ops.encode(x, W, bias, **kind)
        with (
            patch.object(screen, "unavailable", lambda: "torch's product is the bound"),
            patch.multiple(cpu, TILE=1, ROWS=20, FEW_ROWS={"shadow": 0, "no shadow": 0}),
            patch.multiple(largest, ROOM=0, DENSE_ABOVE=2.0),
            patch.object(bound, "ROWS", 0),
        ):
            ops.encode(x, W, often, **kind)
            ops.encode(x, W, often, **kind, guess=guess)


def record_shadow(d: int, F: int) -> None:
    W = randn(F, d, seed=F)
    shadow = ops.make_shadow(W)
    ops.stale_rows(W, shadow, 0, F)
    W[F // 2 :] += 1
    ops.stale_rows(W, shadow, 0, F)
    ops.refresh_shadow(W, shadow)


def record_code(code: SparseCode, d: int) -> None:
    """Everything that takes a code."""
    B, F = code.shape
    V = code.values.shape[0]
    A, W, vector = randn(B, d, seed=1), torch.nn.functional.normalize(randn(F, d, seed=2), dim=1), randn(F, seed=3).abs()
    ops.decode(code, W, code.values)
    ops.decode(code, W, code.values, groups=[F // 4, F // 2, F])
    ops.sampled_dots(code, A, W)
    ops.decode_loss(code, W, A[:1].sum(0), A, vector, float(max(B, 1)))
    for ends, weights in (([F], None), (sorted({1, max(1, F // 4), max(1, F // 2), F}), vector)):
        weights = weights if weights is None else weights[: len(ends)].contiguous()
        ops.decode_loss(code, W, A[:1].sum(0), A, vector, 1.0, prefixes=ends, prefix_weights=weights, zeros=len(ends) > 1)
    csc = ops.transpose(code)
    two = RowGradient(csc, list(code.values[[0, -1]]), [A, A.flip(0)], vector)
    one = RowGradient(csc, [code.values[0]], [A])
    ops.outer(csc, two.values, two.A)
    ops.outer(csc, one.values, one.A, first_feature=F // 3, n_features=F - F // 3, out=torch.ones(F - F // 3, d))
    ops.outer(csc, one.values, one.A, features=ops.touched(csc).flip(0))
    for gradient, project in ((two, False), (one, True)):
        ops.grad_sqnorm(gradient, W, project=project)
    record_step(W, two, ops.make_shadow(W), 0)
    record_step(W[F // 4 :], one, None, F // 4)
    if B:
        layer = Layer(W, vector, named("gated" if V == 2 else "relu"), (torch.exp(vector), vector)[: 2 * (V == 2)])
        of_engine = dict(stop_auxiliary=V == 1, zeros=False, pull=None, linear=True)
        ops.dense_gradients(code, A, A.flip(0), layer, W, A.sum(0), vector, **of_engine)


def record_step(W: Tensor, gradient: RowGradient, shadow: screen.Shadow | None, first: int) -> None:
    """A large eps, so that rounding in a gradient that is 0 does not become a step of full size."""
    W = W.clone()
    v, last_step = randn(*W.shape, seed=4).square(), torch.arange(W.shape[0]) % 3
    adam: dict = {"lr": 0.1, "beta2": 0.99, "eps": 0.1, "unit_rows": shadow is not None, "shadow": shadow}
    ops.weight_step(W, v, last_step, gradient, step=3, grad_scale=torch.tensor(0.5), first_feature=first, **adam)
    ops.row_step(W, v, last_step, randn(*W.shape, seed=5), step=4, **adam)
    adam |= {"m": randn(*W.shape, seed=6) * (torch.arange(W.shape[0]) % 2)[:, None], "beta1": 0.9}
    ops.weight_step(W, v, last_step, gradient, step=5, first_feature=first, **adam)
    ops.row_step(W, v, last_step, randn(*W.shape, seed=7), step=6, **adam)


def record_codes(B: int, d: int, F: int) -> None:
    sparse = torch.rand(B, F, generator=torch.Generator().manual_seed(B + F)) < 0.05
    sparse[:1] = True
    sparse[1::7] = False
    everything = torch.ones(B, F, dtype=torch.bool)
    for code in (code_of(m, V) for V, m in ((2, sparse), (1, sparse), (2, everything), (1, ~everything))):
        record_code(code, d)
    with patch.dict(crossovers.CROSSOVER, dict.fromkeys(crossovers.CROSSOVER, -1.0)):
        record_code(code_of(everything, 1), d)
        with patch.object(crossovers, "CHUNK", 25 * F):
            record_code(code_of(sparse, 2), d)


def record_all() -> None:
    for B, d, F in SHAPES:
        record_encode(B, d, F)
        record_largest(B, d, F)
        record_shadow(d, F)
        record_codes(B, d, F)
    record_encode(0, 63, 33)
    record_largest(0, 63, 33)
    record_largest(45, 33, 1100)  # several tiles
    record_codes(0, 63, 33)
    often = torch.zeros(LONG, 33, dtype=torch.bool)
    often[:, 7] = True
    often[::3, 9] = True
    often[::100, 20] = True
    record_code(code_of(often, 2), 33)
    record_code(code_of(torch.rand(30, 30) < 0.6, 2), 2**14)  # runs of 24 features, and of examples


def main(target: Path) -> None:
    torch.set_num_threads(1)  # the results are the same with more, and driver.cpp takes its own numbers
    torch.manual_seed(0)
    modules = [import_module(m.name) for m in pkgutil.walk_packages(sae_fast.ops.__path__, "sae_fast.ops.")]
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    with ExitStack() as stack:
        recorder = Recorder(stack.enter_context(unfinished.open("wb")))
        for module in modules:
            if hasattr(module, "_C"):
                stack.enter_context(patch.object(module, "_C", recorder))
        # Without a bfloat16 product too: what it gives is written down, the engine's part is the same.
        stack.enter_context(patch.object(screen, "unavailable", lambda: None))
        stack.enter_context(patch.object(cpu, "FEW_ROWS", {"shadow": 0, "no shadow": 0}))
        stack.enter_context(
            patch.dict(crossovers.CROSSOVER, dict.fromkeys(crossovers.CROSSOVER, 10.0))
        )  # the sparse routes
        record_all()
    unfinished.replace(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
