"""What `make gpu` is to reach: ratios of figures, measured or predicted; and which of an op's bodies earns its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan
from typing import NamedTuple

from benchmarks.data import Shape
from benchmarks.gpu.world import LARGE, SMALL
from benchmarks.registry import OURS, Goal
from benchmarks.results import Row

OURS_BF16, PRODUCT = f"{OURS}_bf16", "bf16_product"
PRECISIONS = {OURS: "exact", OURS_BF16: "bf16"}
FLOORS = ("floor", "gather_floor")  # of an op: computed from a run's ceilings
# The ops that have a CUDA body beside Triton's, by the case that runs them, and how much faster it must be to ship.
TWINS = {
    "encode": "verify",
    "decode_loss": "decode_loss",
    "transpose": "transpose",
    "outer": "outer",
    "weight_step": "weight_step",
}
EARNS = 1.15
MEASURED_AT = dict.fromkeys(("step", "encode_sparse"), ("uniform", "zipf"))
ALSO = {"sparsify": ("kind_topk",)}  # where a rival of other cases is measured: it has no BatchTopK
Figures = Mapping[tuple[str, str, str, str], float]  # by case, provider, metric and shape: the median


def product_goal(label: str, provider: str, at_most: float, at: Shape = LARGE) -> Goal:
    return Goal(f"{label} ÷ bare bf16 product", "time", provider, PRODUCT, at_most=at_most, at=at)


def rival_goal(rival: str, at_least: float, at: Shape, ours: str = "exact step") -> Goal:
    """The times as fast as a rival's step that ours is to be."""
    names = {
        "compiled_bf16": "compiled bf16 dense step", "compiled_tf32": "compiled TF32 dense step",
        "dictionary_learning": "dictionary_learning's fp32 update", "sparsify": "sparsify's step",
    }  # fmt: skip
    provider = OURS_BF16 if ours == "bf16 step" else OURS
    return Goal(f"{names[rival]} ÷ {ours}", "time", rival, provider, at_least=at_least, at=at)


def memory_goal(at: Shape) -> Goal:
    label = "exact step's peak memory ÷ compiled bf16's"
    return Goal(label, "peak_memory", OURS, "compiled_bf16", at_most=1 / 8, at=at)


def of_kind(kind: str) -> tuple[Goal, ...]:
    ours = f"{kind} step, momentum"
    return tuple(
        rival_goal(rival, at_least, at, ours)
        for at in (LARGE, SMALL)
        for rival, at_least in (("compiled_bf16", 3), ("sparsify", 10))
    )


GOALS = {
    "step": (
        product_goal("exact step", OURS, 2.9),
        rival_goal("compiled_bf16", 3.3, LARGE),
        rival_goal("compiled_tf32", 5, LARGE),
        rival_goal("dictionary_learning", 40, LARGE),
        product_goal("bf16 step", OURS_BF16, 2.3),
        rival_goal("compiled_bf16", 4, LARGE, "bf16 step"),
        memory_goal(LARGE),
        rival_goal("compiled_bf16", 2.8, SMALL),
        rival_goal("dictionary_learning", 40, SMALL),
        rival_goal("compiled_bf16", 3.5, SMALL, "bf16 step"),
        memory_goal(SMALL),
    ),
    "encode_sparse": (product_goal("exact encode", OURS, 1.6), product_goal("bf16 encode", OURS_BF16, 1.2)),
    "kind_topk": of_kind("TopK"),
    "kind_batchtopk": of_kind("BatchTopK"),
    "decode_loss": (Goal("decode_loss ÷ gathered bytes", "time", "best", "gather_floor", at_most=1.5, at=LARGE),),
    "weight_step": (Goal("weight_step ÷ gathered bytes", "time", "best", "gather_floor", at_most=1.5, at=LARGE),),
}  # fmt: skip


class Reached(NamedTuple):
    """A goal at a kind of frequencies; ``got`` is NaN where a figure is not there."""

    goal: Goal
    frequencies: str
    got: float

    @property
    def want(self) -> str:
        return f"≤ {self.goal.at_most:g}" if self.goal.at_most is not None else f"≥ {self.goal.at_least:g}"

    @property
    def verdict(self) -> str:
        """ "met" or "not met"; empty where it was not measured."""
        return "" if self.got != self.got else "met" if self.goal.reached(self.got) else "not met"


def figures(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], float]:
    return {(row.case, row.provider, row.metric, row.x): row.p50 for row in rows}


def named(case: str, frequencies: str) -> str:
    return case if frequencies == "uniform" else f"{case}_{frequencies}"


def reach(of: Figures) -> list[Reached]:
    """Each goal at each kind of frequencies.  The best compiled step counts, whichever mode it comes from; what is dense
    takes as long on any data."""
    found = []
    for frequencies in ("uniform", "zipf"):
        for case, goals in GOALS.items():
            if frequencies not in MEASURED_AT.get(case, ("uniform",)):
                continue
            place = named(case, frequencies)
            for goal in goals:
                over, under = (_best(of, case, place, name, goal) for name in (goal.numerator, goal.denominator))
                found.append(Reached(goal, frequencies, over / under))
    return found


def _best(of: Figures, case: str, place: str, provider: str, goal: Goal) -> float:
    places = (place,) if provider in PRECISIONS or case in TWINS else (place, case, *ALSO.get(provider, ()))
    names = (OURS, "triton", "cuda") if provider == "best" else (provider, f"{provider}_autotuned")
    metric = "floor" if provider in FLOORS else goal.metric
    found = [of[key] for at in places for name in names if (key := (at, name, metric, str(goal.at))) in of]
    return min((value for value in found if value == value), default=nan)


def twins(of: Figures) -> tuple[frozenset[str], list[str]]:
    """(the ops whose CUDA bodies earn a place in `faster` of kernels/_generations.py: at every shape measured; a table)."""
    ratios: dict[str, list[float]] = {}
    lines = []
    for case, op in TWINS.items():
        for shape in dict.fromkeys((str(LARGE), str(SMALL))):
            triton, cuda = (of.get((case, body, "time", shape), nan) for body in ("triton", "cuda"))
            if triton == triton and cuda == cuda:
                ratios.setdefault(op, []).append(triton / cuda)
                lines.append(f"{op:12s} triton {triton:8.4g} ms   cuda {cuda:8.4g} ms   {triton / cuda:5.2f} ×   {shape}")
    earned = frozenset(op for op, all in ratios.items() if min(all) >= EARNS)
    if not ratios:
        return earned, ["CUDA bodies beside Triton's: not measured"]
    names = ", ".join(sorted(earned)) or "none"
    return earned, [*lines, f"earn a place in kernels/_generations.py's faster (≥ {EARNS} ×): {names}"]


def lines(rows: Iterable[Row]) -> list[str]:
    """The summary of what is measured: goals, then bodies."""
    of = figures(rows)
    table = [(f"{it.goal.label}, {it.frequencies}, {it.goal.at}", it) for it in reach(of)]
    width = max(len(label) for label, _ in table)
    text = [
        f"{label:{width}s}  {it.want:>7s}  {f'{it.got:.3g}' if it.verdict else '':>8s}  {it.verdict or 'not measured'}"
        for label, it in table
    ]
    return [f"{'goal':{width}s}  {'want':>7s}  {'got':>8s}", *text, "", *twins(of)[1]]
