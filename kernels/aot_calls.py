"""The calls that the manifest is of: every launcher, on tensors without memory, at real sizes, for each storage dtype.

To add an op: one function beside those in CALLS.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from sae_fast.activations import named
from sae_fast.code import Layer, RowGradient, Rows, Shadow, Transposed
from sae_fast.kernels import _config, _launch
from sae_fast.penalty import LINEAR, OF_F, PI, POWER, QUADRATIC, ROOTED, STEP, TANH, TARGET, TO_INPUT, Penalty


@dataclass(frozen=True)
class Size:
    """B examples of width d, F features, entries (capacity) of a code; dtype: of x and of the weights' storage."""

    B: int
    d: int
    F: int
    entries: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"B={self.B} d={self.d} F={self.F} {self.dtype}"

    def of(self, *shape: int) -> Tensor:
        return meta(*shape, dtype=self.dtype)

    def x(self) -> Tensor:
        return self.of(self.B, self.d)

    def W(self) -> Tensor:
        return self.of(self.F, self.d)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """begin, end, indices of a code."""
        return integers(self.B), integers(self.B), integers(self.entries, dtype=torch.int32)

    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """colptr, rows, perm of a transposed code."""
        return integers(self.F + 1), integers(self.entries, dtype=torch.int32), integers(self.entries)

    def gradient(self, sources: int = 1, own: Tensor | None = None) -> RowGradient:
        return RowGradient.of(*self.by_feature(), [self.of(self.entries)] * sources, [self.x()] * sources, own)


