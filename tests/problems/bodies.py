"""The bodies of an op, each forced on any machine: what a contract is run on.

A GPU's kernels run on a GPU where there is one, else in Triton's interpreter and over the CUDA shim, at small sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from helpers import FEW_SHAPES, SHAPES, assert_same_bits
from torch import Tensor

from sae_fast.ops.dispatch import _C

GPU = torch.cuda.is_available()
NINE = (9, 43, 33)  # of the small tiles three slices of columns and nine blocks of a row that has all features; ragged
TINY = [(5, 40, 12)]
LARGE = (513, 768, 4099)  # as sizes are used, on a GPU; in the interpreter the tiles that ship meet smaller ones
SHIPPED = [LARGE] if GPU else [(5, 1, 3), (4, 769, 70)]
TILES = {  # small, for the interpreter's sake
    "screen": {"rows": 16, "features": 32, "depth": 32, "warps": 4, "stages": 2, "group": 2, "persistent": 0},
    "compact": {"words": 4, "warps": 1},
    "decode": {"entries": 4, "columns": 16},
    "decode_loss": {"entries": 4, "columns": 16, "finish": 8},
    "sampled_dots": {"entries": 4, "columns": 16, "finish": 8},
    "transpose": {"entries": 4, "features": 4, "chunks": 2, "warps": 1},
    "outer": {"entries": 2, "columns": 8, "run": 5},
    "weight_step": {"entries": 2, "columns": 8},
}


@dataclass(frozen=True)
class Body:
    """One of an op's bodies; the C++ engine's on an instruction set, on one side of the density switch; a GPU's with small
    tiles, or by the route "shipped" with those that ship."""

    backend: str
    isa: str = ""
    route: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.backend, self.isa, self.route) if part)

    @property
    def of_gpu(self) -> bool:
        return self.backend in ("triton", "cuda")

    @property
    def device(self) -> str:
        return "cuda" if self.of_gpu and GPU else "cpu"

    @property
    def exact(self) -> bool:
        """Its sums are in an order of their own, whatever else is asked of it; those of a product are not."""
        return self.of_gpu or self.route == "sparse"

    @property
    def dtypes(self) -> list[torch.dtype]:
        """What it takes its operands in.  The interpreter's bfloat16 arithmetic is wrong."""
        if not self.of_gpu:
            return [torch.float32]
        every = [torch.float32, torch.float16, torch.bfloat16]
        return every if GPU or self.backend == "cuda" else every[:2]

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(B, d, F) that a contract of numbers is held to."""
        if self.of_gpu:
            return SHIPPED if self.route == "shipped" else [NINE]
        return SHAPES if self.isa == _C.supported_isas()[0] else FEW_SHAPES

    @property
    def few_shapes(self) -> list[tuple[int, int, int]]:
        """Those for what multiplies the tests."""
        if self.of_gpu:
            return SHIPPED[-1:] if self.route == "shipped" else TINY
        return FEW_SHAPES

    def size(self, B: int, d: int, F: int) -> tuple[int, int, int]:
        """These (B, d, F), or for a GPU's kernels of their own."""
        return self.shapes[-1] if self.of_gpu else (B, d, F)

    @property
    def threads(self) -> tuple[int, ...]:
        """The thread counts that a result may not hang on."""
        return (1, 2, 3) if self.backend == "cpu" and self.route == "sparse" else ()

    def run(self, op, *arguments, **keywords):
        """What the op gives, on the CPU, of arguments that are moved to where the body runs."""
        away, named = moved(arguments, self.device), {name: moved(value, self.device) for name, value in keywords.items()}
        return moved(op(*away, **named), "cpu")


def moved(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """Tensors, and what is made of them, on a device, as far apart as they are; those of floating point as ``dtype``."""
    if isinstance(value, Tensor):
        there = value.to(device, dtype if value.is_floating_point() else None)
        if there.stride() == value.stride():
            return there
        return torch.empty_strided(there.shape, value.stride(), dtype=there.dtype, device=device).copy_(there)
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value)]
        return replace(value, **{name: moved(getattr(value, name), device, dtype) for name in names})
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [moved(part, device, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return [moved(part, device, dtype) for part in value] if isinstance(value, list) else value


def misaligned(t: Tensor) -> Tensor:
    """The same, contiguous, but not at a multiple of 16 bytes."""
    wide = t.new_empty(t.numel() + 1)
    wide[1:] = t.flatten()
    return wide[1:].view(t.shape)


def every_schedule(body: Body, run: Callable):
    """What ``run`` gives, which is the same to the last bit however the threads take turns; on a GPU, again and again."""
    from sae_fast.kernels import native

    first, shim = run(), body.backend == "cuda" and not GPU
    for schedule in range(1, native.module.schedules if shim else 3 if GPU else 1):
        if shim:
            native.module.set_schedule(schedule)
        assert_same_bits(first, run())
    return first


ENGINE = [Body("cpu", isa, route) for isa in _C.supported_isas() for route in ("sparse", "dense")]
OF_GPU = [Body("triton"), Body("triton", "", "shipped"), Body("cuda"), Body("cuda", "", "shipped")]
BODIES = [*ENGINE, Body("reference"), *OF_GPU]


def _each(bodies: list[Body]) -> pytest.MarkDecorator:
    """For a test with the fixture ``body``; what runs the kernels of a GPU is marked so.  Large tiles take the interpreter
    long."""

    def marks(body: Body) -> list[pytest.MarkDecorator]:
        slow = body.route == "shipped" and not GPU
        return [pytest.mark.kernels] * body.of_gpu + [pytest.mark.slow] * slow

    params = [pytest.param(body, id=str(body), marks=marks(body)) for body in bodies]
    return pytest.mark.parametrize("body", params, indirect=True)


every = _each(BODIES)
but_cuda = _each([body for body in BODIES if body.backend != "cuda"])  # of an op that has none
of_gpu = _each(OF_GPU)
of_encode = _each([*(Body("cpu", isa) for isa in _C.supported_isas()), Body("reference"), Body("triton"), Body("cuda")])
