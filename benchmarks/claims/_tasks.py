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
from benchmarks.data import Superposition
from sae_fast.data.harvest import harvest
from sae_fast.data.text import stdlib_documentation
from sae_fast.demo import demo_model

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
    train_part, mean, scale, rows = harvested(quick, held_out)
    return Task(mean, lambda: (x / scale for x in train_part.batches(batch_size, seed=seed)), rows, None)


@lru_cache(maxsize=1)
def harvested(quick: bool, held_out: int) -> tuple[Any, Tensor, float, Tensor]:
    text = stdlib_documentation()
    store = harvest(demo_model(), text[:QUICK_CHARACTERS] if quick else text, 2, device="cpu")
    train_part, held_part = store.split()
    mean, scale = train_part.mean_and_scale()
    rows = next(held_part.batches(min(held_out, held_part.n_tokens), seed=0))
    return train_part, (mean / scale).float(), scale, rows / scale


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
    """As `runs.train`: b_dec at the mean, the learning rate falling over the last fifth; ``options`` are Trainer's."""
    with torch.no_grad():
        sae.b_dec.copy_(task.mean)
    trainer = sf.Trainer(sae, lr_decay_start=steps * 4 // 5, total_steps=steps, **options)
    for x in itertools.islice(task.batches(), steps):
        trainer.step(x)
