"""The demo's activations: block 2 of MiniLM on the standard library's documentation, of unit variance per dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from sae_fast.data.activations import ActivationStore
from sae_fast.data.harvest import harvest
from sae_fast.data.text import stdlib_documentation
from sae_fast.demo import demo_model


class Activations(NamedTuple):
    """Contexts to train on and contexts held out, as harvested; the mean [d] of the first, scaled; the scale."""

    train: ActivationStore
    held_out: ActivationStore
    mean: Tensor
    scale: float

    def batches(self, size: int, steps: int | None = None, seed: int = 0) -> Iterator[Tensor]:
        """Shuffled training batches [size, d], scaled: ``steps`` of them, or without end."""
        return (x / self.scale for x in self.train.batches(size, steps=steps, seed=seed))

    def rows(self, n: int, seed: int = 0) -> Tensor:
        """Held-out tokens [n, d], scaled, or as many as there are."""
        return next(self.held_out.batches(min(n, self.held_out.n_tokens), seed=seed)) / self.scale


def of_demo(holdout: float = 0.1, characters: int | None = None) -> Activations:
    """The activations that `make demo` trains on; with ``characters`` those of the text's beginning alone."""
    store = harvest(demo_model(), stdlib_documentation()[:characters], 2, device="cpu")
    train_part, held_part = store.split(holdout)
    mean, scale = train_part.mean_and_scale()
    return Activations(train_part, held_part, (mean / scale).float(), scale)
