"""The registry: what is measured (cases), and by whom (providers).

A case is a piece of work on a `World` (batches, and a Gated SAE that is at home on them). A provider is one way to do it:
a function that takes its own copy of the SAE, sets itself up, and returns the function that is timed, of one input.
A new case is a new file in benchmarks/cases; a new provider of a known case is one decorated function:

    @step.provider("my_trainer")
    def _(sae):
        return MyTrainer(sae).step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.data import FULL, Shape, World, mean_l0
from sae_fast import GatedSAE

OURS = "sae_fast"
Run = Callable[[Any], Any]
Start = Callable[[GatedSAE], Run]


class Provider(NamedTuple):
    """One way to do a case's work.

    floor     a part of the work only, for scale (the bare product): not checked, its memory not taken
    optional  may be missing on a machine (a compiler, a package): an exception skips it, with its reason
    slow      left out of --quick unless it is asked for by name
    """

    start: Start
    floor: bool = False
    optional: bool = False
    slow: bool = False


class Goal(NamedTuple):
    """A ratio of two providers' figures that a case wants to reach at a shape: ``at_most`` or ``at_least``."""

    label: str
    metric: str
    numerator: str
    denominator: str
    at_most: float | None = None
    at_least: float | None = None
    at: Shape = FULL

    def reached(self, ratio: float) -> bool:
        return (self.at_most is None or ratio <= self.at_most) and (self.at_least is None or ratio >= self.at_least)


@dataclass
class Case:
    """A piece of work.

    name, mode   mode is the part of training that it belongs to: train (all of it), forward, backward, update
    inputs       the inputs that the timed functions take, one a batch of the world
    reference    the same work in plain PyTorch, in the dtype of its arguments: float64 gives the truth, float32 torch's
                 own error.  Inputs and SAE are brought to float64 by their ``double()``
    outcome      what the work has produced, by name, from the SAE and from the results of all inputs
    memory       whether peak memory is measured too
    orders       torch's own error is the largest over so many orders of the examples and dimensions: in a step, one
                 rounding can open a gate or, by Adam at β₁ = 0, turn an update around.  Above 1 the inputs are [n, d],
                 and the outcome is made of parameters
    goals        ratios to reach
    l0           active features on a mean example, of a provider's SAE
    """

    name: str
    mode: str
    inputs: Callable[[World], Sequence[Any]]
    reference: Start
    outcome: Callable[[GatedSAE, list[Any]], dict[str, Tensor]]
    memory: bool = False
    orders: int = 1
    goals: tuple[Goal, ...] = ()
    l0: Callable[[GatedSAE, Tensor], float] = mean_l0
    providers: dict[str, Provider] = field(default_factory=dict)

    def provider(self, name: str, **flags: bool) -> Callable[[Start], Start]:
        """Decorator: registers a provider of this case.  Flags as in `Provider`."""

        def register(start: Start) -> Start:
            if name in self.providers:
                raise ValueError(f"name: the case {self.name!r} already has a provider {name!r}")
            self.providers[name] = Provider(start, **flags)
            return start

        return register

    def choose(self, names: Iterable[str] = (), quick: bool = False) -> dict[str, Provider]:
        """The providers of these names; without names all of them, or with ``quick`` those that are not slow."""
        wanted = set(names)
        return {
            name: provider
            for name, provider in self.providers.items()
            if name in wanted or (not wanted and not (quick and provider.slow))
        }


CASES: dict[str, Case] = {}


def case(name: str, mode: str, **arguments: Any) -> Callable[[Start], Case]:
    """Decorator: registers a case by its reference; what is decorated becomes the `Case`."""

    def register(reference: Start) -> Case:
        if name in CASES:
            raise ValueError(f"name: there is already a case {name!r}")
        CASES[name] = Case(name=name, mode=mode, reference=reference, **arguments)
        return CASES[name]

    return register


__all__ = ["CASES", "OURS", "Case", "Goal", "Provider", "Shape", "World", "case"]
