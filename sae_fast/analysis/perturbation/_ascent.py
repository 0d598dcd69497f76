"""The ground of searches for perturbations: a model with a vector added at a site, and an ascent that never goes down."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from sae_fast.analysis.batching import TOKENS_PER_PASS, takes_examples
from sae_fast.analysis.splicing import check_where
from sae_fast.data import sites

Loss = Callable[..., Tensor]
FASTEST = 4.0  # the longest step, in units of the radius: one that turns by 76 degrees


@dataclass(frozen=True)
class Change:
    """The objective of MELBO (MATH.md §7): how far what comes through ``target`` moves, (Σ_i Σ_t ‖ΔZ_i,t‖₂^p)^(1/q).

    The norm is over the hidden axis; i are examples, t the target's positions, or those of them that ``where`` takes (bool,
    broadcastable to them).  For a search in which each example has its own perturbation, the sum is over t alone.
    """

    target: str | nn.Module | sites.Site
    p: float = 2.0
    q: float = 2.0
    where: Tensor | None = None

    def __post_init__(self) -> None:
        positive("p", self.p)
        positive("q", self.q)

    def powers(self, moved: Tensor, mask: Tensor | None) -> Tensor:
        """[n]: Σ_t ‖ΔZ_i,t‖^p of ΔZ [n, ..., d]."""
        squared = moved.square().sum(-1)
        moves = squared > 0 if mask is None else (squared > 0) & mask
        powers = torch.where(moves, squared, 1).pow(self.p / 2) * moves  # 0 has no slope where p < 1
        return powers.reshape(len(powers), -1).sum(1)


class Perturbed:
    """A model with something added to what comes through ``source``, as a function of that: values and gradients.

    The examples, N, are taken ``chunk`` at a time; ``shape`` [*, d] is what comes through of one.  To be used inside
    `untouched`.
    """

    def __init__(self, model: nn.Module, source: Any, inputs: Any, objective: Change | Loss, where: Any, chunk: int | None):
        if not isinstance(objective, Change) and not callable(objective):
            got = type(objective).__name__
            raise ValueError(f"objective: got {got}, want a Change, or a function of the model's output")
        self.model, self.inputs, self.objective = model, inputs, objective
        self.source = sites.find(model, source)
        self.target = sites.find(model, objective.target) if isinstance(objective, Change) else None
        if self.target is not None and self.target[1:] == self.source[1:]:
            raise ValueError(f"target: got {self.target.name!r}, the source itself, want a site behind it")
        self.n = next((len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()), 0)
        if not self.n:
            raise ValueError("inputs: got no tensor with examples in it, want what the model takes, one row an example")
        chunk = whole("chunk", chunk or max(1, TOKENS_PER_PASS // sites.positions(inputs, self.n)))
        self.pieces = torch.arange(self.n).split(chunk)
        self._told, self._reached = not isinstance(objective, Change) and takes_examples(objective), False
        with torch.no_grad():
            x = sites.run_until(model, self.source, self._inputs(self.pieces[0]))
            if x.dim() < 2 or len(x) != len(self.pieces[0]):
                want = f"[{len(self.pieces[0])}, ..., d]: one row an example"
                raise ValueError(f"source: {self.source.name!r} gives shape {tuple(x.shape)}, want {want}")
            self.pieces = tuple(piece.to(x.device) for piece in self.pieces)
            self.like, self.shape = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32)), x.shape[1:]
            self.mask = self._mask(where, x)
            self.clean = [self._at_target(piece) for piece in self.pieces] if self.target else []

    def value_and_slope(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(objective [1], gradient [1, d]) of one vector theta [1, d] that every example gets: the sum of MELBO, or the
        mean of a loss."""
        total, slope = theta.new_zeros((), dtype=torch.float64), torch.zeros_like(theta)
        for index in range(len(self.pieces)):
            values, gradient = self._gradient(index, theta)
            total, slope = total + values.sum(), slope + gradient
        self.check_reached()
        if not isinstance(self.objective, Change):
            return total[None] / self.n, slope / self.n
        power = 1 / self.objective.q
        return total[None] ** power, slope * (power * total.clamp(min=1e-300) ** (power - 1)).to(slope.dtype)

    def values_and_slopes(self, index: int, delta: Tensor) -> tuple[Tensor, Tensor]:
        """(objective [n], gradient [n, *, d]) of a perturbation delta [n, *, d] for each example of a piece."""
        values, slope = self._gradient(index, delta)
        if not isinstance(self.objective, Change):
            return values, slope
        power = 1 / self.objective.q
        scale = (power * values.clamp(min=1e-300) ** (power - 1)).to(slope.dtype)
        return values**power, slope * scale.reshape(-1, *[1] * (slope.dim() - 1))

    def _gradient(self, index: int, added: Tensor) -> tuple[Tensor, Tensor]:
        """([n] float64 before the root, the gradient of their sum with respect to ``added``)."""
        examples = self.pieces[index]
        mask = None if self.mask is None else self.mask[examples, ..., None]
        leaf = added.detach().requires_grad_()

        def add(x: Tensor) -> Tensor:
            return x + (leaf if mask is None else leaf * mask).to(x.dtype)

        with torch.enable_grad(), sites.changed(self.source, add):
            if isinstance(self.objective, Change):
                z = self._at_target(examples)
                within = check_where(self.objective.where, z[:1].expand(self.n, *z.shape[1:]))
                values = self.objective.powers(z - self.clean[index], None if within is None else within[examples])
            else:
                output = sites.run(self.model, self._inputs(examples))
                values = self.objective(output, examples) if self._told else self.objective(output)
                if not isinstance(values, Tensor) or values.shape != examples.shape or not values.is_floating_point():
                    got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                    raise ValueError(f"objective: got {got}, want one number an example, [{len(examples)}]")
        if not values.requires_grad:
            raise ValueError(f"{self._of()}: has no gradient at the source, {self.source.name!r}, want one behind it")
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
        if slope is None:
            raise ValueError(f"{self._of()}: the source, {self.source.name!r}, does not reach it")
        if not (values.isfinite().all() and slope.isfinite().all()):
            raise ValueError(
                f"{self._of()}: its value or gradient is not finite at a perturbation of norm {float(added.norm()):.4g}"
            )
        self._reached = self._reached or bool(slope.any())
        return values.detach().double(), slope

    def check_reached(self) -> None:
        """ValueError if every gradient so far was 0 everywhere."""
        if not self._reached:
            got = f"its gradient at the source, {self.source.name!r}, is 0 everywhere"
            raise ValueError(f"{self._of()}: {got}, want something that the source reaches")

    def _of(self) -> str:
        return "objective" if self.target is None else f"target {self.target.name!r}"

    def _at_target(self, examples: Tensor) -> Tensor:
        seen: list[bool] = []

        def mark(x: Tensor) -> Tensor:
            seen.append(True)
            return x

        assert self.target is not None
        with sites.changed(self.source, mark):
            z = sites.run_until(self.model, self.target, self._inputs(examples))
        if not seen:
            raise ValueError(
                f"target: {self.target.name!r} is reached before the source, {self.source.name!r}, want one behind it"
            )
        if z.dim() < 2 or len(z) != len(examples):
            want = f"[{len(examples)}, ..., d]: one row an example"
            raise ValueError(f"target: {self.target.name!r} gives shape {tuple(z.shape)}, want {want}")
        return z

    def _inputs(self, examples: Tensor) -> Any:
        return sites.repeated(self.inputs, examples, self.n)

    def _mask(self, where: Any, x: Tensor) -> Tensor | None:
        """[N, ...] bool."""
        mask = check_where(where, x[:1].expand(self.n, *x.shape[1:]))
        if mask is not None and not mask.reshape(self.n, -1).any(1).all():
            raise ValueError("where: got a mask that takes no position of an example, want at least one of each")
        return mask


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """In the block the model is in eval mode and its parameters collect no gradients; then it is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with sites.without_weight_gradients(model):
            yield
    finally:
        for module in training:
            module.training = True


def climb(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: Tensor,
    steps: int,
    lr: float,
    bar: tqdm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(points [m, ...], their objectives [m], the best so far at each evaluation [steps, m]) of m ascents side by side.

    evaluate: points → objectives [m], gradients.  step: points, gradients, rates [m] → points that satisfy the constraint.
    A step that does not go up is taken back and the rate halved; one that does makes it 1.5 times as large.  ``steps``
    evaluations in all, the start's included.
    """
    bar = bar_of("", steps, False) if bar is None else bar
    points, (values, slopes) = start, evaluate(start)
    bar.update()
    rates, history = torch.full_like(values, lr), [values]
    wide = (-1, *[1] * (start.dim() - 1))
    for _ in range(steps - 1):
        candidates = step(points, slopes, rates)
        new_values, new_slopes = evaluate(candidates)
        up = new_values > values
        points, slopes = (torch.where(up.reshape(wide), *of) for of in ((candidates, points), (new_slopes, slopes)))
        values, rates = torch.where(up, new_values, values), torch.where(up, (1.5 * rates).clamp(max=FASTEST), rates / 2)
        history.append(values)
        bar.update()
    return points, values, torch.stack(history)


def highest(ends: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The ascent whose objective is the largest, the first of equals, among those of one point that `climb` gives."""
    return max(ends, key=lambda end: float(end[1]))


def unit(x: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """x of norm 1 over ``dims``; 0 stays 0."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return torch.where(norm > 0, x / norm, 0)


def off(x: Tensor, basis: Tensor) -> Tensor:
    """x [1, d] without its part in the span of an orthonormal basis [r, d]."""
    return x - (x @ basis.T) @ basis


def tangent(slope: Tensor, theta: Tensor) -> Tensor:
    """A gradient [1, d] without its part along theta."""
    return off(slope, unit(theta))


def bar_of(what: str, total: int, progress: bool) -> tqdm:
    return tqdm(total=total, desc=what, disable=not progress, leave=False)


def positive(name: str, value: Any) -> float:
    """ValueError unless it is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: got {value!r}, want a number above 0")
    return float(value)


def whole(name: str, value: Any, least: int = 1) -> int:
    """ValueError unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name}: got {value!r}, want an integer ≥ {least}")
    return int(value)
