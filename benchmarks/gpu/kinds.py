"""A step of each kind with momentum (benchmarks/cases/kinds.py has the kinds), beside dense ones of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

import sae_fast as sf
from benchmarks.cases.kinds import EPS, LR, MOMENTUM, STEPS, l0_of
from benchmarks.data import Shape, World
from benchmarks.gpu.goals import PRECISIONS
from benchmarks.gpu.measure import Contender, Job, Running, Unavailable, wrong
from benchmarks.gpu.rivals import Dense, Sparsify


def layer_of(kind: str, here: World, double: bool = False) -> Any:
    """A layer of the kind, on weights of its own."""
    sae = here.new_sae()
    STEPS[kind].prepare(sae)
    return STEPS[kind].layer(sae.double() if double else sae)


@lru_cache(maxsize=1)
@torch.no_grad()
def true_loss(kind: str, here: World) -> float:
    """Of the first batch, in float64."""
    return float(STEPS[kind].loss(layer_of(kind, here, double=True), here.batches[0].double()))


def ours(kind: str, precision: str) -> Callable[[World], Running]:
    def start(here: World) -> Running:
        layer = layer_of(kind, here)
        layer.precision = precision
        trainer = sf.Trainer(layer, LR, eps=EPS, objective=STEPS[kind].objective(layer), **MOMENTUM)
        return _running(kind, here, lambda x: trainer.step(x).loss, trainer.step, layer.parameters(), precision)

    return start


def rival(kind: str, make: Callable[[Any], Any], precision: str) -> Callable[[World], Running]:
    def start(here: World) -> Running:
        try:
            one = make(layer_of(kind, here))
        except ImportError as error:
            raise Unavailable(str(error)) from error
        return _running(kind, here, one, one, one.parameters().values(), precision)

    return start


def _running(kind: str, here: World, loss: Callable, run: Callable, parameters: Any, precision: str) -> Running:
    def check() -> list[str]:
        return wrong({"loss": float(loss(here.batches[0]))}, {"loss": true_loss(kind, here)}, precision)

    return Running(run, here.batches, check, own=sum(p.numel() * p.element_size() for p in parameters))


def dense(kind: str, layer: Any) -> Dense:
    return Dense(layer, STEPS[kind].loss, LR, "bf16", "default", MOMENTUM["betas"])


def job(kind: str, at: Shape) -> Job:
    who = [Contender(name, ours(kind, precision)) for name, precision in PRECISIONS.items()]
    compiled = rival(kind, partial(dense, kind), "bf16")
    who.append(Contender("compiled_bf16", compiled, "torch.compile, autocast", optional=True))
    if kind == "topk":
        theirs = rival(kind, lambda layer: Sparsify(layer, l0_of(layer), LR), "bf16")
        who.append(Contender("sparsify", theirs, "its Triton decoder, its autocast", optional=True))
    return Job(f"kind_{kind}", "train", at, "uniform", tuple(who), memory=True, needs=30.0)
