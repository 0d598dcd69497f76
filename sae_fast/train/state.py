"""The state of a training between two steps, its settings, and what a step gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sae_fast import arguments, nn, ops
from sae_fast.code import SparseCode
from sae_fast.objectives import L0, Matryoshka, Objective, TopK, of_dialect
from sae_fast.optim import RowAdam, checked_betas
from sae_fast.reference import DIALECTS

NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of the settings: what fits, in words
    **dict.fromkeys(("lr", "eps", "l1_coefficient"), (lambda n: n >= 0, "a number ≥ 0")),
    **dict.fromkeys(("init_l0", "grad_clip"), (lambda n: n > 0, "a number > 0")),
    **dict.fromkeys(
        ("lr_warmup_steps", "l1_warmup_steps", "lr_decay_start", "total_steps"),
        (lambda n: isinstance(n, int) and n >= 0, "a whole number of steps ≥ 0"),
    ),
    "dead_after": (arguments.counts, "a whole number of examples > 0"),
}


@dataclass(frozen=True)
class Settings:
    """A Trainer's arguments, as its checkpoint keeps them."""

    lr: float
    l1_coefficient: float | None
    betas: tuple[float, float]
    eps: float
    dialect: str
    lr_warmup_steps: int
    lr_decay_start: int | None
    total_steps: int | None
    l1_warmup_steps: int
    init_l0: float | None
    grad_clip: float | None
    unit_start: bool = True
    objective: Objective | None = None
    dead_after: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas(self.betas))
        object.__setattr__(self, "unit_start", arguments.flag("unit_start", self.unit_start))
        if self.dialect not in DIALECTS:
            raise ValueError(f"dialect: got {self.dialect!r}, want one of {DIALECTS}")
        for part in fields(self):
            value, optional = getattr(self, part.name), str(part.type).endswith("| None")
            if part.name in NUMBERS and not (optional and value is None):
                fits, wanted = NUMBERS[part.name]
                wanted = f"{wanted} or None" if optional else wanted
                object.__setattr__(self, part.name, arguments.number(part.name, value, fits, wanted))
        if (self.lr_decay_start is None) != (self.total_steps is None):
            raise ValueError("lr_decay_start, total_steps: got one without the other, want both or neither")
        if self.lr_decay_start is not None and self.total_steps is not None and self.lr_decay_start > self.total_steps:
            raise ValueError(f"lr_decay_start: got {self.lr_decay_start}, want ≤ total_steps = {self.total_steps}")
        if self.objective is not None and not isinstance(self.objective, Objective):
            raise ValueError(f"objective: got {self.objective!r}, want one of sae_fast.objectives, or None")
        if self.objective is not None and isinstance(coefficient := self.objective.coefficient, Tensor):
            if coefficient.dim() != 0:
                raise ValueError(f"objective: got a coefficient of shape {tuple(coefficient.shape)}, want a number")
            object.__setattr__(self, "objective", replace(self.objective, coefficient=coefficient.item()))
        if self.objective is not None and self.objective.aux is not None and self.dead_after is None:
            raise ValueError(
                "dead_after: got None with an aid for dead features, want the examples after which one is dead"
            )


class TrainState:
    """All that a step reads and writes.  ``kept`` is W_enc's Shadow; ``step_count`` counts the steps that were taken, those
    under way on a GPU among them; ``since_fired`` [F] int64, with ``dead_after``: examples since a feature fired."""

    since_fired: Tensor | None
    objective: Objective  # the settings', or the kind's own

    def __init__(self, sae: nn.SparseAutoencoder, settings: Settings):
        self.sae, self.since_fired = sae, None
        self.settings = settings
        rest = [p for name, p in sae.named_parameters() if name != "W_dec"]
        groups = [{"params": [sae.W_dec], "unit_rows": self.objective.unit_rows}, {"params": rest}]
        self.optimizer = RowAdam(groups, settings.lr, settings.betas, settings.eps, unit_start=settings.unit_start)
        self.kept = ops.KeptShadow()
        self.step_count = 0

    @property
    def settings(self) -> Settings:
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        """They may change between steps; ``ValueError`` where they do not go with the SAE, and nothing changes."""
        sae = self.sae
        objective = settings.objective or default_objective(sae, settings.l1_coefficient, settings.dialect)
        sae.check_objective(objective)
        if settings.init_l0 is not None and isinstance(sae, nn.GroupedSAE):
            raise ValueError(f"init_l0: got {settings.init_l0} for a {type(sae).__name__}, want None: its k decides")
        if hasattr(self, "_settings") and objective.unit_rows != (held := self.objective.unit_rows):
            raise ValueError(f"objective: got unit_rows = {objective.unit_rows} in a training, want {held}, as it began")
        self._settings, self.objective = settings, objective
        if settings.dead_after is None:
            self.since_fired = None
        elif self.since_fired is None:
            self.since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)

    @property
    def clamps(self) -> bool:
        """True if thresholds are to be held at 0 or above."""
        objective = self.objective
        return isinstance(objective, L0) and objective.positive and self.sae.get_parameter("threshold").requires_grad

    def fired(self, code: SparseCode) -> Tensor | None:
        """``since_fired`` after a step on ``code``."""
        if self.since_fired is None:
            return None
        since = self.since_fired + code.batch
        since[code.indices[code.magnitudes > 0].long()] = 0
        return since

    def dead(self, code: SparseCode) -> Tensor:
        """[F] bool: the features that are dead after a step on ``code``."""
        since = self.fired(code)
        assert since is not None and self.settings.dead_after is not None
        return since >= self.settings.dead_after

    def check_parameters(self, where: str = "") -> None:
        """``ValueError`` that names a parameter of the SAE which is not the optimizer's, or not as its state is."""
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        for name, p in self.sae.named_parameters():
            if p not in held:
                raise ValueError(
                    f"{where}{name}: got a Parameter that the optimizer does not hold (load_state_dict(assign=True), a new "
                    "one); want its values copied into the one that was there, or a new Trainer"
                )
            held.remove(p)
            state = self.optimizer.state.get(p, {}).get("exp_avg_sq", p)
            if p.dtype not in (torch.float32, torch.float64) or not p.is_contiguous():
                raise ValueError(f"{where}{name}: got {p.dtype}, strides {p.stride()}, want contiguous float32 masters")
            if (p.dtype, p.device, p.shape) != (state.dtype, state.device, state.shape):
                raise ValueError(
                    f"{where}{name}: got {p.dtype} {tuple(p.shape)} on {p.device}, but the optimizer's state is "
                    f"{state.dtype} {tuple(state.shape)} on {state.device}; want both alike (save, and load where it goes)"
                )
        if held:
            raise ValueError(f"{where}optimizer: got {len(held)} parameters that are not the SAE's, want its own only")


