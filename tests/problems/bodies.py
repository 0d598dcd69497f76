"""The bodies of an op, each forced on any machine: what a contract is run on.

A GPU's kernels run on a GPU where there is one, else in Triton's interpreter and over the CUDA shim, at small sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from helpers import FEW_SHAPES, SHAPES
from torch import Tensor

from sae_fast.ops.dispatch import _C

GPU = torch.cuda.is_available()
NINE = (9, 43, 33)  # of the small tiles three slices of columns and nine blocks of a row that has all features; ragged
TINY = [(5, 40, 12)]
TILES = {  # small, for the interpreter's sake
    "decode": {"entries": 4, "columns": 16},
    "decode_loss": {"entries": 4, "columns": 16, "finish": 8},
    "sampled_dots": {"entries": 4, "columns": 16, "finish": 8},
    "transpose": {"entries": 4, "features": 4, "chunks": 2, "warps": 1},
    "outer": {"entries": 2, "columns": 8, "run": 5},
    "weight_step": {"entries": 2, "columns": 8},
}


@dataclass(frozen=True)
class Body:
    """One of an op's bodies; the C++ engine's on an instruction set, on one side of the density switch."""

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
            return [NINE]
        return SHAPES if self.isa == _C.supported_isas()[0] else FEW_SHAPES

    @property
    def few_shapes(self) -> list[tuple[int, int, int]]:
        """Those for what multiplies the tests."""
        return TINY if self.of_gpu else FEW_SHAPES

    @property
    def threads(self) -> tuple[int, ...]:
        """The thread counts that a result may not hang on."""
        return (1, 2, 3) if self.backend == "cpu" and self.route == "sparse" else ()

    def run(self, op, *arguments, **keywords):
        """What the op gives, on the CPU, of arguments that are moved to where the body runs."""
        away, named = moved(arguments, self.device), {name: moved(value, self.device) for name, value in keywords.items()}
        return moved(op(*away, **named), "cpu")


def moved(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """Tensors, and what is made of them, on a device; those of floating point as ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value)]
        return replace(value, **{name: moved(getattr(value, name), device, dtype) for name in names})
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [moved(part, device, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return [moved(part, device, dtype) for part in value] if isinstance(value, list) else value


ENGINE = [Body("cpu", isa, route) for isa in _C.supported_isas() for route in ("sparse", "dense")]
OF_GPU = [Body("triton"), Body("cuda")]
BODIES = [*ENGINE, Body("reference"), *OF_GPU]


def _each(bodies: list[Body]) -> pytest.MarkDecorator:
    """For a test with the fixture ``body``; what runs the kernels of a GPU is marked so."""
    params = [pytest.param(body, id=str(body), marks=[pytest.mark.kernels] if body.of_gpu else []) for body in bodies]
    return pytest.mark.parametrize("body", params, indirect=True)


every = _each(BODIES)
but_cuda = _each([body for body in BODIES if body.backend != "cuda"])  # of an op that has none