SHAPES = ((4096, 768, 24576, 4096 * 64), (8192, 2304, 65536, 8192 * 128), (8192, 4096, 131072, 8192 * 128))
SIZES = [Size(*shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return meta(*shape, dtype=dtype)


# ---- The calls ------------------------------------------------------------------------------------------------------


def encode(s: Size) -> None:
    from sae_fast.kernels import compact, encode, screen
    from sae_fast.kernels._mask import words
    from sae_fast.kernels.largest import Largest
    from sae_fast.kernels.round import BOUND, COLUMNS, compare_rows, rounded, watch

    x, W, of_feature = s.x(), s.W(), s.of(s.F)
    shadow, flag = Shadow(*rounded(W)), integers(dtype=torch.int32)
    gated, relu, jumprelu = (
        Layer(W, of_feature, kind, (of_feature,) * len(kind.parameters), cut, shadow)
        for kind, cut in ((named("gated"), None), (named("relu"), None), (named("jumprelu"), of_feature))
    )
    compare_rows(W, *shadow, integers(s.F, dtype=torch.int32))
    if s.dtype == torch.float32:  # a Trainer's
        watch(W, *shadow, integers(), flag)
    encode.candidates(x, gated, True, s.of(s.d), s.x(), flag)  # as a Trainer does
    for layer, exact in ((gated, True), (gated, False), (relu, True), (jumprelu, True)):
        encode.members(x, layer, encode.candidates(x, layer, exact), s.entries, flag, exact)
    which = Largest(64, False, meta(s.B))
    for layer, exact in ((relu, True), (relu, False), (gated, True), (jumprelu, True)):
        layer = layer._replace(cut=None)
        screened = encode.candidates(x, layer, exact, floor=which.floor)
        for choice in (which, which._replace(whole=True), which._replace(floor=None)):
            encode.members(x, layer, screened, s.entries, flag, exact, choice)
    begin, end, indices = s.rows()
    values = s.of(2, s.entries)
    packed = integers(s.B + 1), indices, values[0], values, indices, values[0], values  # pack itself waits for their number
    _launch.launch(compact._pack, (s.B,), begin, end, *packed, s.entries, s.entries - 16, V=2, BLOCK=128, num_warps=1)
    mask = integers(s.B, words(s.F), dtype=torch.int32)
    terms = meta(s.B, COLUMNS, dtype=BOUND), meta(s.F, COLUMNS, dtype=BOUND)
    screen.scan(meta(1024, s.F), 0, *terms, mask)
    if _config.config("screen_wide")["persistent"]:
        screen.screen(meta(s.B, shadow[0].shape[1], dtype=torch.float16), shadow[0], *terms, mask, persistent=True)


def decode(s: Size) -> None:
    from sae_fast.kernels.decode import decode

    for V in (1, 2):  # magnitudes; with gates
        decode(*s.rows(), s.of(V, s.entries), s.W(), None, s.of(V, 1, s.B, s.d))
    decode(*s.rows(), s.of(1, s.entries), s.W(), integers(5), s.of(1, 4, s.B, s.d))  # groups: Matryoshka prefixes


def decode_loss(s: Size) -> None:
    from sae_fast.kernels.compact import Gapped
    from sae_fast.kernels.decode_loss import Ends, Outputs, StepOutputs, decode_loss
    from sae_fast.kernels.fired import fired
    from sae_fast.kernels.jump import jump

    def call(V: int, cost: Tensor | None, step: StepOutputs | None, zeros: bool = False, ends: Ends | None = None) -> None:
        values = s.of(V, s.entries)
        out = Outputs.of(values, s.x(), ends)
        decode_loss((*s.rows(), values), s.W(), s.of(s.d), s.x(), cost, float(s.B), out, step, zeros, ends)

    entries, weight, l0 = s.of(s.entries), s.of(s.F), integers(s.B, dtype=torch.int32)
    for V, zeros in ((1, False), (2, False), (1, True), (2, True)):
        for ends in (None, Ends(integers(5), s.of(5))):
            call(V, weight, None, zeros, ends)
    if s.dtype != torch.float32:
        return
    fired(integers(s.entries, dtype=torch.int32), entries, integers(s.F))
    written = entries, meta(s.entries, 4), entries, entries
    for name, penalties in {  # a Trainer's weights
        "relu": (Penalty(), Penalty(LINEAR), Penalty(POWER, 0.5), Penalty(ROOTED, 0.5)),
        "gated": (Penalty(LINEAR), Penalty(POWER, 0.5), Penalty(ROOTED, 0.5)),
        "jumprelu": [Penalty(it, 4.0, of, 0.1) for it in (STEP, QUADRATIC, TARGET, TANH) for of in (PI, TO_INPUT, OF_F)],
    }.items():
        kind = named(name)
        V, layer = kind.value_sets, Layer(s.W(), weight, kind, (weight,) * len(kind.parameters))
        if name == "jumprelu":
            for of_f in (False, True):
                jump(Gapped(*s.rows(), entries, s.of(V, s.entries)), layer, of_f)
        for penalty in penalties:
            mean, tanh = meta(dtype=torch.float64), penalty.native == TANH
            of_l0 = None if not penalty.window else mean if penalty.native == TARGET else l0
            step = StepOutputs(layer, entries, penalty, meta(), *written, False, of_l0, entries if tanh else None)
            call(V, weight if tanh else None, step, bool(penalty.window))
            if penalty.native == LINEAR:
                call(V, weight, step._replace(auxiliary=V == 2))


def sampled_dots(s: Size) -> None:
    from sae_fast.kernels.sampled_dots import sampled_dots

    sampled_dots(*s.rows(), s.x(), s.W(), s.of(s.entries))


def transpose(s: Size) -> None:
    from sae_fast.kernels.outer import Runs
    from sae_fast.kernels.transpose import transpose

    csc = Transposed(*s.by_feature())
    for split in (None, Runs.of(csc.colptr, s.entries)):
        transpose(*s.rows(), csc, split)


def outer(s: Size) -> None:
    from sae_fast.kernels.outer import outer, runs

    runs(integers(s.F + 1), s.entries)
    for sources in (1, 2):
        for accumulate in (False, True):
            outer(s.gradient(sources), s.W(), accumulate=accumulate)
    outer(s.gradient(), s.of(4096, s.d), features=integers(4096), accumulate=False)  # touched rows


def grad_sqnorm(s: Size) -> None:
    from sae_fast.kernels.grad_sqnorm import grad_sqnorm, slices

    for projects, own in ((False, None), (True, None), (False, s.of(s.F))):
        out = meta(s.F, slices(s.d, projects), dtype=torch.float64)
        grad_sqnorm(s.gradient(own=own), s.W(), projects, out)


def weight_step(s: Size) -> None:
    from sae_fast.kernels.round import rounded
    from sae_fast.kernels.weight_step import Update, new_adam, row_step, set_adam, weight_step

    if s.dtype != torch.float32:
        return
    adam, W, last_step, skip = new_adam("meta"), s.W(), integers(s.F), integers(dtype=torch.int32)
    set_adam(adam, 1000, 3e-4, 0.9, 0.999, 1e-8)
    for unit_rows, shadow in ((True, None), (False, Shadow(*rounded(W))), (False, None)):
        for m in (None, s.W()):
            state = Rows(W, s.W(), last_step, shadow, m)
            weight_step(state, s.gradient(), Update(adam, unit_rows, meta(), skip))
            weight_step(state, replace(s.gradient(), along=s.of(s.entries)), Update(adam, unit_rows, meta(), skip))
            weight_step(state, s.gradient(), Update(adam, unit_rows, None, skip))
            row_step(state, s.W(), Update(adam, unit_rows, None, skip))
    own, update = meta(s.F), Update(adam, False, None, skip)  # own: of the saelens dialect
    for m in (None, s.W()):
        weight_step(Rows(W, s.W(), last_step, None, m), s.gradient(2, own), update)
    for m in (None, meta(s.F, 1)):
        row_step(Rows(meta(s.F, 1), meta(s.F, 1), last_step, None, m), meta(s.F, 1), update, colptr=s.by_feature()[0])


def vectors(s: Size) -> None:
    from sae_fast.kernels.round import norm_columns
    from sae_fast.kernels.vectors import check_finite, step_vectors, sums
    from sae_fast.kernels.weight_step import Update, new_adam

    if s.dtype != torch.float32:
        return
    flag, losses, norms = integers(dtype=torch.int32), meta(3, dtype=torch.float64), meta(s.B, norm_columns(s.d))
    csc, own = Transposed(*s.by_feature()), s.of(s.F)
    sums(csc, meta(s.entries, 4))
    sums(csc, meta(s.entries, 4), s.of(s.entries))
    gradients = [s.of(n) for n in (s.F, s.F, s.F, s.d)]  # of a Gated SAE; of a ReLU one
    for of_decoder in (s.gradient(), s.gradient(2, own)):
        for some in (gradients, gradients[2:]):
            check_finite(losses, norms, dict(zip("abcdef", (s.gradient(), of_decoder, *some), strict=False)), flag)
    for m, some in ((None, gradients), (None, gradients[2:]), (s.W(), gradients)):
        given = [(Rows(g, g, integers(*g.shape), None, None if m is None else g), g) for g in some]
        rows = Rows(s.W(), s.W(), integers(s.F), None, m)
        for scale in (None, meta()):
            step_vectors(given, 2 * [(rows, csc.colptr)], Update(new_adam("meta"), False, scale, flag))


CALLS: list[Callable[[Size], None]] = [
    encode, decode, decode_loss, sampled_dots, transpose, outer, grad_sqnorm, weight_step, vectors,
]  # fmt: skip


def calls(target: int) -> Iterator[_launch.Launch]:
    """The launches on a GPU of that generation."""
    outer, _config._target = _config._target, target
    try:
        for size in SIZES:
            for call in CALLS:
                with _launch.recording() as launches:
                    call(size)
                yield from launches
    finally:
        _config._target = outer


def launched_nowhere(modules: list[ModuleType], launched: set[JITFunction]) -> list[str]:
    """Kernels defined in these modules that are in no call, neither by themselves nor as a part of one that is."""
    known, todo = set(), list(launched)
    while todo:
        fn = todo.pop()
        if fn in known:
            continue
        known.add(fn)
        names = {node.id for node in ast.walk(fn.parse()) if isinstance(node, ast.Name)}
        todo += [value for name in names if isinstance(value := fn.__globals__.get(name), JITFunction)]
    defined = [
        fn for m in modules for fn in vars(m).values() if isinstance(fn, JITFunction) and fn.__module__ == m.__name__
    ]
    return sorted(f"{fn.__module__}.{fn.__name__}" for fn in defined if fn not in known)


def all_modules() -> list[ModuleType]:
    """Every module beside this one."""
    names = sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("__init__", "aot"))
    )
    return [importlib.import_module(f"{__package__}.{name}") for name in names]
