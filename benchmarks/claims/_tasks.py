"""What the SAEs of the sweep are trained on: real activations, and synthetic ones whose true features are known.

Both are scaled to unit variance a dimension, as `runs.train` does, so that λ and learning rates mean the same on both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sae_fast as sf
from benchmarks import activations
from benchmarks.activations import Activations
from benchmarks.data import Superposition

WORLD = {"d": 64, "features": 256, "active": 5.0}  # of Superposition
QUICK_CHARACTERS = 60_000  # of the text, for a quick run


class Task(NamedTuple):
    """The training part's mean [d]; its batches [batch_size, d], without end and the same ones in every call; held-out
    activations [n, d]; the true features [m, d], unit rows, where they are known."""

    mean: Tensor
    batches: Callable[[], Iterator[Tensor]]
    held_out: Tensor
    directions: Tensor | None


def real(seed: int, batch_size: int, held_out: int, quick: bool) -> Task:
    """The third layer of MiniLM (block 2) on the standard library's documentation.  The seed chooses the order of the
    training tokens; the tokens held out are the same for all."""
    found, rows = harvested(quick, held_out)
    return Task(found.mean, lambda: found.batches(batch_size, seed=seed), rows, None)


@lru_cache(maxsize=1)
def harvested(quick: bool, held_out: int) -> tuple[Activations, Tensor]:
    found = activations.of_demo(characters=QUICK_CHARACTERS if quick else None)
    return found, found.rows(held_out)


@lru_cache(maxsize=1)
def synthetic(seed: int, batch_size: int, held_out: int) -> Task:
    """Sums of a few of many unit directions about a mean.  The seed chooses the directions too."""
    source = Superposition(**WORLD, seed=seed)
    sample, rows = source.batch(16384), source.batch(held_out)
    mean = sample.mean(0)
    scale = float((sample - mean).square().mean().sqrt())
    begin = source.random.get_state()

    def batches() -> Iterator[Tensor]:
        source.random.set_state(begin)
        while True:
            yield source.batch(batch_size) / scale

    return Task(mean / scale, batches, rows / scale, source.directions)


def train(sae: sf.GatedSAE | sf.ReluSAE, task: Task, steps: int, **options: Any) -> None:
    """As `runs.train`: the learning rate falling over the last fifth; ``options`` are Trainer's."""
    fit(sf.Trainer(sae, lr_decay_start=steps * 4 // 5, total_steps=steps, **options), task, steps)


def fit(trainer: sf.Trainer, task: Task, steps: int) -> None:
    """So many steps on the task's batches, with b_dec at their mean to begin with."""
    with torch.no_grad():
        trainer.sae.b_dec.copy_(task.mean)
    for x in itertools.islice(task.batches(), steps):
        trainer.step(x)
