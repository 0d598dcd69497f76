"""The GPU ops by arithmetic: bytes and flops as formulas, and the compiled kernels' resources from the manifest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

from benchmarks.data import Shape
from benchmarks.gpu.world import LARGE, SMALL
from benchmarks.tables._markdown import grid, number, shape, source
from benchmarks.tables._region import ROOT, table

MANIFEST = ROOT / "kernels" / "manifest.json"
ARCH = "sm_90"
TFLOPS, STREAM, GATHER, CACHE = 700, 3.0, 2.7, 5.5  # of an H100, as the model has it; TFLOP/s and TB/s
OPS = (  # op, flops, bytes gathered, bytes of distinct rows and streams
    ("screen (Triton only)", "2BdF", "", "2Bd + 2Fd + BF/8"),
    ("compact (Triton only)", "", "", "BF/4 + 4n"),
    ("verify", "2nd", "4nd", "4td + 4Bd + 16n"),
    ("decode_loss, V = 2", "8nd", "4nd", "4td + 12Bd + 20n"),
    ("transpose", "", "", "16n + 8F"),
    ("outer", "2nd", "4nd + 4Fd", "4Bd + 4Fd + 16n"),
    ("weight_step, a matrix", "2nd + 10td", "4nd + 16td", "4Bd + 16td + 16n"),
)


@table
def model() -> str:
    """Of each op the formulas, and what they come to on an H100."""
    rows = [[op, *formulas, *(_floors(at, *formulas) for at in (LARGE, SMALL))] for op, *formulas in OPS]
    headings = ["op", "flops", "gathered", "distinct, and streams", "large: gathered / distinct", "small"]
    cached = number(_sum(LARGE, "4nd") / CACHE / 1e9, 2)
    said = f"""
*Large*: {shape(LARGE)}; *small*: {shape(SMALL)}; n = B·L0. A model, not a measurement: {TFLOPS} TFLOP/s
(16-bit products), {STREAM} TB/s (streams), {GATHER} TB/s (gathers of whole rows). What stays in the L2 cache would come
at {CACHE} TB/s: the large gather in {cached} ms.
"""
    return grid(headings, rows) + said


def _floors(at: Shape, flops: str, gathered: str, distinct: str) -> str:
    if flops and not gathered:
        return f"{number(_sum(at, flops) / TFLOPS / 1e9)} ms of flops"
    return " / ".join(_bytes_and_time(at, formula) for formula in (gathered, distinct) if formula)


def _bytes_and_time(at: Shape, formula: str) -> str:
    size = _sum(at, formula)
    milliseconds = sum(_sum(at, term) / (GATHER if term == "4nd" else STREAM) / 1e9 for term in formula.split(" + "))
    return f"{f'{number(size / 1e9)} GB' if size >= 1e9 else f'{number(size / 1e6)} MB'}, {number(milliseconds, 2)} ms"


def _sum(at: Shape, formula: str) -> float:
    """What a sum of terms such as 4nd and BF/8 comes to."""
    n = at.B * at.l0
    sizes = {"B": at.B, "d": at.d, "F": at.F, "n": n, "t": at.F * -math.expm1(-n / at.F)}
    terms = re.findall(r"(\d*)([BdFnt]+)(?:/(\d+))?", formula)
    return sum(int(k or 1) * math.prod(sizes[c] for c in letters) / int(over or 1) for k, letters, over in terms)


@table
def registers() -> str:
    """Of every kernel the registers of a thread and the static shared memory of a block, over its variants."""
    found: dict[str, dict[str, list[str]]] = {}
    kernels: dict[tuple[str, str, str], list[dict[str, int]]] = {}
    for key, variants in _manifest():
        kernels.setdefault(key, []).extend(variants)
    for (op, body, name), variants in kernels.items():
        counts, shared = ([each[what] for each in variants] for what in ("registers", "shared"))
        text = f"`{name}` {_range(counts)}" + (f", {_size(max(shared))}" if max(shared) else "")
        found.setdefault(op, {}).setdefault(body, []).append(text)
    rows = [[op, *("; ".join(bodies.get(body, [])) for body in ("Triton", "CUDA"))] for op, bodies in sorted(found.items())]
    said = f"{ARCH}, over all variants; a range is of registers, what follows it the most static shared memory"
    return grid(["op", "Triton", "CUDA"], rows) + source(MANIFEST, said)


def _manifest() -> Iterator[tuple[tuple[str, str, str], list[dict[str, int]]]]:
    """((op, body, kernel), its variants)."""
    kernels = json.loads(MANIFEST.read_text("utf-8"))
    del kernels["triton"]  # the version
    for key, variants in kernels.items():
        here = [each for name, each in variants.items() if name.startswith(ARCH)]
        cuda = re.match(r"csrc/cuda/(\w+)\.cu (\w+)", key)
        yield (cuda[1], "CUDA", cuda[2]) if cuda else (key.split(".")[0], "Triton", key.split(".")[1]), here


def _range(values: list[int]) -> str:
    return f"{min(values)}–{max(values)}" if min(values) < max(values) else str(values[0])


def _size(count: int) -> str:
    return f"{count / 1024:.3g} KiB" if count >= 1024 else f"{count} B"
