"""The recipe of a training: its kind of SAE, and every setting, with each kind's defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import sae_fast as sf
from sae_fast import nn, objectives
from sae_fast.devices import usable

AUX, LONGEST = 1 / 32, 10_000_000  # AuxK's weight, and the tokens after which a feature is dead in any training
FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)  # of Matryoshka's features, the first groups' each twice the last
THRESHOLD = 1.0  # where JumpReLU's start, in activations of unit variance


class Kind(NamedTuple):
    """A kind of SAE: its name in titles, its layer, and its own options with their defaults."""

    title: str
    layer: type[nn.SparseAutoencoder]
    options: dict[str, Any]


_L1 = {"l1": 2.5, "init_l0": 64.0, "beta1": 0.0, "aux": 0.0}
_TOPK = {"k": 32, "beta1": 0.9, "aux": AUX}
KINDS = {
    "gated": Kind("Gated", sf.GatedSAE, _L1),
    "relu": Kind("ReLU", sf.ReluSAE, _L1),
    "jumprelu": Kind(
        "JumpReLU",
        sf.JumpReluSAE,
        {"target_l0": 32.0, "bandwidth": 0.5, "penalty": 50.0, "init_l0": 64.0, "beta1": 0.0, "aux": 0.0},
    ),
    "topk": Kind("TopK", sf.TopKSAE, _TOPK),
    "batchtopk": Kind("BatchTopK", sf.BatchTopKSAE, _TOPK),
    "matryoshka": Kind("Matryoshka BatchTopK", sf.BatchTopKSAE, {**_TOPK, "groups": FRACTIONS}),
}
OPTIONS = tuple(dict.fromkeys(name for kind in KINDS.values() for name in kind.options))


@dataclass(frozen=True)
class Recipe:
    """Settings of a training, for activations of unit variance per dimension; `train` scales them so.

    An option that is None is its kind's default, where the kind has it.  l1: λ of gated and relu.  k: features kept a
    token.  target_l0, bandwidth, penalty: of objectives.L0.  groups: Matryoshka's, fractions of d_sae or sizes.  init_l0:
    features a token to calibrate for.  beta1: Adam's.  aux: AuxK's weight, 0 for none.  dead_after: the tokens after which
    a feature that has not fired is dead; by default a tenth of the training, at most 10 million.
    """

    d_sae: int = 6144
    batch_size: int = 1024
    steps: int = 1500
    lr: float = 2e-3
    l1: float | None = None
    init_l0: float | None = None
    holdout: float = 0.1
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    kind: str = "gated"
    k: int | None = None
    target_l0: float | None = None
    bandwidth: float | None = None
    penalty: float | None = None
    groups: tuple[float, ...] | None = None
    beta1: float | None = None
    aux: float | None = None
    dead_after: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, want one of {', '.join(KINDS)}")
        for name in ("d_sae", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
        for name in OPTIONS:
            self._settle(name, KINDS[self.kind].options.get(name))
        if self.dead_after is None and self.aux:
            object.__setattr__(self, "dead_after", min(LONGEST, max(1, self.steps * self.batch_size // 10)))
        usable(self.device)
        self.trainer(self.sae(1))  # whose checks come before a harvest, not after it

    def _settle(self, name: str, default: Any) -> None:
        """Gives an option that is None its default, and refuses one that the kind has not or cannot have."""
        value = getattr(self, name)
        if value is None:
            object.__setattr__(self, name, default)
        elif default is None:
            theirs = ", ".join(kind for kind, about in KINDS.items() if name in about.options)
            raise ValueError(f"{name}: got {value} for kind {self.kind!r}, want none: it is of {theirs}")
        elif name in ("target_l0", "bandwidth", "penalty") and not value > 0:
            raise ValueError(f"{name}: got {value}, want > 0")
        elif name == "beta1" and not 0 <= value < 1:
            raise ValueError(f"beta1: got {value}, want 0 ≤ beta1 < 1")
        elif name == "aux" and not value >= 0:
            raise ValueError(f"aux: got {value}, want > 0, or 0 for none")

    @property
    def title(self) -> str:
        """The name of the kind in titles."""
        return KINDS[self.kind].title

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's."""
        return self.beta1 or 0.0, 0.999

    def sae(self, d_in: int) -> nn.SparseAutoencoder:
        """An SAE of the kind, before its first step."""
        options: dict[str, Any] = {} if self.k is None else {"k": self.k}
        if self.groups is not None:
            options["group_sizes"] = self._group_sizes(self.groups)
        sae = KINDS[self.kind].layer(d_in, self.d_sae, seed=self.seed, device=self.device, **options)
        if isinstance(sae, nn.JumpReluSAE):
            torch.nn.init.constant_(sae.threshold, THRESHOLD)
        return sae

    def trainer(self, sae: nn.SparseAutoencoder) -> sf.Trainer:
        return sf.Trainer(
            sae,
            lr=self.lr,
            l1_coefficient=self.l1,
            betas=self.betas,
            init_l0=self.init_l0,
            lr_decay_start=self.steps * 4 // 5,
            total_steps=self.steps,
            objective=self._objective(sae),
            dead_after=self.dead_after,
            aux=self.aux or None,
        )

    def _objective(self, sae: nn.SparseAutoencoder) -> objectives.Objective | None:
        """None is the Trainer's own, of l1."""
        if isinstance(sae, nn.JumpReluSAE):
            assert self.penalty is not None and self.bandwidth is not None
            return objectives.L0(self.penalty, self.target_l0, self.bandwidth)
        if not isinstance(sae, nn.GroupedSAE):
            return None
        start, window = max(0, self.steps // 2 - 1), max(10, self.steps // 10)  # of short trainings, in steps
        topk = objectives.TopK(threshold_beta=1 - 1 / min(1000, window), threshold_start=min(1000, start))
        return topk if sae.group_sizes is None else objectives.Matryoshka(topk, sae.group_sizes)

    def _group_sizes(self, groups: tuple[float, ...]) -> tuple[int, ...]:
        sizes = [size for size in groups if isinstance(size, int)]
        try:
            prefixes = (
                objectives.Prefixes(tuple(sizes)) if len(sizes) == len(groups) else objectives.Prefixes(fractions=groups)
            )
            return prefixes.sizes(self.d_sae)
        except ValueError as error:
            raise ValueError(f"groups: got {groups}: {error}") from error
