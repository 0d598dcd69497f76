"""dictionary_learning's trainers, ours of the same names, and a task for both: the same arguments, batches and seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor

from benchmarks import activations
from benchmarks.data import QUICK, Shape, Superposition
from sae_fast.interop import dictionary_learning as ours
from sae_fast.runs.recipe import Recipe

THEIRS = "dictionary_learning"


@dataclass(frozen=True)
class Task:
    """What is trained on, and how sparse: λ, or k features of an example, by the kind; ``shape.l0`` calibrates."""

    name: str
    shape: Shape
    lr: float
    l1: float
    k: int
    warmup: int  # steps of the learning rate's warm-up; λ's takes twice as many, as the package's defaults do
    steps: int
    batches: Callable[[], Iterable[Tensor]]  # of [B, d]
    held_out: Callable[[int], Tensor]  # so many more examples

    def about(self) -> dict[str, Any]:
        """All but the data, for a file of figures."""
        return {name: value for name, value in asdict(self).items() if not callable(value)}


def by_penalty(task: Task) -> dict[str, Any]:
    return dict(l1_penalty=task.l1, sparsity_warmup_steps=2 * task.warmup)


def by_annealing(task: Task) -> dict[str, Any]:
    """p from 1 to a half over the last two thirds of the training."""
    return dict(
        initial_sparsity_penalty=task.l1, sparsity_warmup_steps=2 * task.warmup, sparsity_function="Lp^p", p_end=0.5,
        anneal_start=task.steps // 3,
    )  # fmt: skip


def by_target(task: Task) -> dict[str, Any]:
    """The demo's bandwidth and penalty: the package's are for activations of norm 1."""
    demo = Recipe(kind="jumprelu", device="cpu")
    return dict(
        target_l0=task.k, bandwidth=demo.bandwidth, sparsity_penalty=demo.penalty, sparsity_warmup_steps=2 * task.warmup
    )


def by_k(task: Task) -> dict[str, Any]:
    return dict(k=task.k, threshold_start_step=2 * task.warmup)


def by_groups(task: Task) -> dict[str, Any]:
    return dict(by_k(task), group_fractions=list(Recipe(kind="matryoshka", device="cpu").groups or ()))


class Kind(NamedTuple):
    """The package's trainer of a kind, ours, and what they take beside the arguments that all take."""

    theirs: type
    ours: type
    options: Callable[[Task], dict[str, Any]]

    @property
    def starts(self) -> tuple[bool, ...]:
        """The package's start, and calibrated where the kind has biases to calibrate."""
        return (False,) if self.options in (by_k, by_groups) else (False, True)


KINDS = {
    "gated": Kind(GatedSAETrainer, ours.GatedSAETrainer, by_penalty),
    "standard": Kind(StandardTrainer, ours.StandardTrainer, by_penalty),
    "april": Kind(StandardTrainerAprilUpdate, ours.StandardTrainerAprilUpdate, by_penalty),
    "topk": Kind(TopKTrainer, ours.TopKTrainer, by_k),
    "batchtopk": Kind(BatchTopKTrainer, ours.BatchTopKTrainer, by_k),
    "matryoshka": Kind(MatryoshkaBatchTopKTrainer, ours.MatryoshkaBatchTopKTrainer, by_groups),
    "jumprelu": Kind(JumpReluTrainer, ours.JumpReluTrainer, by_target),
    "p_anneal": Kind(PAnnealTrainer, ours.PAnnealTrainer, by_annealing),
    "gated_anneal": Kind(GatedAnnealTrainer, ours.GatedAnnealTrainer, by_annealing),
}


def config_of(task: Task, kind: str) -> dict[str, Any]:
    """The arguments that both trainers of a kind take."""
    common = dict(
        steps=task.steps, activation_dim=task.shape.d, dict_size=task.shape.F, layer=3, lm_name="", lr=task.lr,
        warmup_steps=task.warmup, seed=0, device="cpu",
    )  # fmt: skip
    return common | KINDS[kind].options(task)


def made(cls: type, config: dict[str, Any]) -> Any:
    """A trainer; the package's JumpReluTrainer takes no notice of its seed."""
    torch.manual_seed(config["seed"])
    return cls(**config)


def demo_task(steps: int) -> Task:
    """The demo's activations, λ, k and learning rate."""
    recipe, largest = Recipe(device="cpu"), Recipe(device="cpu", kind="topk")
    assert recipe.init_l0 is not None and recipe.l1 is not None and largest.k is not None
    found = activations.of_demo(recipe.holdout)
    shape = Shape(recipe.batch_size, found.train.d, recipe.d_sae, recipe.init_l0)
    batches = partial(found.batches, recipe.batch_size, steps)
    return Task("demo's activations", shape, recipe.lr, recipe.l1, largest.k, steps // 15, steps, batches, found.rows)


def quick_task(steps: int = 30) -> Task:
    source = Superposition(QUICK.d, QUICK.F, 4 * QUICK.d, seed=0)
    batches = [source.batch(QUICK.B) for _ in range(steps)]
    return Task("synthetic activations", QUICK, 1e-3, 1.0, 16, 5, steps, lambda: batches, source.batch)