def default_objective(sae: nn.SparseAutoencoder, l1_coefficient: float | None, dialect: str) -> Objective:
    """The objective of a kind where none is given; ``ValueError`` for a coefficient that is missing or of no use."""
    if isinstance(sae, nn.GroupedSAE):
        if l1_coefficient is not None:
            raise ValueError(f"l1_coefficient: got {l1_coefficient} for a {type(sae).__name__}, want None: its k decides")
        return TopK() if sae.group_sizes is None else Matryoshka(TopK(), sae.group_sizes)
    if isinstance(sae, nn.JumpReluSAE):
        raise ValueError(
            "objective: got None for a JumpReluSAE, want one such as sae_fast.objectives.L0(target=40, bandwidth=1e-3): "
            "the active features wanted an example, and the window's width, in the units of x"
        )
    if l1_coefficient is None:
        raise ValueError(
            "l1_coefficient: got None, want λ ≥ 0, the weight of the sparsity beside ‖x − x̂‖².  It goes with the scale "
            "of x; at unit variance per dimension begin with 1 to 10, and raise it where L0 ends too high"
        )
    return of_dialect(sae.activation, l1_coefficient, dialect)


class Rates(NamedTuple):
    """The schedules' values in one step; ``l1_coefficient`` is the objective's."""

    lr: float
    l1_coefficient: float


class Result(Protocol):
    """Losses and L0 of a step; reading them may wait for it."""

    @property
    def losses(self) -> Tensor:
        """[3]: reconstruction, sparsity, auxiliary."""

    @property
    def squared_error(self) -> float:
        """Mean of ‖x − x̂‖², of all features."""

    @property
    def l0(self) -> float:
        """Mean number of non-zero features an example."""

    @property
    def dead(self) -> int | None:
        """Dead features after the step; None where they are not counted."""


@dataclass(frozen=True, repr=False)
class StepLog:
    """Losses, L0 and rates of one step, before its update.  Losses are means over the batch; reading may synchronise."""

    step: int
    lr: float
    l1_coefficient: float
    result: Result

    def __repr__(self) -> str:
        terms = ", ".join(f"{n}={getattr(self, n):.6g}" for n in ("loss", "reconstruction", "sparsity", "auxiliary", "l0"))
        return f"StepLog(step={self.step}, {terms})"

    @property
    def losses(self) -> Tensor:
        """[3]: reconstruction, sparsity, auxiliary."""
        return self.result.losses

    @property
    def reconstruction(self) -> float:
        return float(self.losses[0])

    @property
    def squared_error(self) -> float:
        """Mean of ‖x − x̂‖²: the reconstruction, or with prefixes the last one's."""
        return self.result.squared_error

    @property
    def sparsity(self) -> float:
        """λ included."""
        return float(self.losses[1])

    @property
    def auxiliary(self) -> float:
        return float(self.losses[2])

    @property
    def loss(self) -> float:
        return float(self.losses.sum())

    @property
    def l0(self) -> float:
        """Mean number of non-zero features an example."""
        return self.result.l0

    @property
    def dead(self) -> int | None:
        """Features that have not fired for ``dead_after`` examples; None where they are not counted."""
        return self.result.dead
