"""The objectives: which loss a kind of SAE is trained by, one file each (MATH.md §8–§11).

sf.Trainer(sf.JumpReluSAE(768, 24576), objective=sf.objectives.L0(target=40, bandwidth=1e-3))
sf.Trainer(sf.BatchTopKSAE(768, 24576, k=40), objective=sf.objectives.Matryoshka(sf.objectives.TopK(), fractions=(...)))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from torch import Tensor

from sae_fast.objectives.auxk import AuxK, Revived
from sae_fast.objectives.gated import Gated
from sae_fast.objectives.l0 import L0
from sae_fast.objectives.l1 import L1
from sae_fast.objectives.objective import Objective, Pull
from sae_fast.objectives.prefixes import Prefixes
from sae_fast.objectives.topk import TopK

BY_NAME: dict[str, type[Objective]] = {kind.__name__: kind for kind in (Gated, L1, L0, TopK)}


def Matryoshka(over: Objective | None = None, group_sizes: Sequence[int] | None = None, **options: Any) -> Objective:
    """The objective ``over``, by default TopK(), with reconstruction from prefixes of the features: its arguments are those
    of :class:`Prefixes`."""
    over = TopK() if over is None else over
    if not isinstance(over, Objective):
        raise ValueError(f"over: got {over!r}, want one of sae_fast.objectives, or None")
    return replace(over, prefixes=Prefixes(group_sizes, **options))  # type: ignore[arg-type]


def of_dialect(activation: str, l1_coefficient: float | Tensor, dialect: str = "paper") -> Gated | L1:
    """The objective of a GatedSAE or a ReluSAE in a dialect of MATH.md §1."""
    gated = Gated(l1_coefficient, dialect)
    return gated if activation == "gated" else L1(l1_coefficient, decoder_norms=gated.costs_norm)


def describe(objective: Objective) -> dict[str, Any]:
    """An objective as JSON has it."""
    given = {field.name for field in fields(objective) if field.init}
    return {"name": type(objective).__name__, **{name: v for name, v in asdict(objective).items() if name in given}}


def rebuild(about: dict[str, Any]) -> Objective:
    """The objective that :func:`describe` described; ``ValueError`` for what is none."""
    arguments = dict(about)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in BY_NAME:
        raise ValueError(f"objective.name: got {name!r}, want one of {sorted(BY_NAME)}")
    at = "objective"
    try:
        for part, kind in (("prefixes", Prefixes), ("aux", AuxK)):
            if isinstance(arguments.get(part), dict):
                at = f"objective.{part}"
                arguments[part] = kind(**arguments[part])
        at = "objective"
        return BY_NAME[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{at}: {error}") from error


__all__ = [
    "L0",
    "L1",
    "AuxK",
    "Gated",
    "Matryoshka",
    "Objective",
    "Prefixes",
    "Pull",
    "Revived",
    "TopK",
    "describe",
    "of_dialect",
    "rebuild",
]
