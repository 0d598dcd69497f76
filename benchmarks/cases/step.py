"""step: a whole training step of a Gated SAE: loss, every gradient, the decoder's constraint, Adam."""

from __future__ import annotations

from typing import Any

import torch

import sae_fast as sf
from benchmarks.cases.floors import add_products, step_floor
from benchmarks.data import FULL, SMALL
from benchmarks.registry import OURS, Goal, Run, case
from sae_fast import GatedSAE, reference
from sae_fast.train.eager import EagerTrainer

BETAS, EPS, L1 = (0.0, 0.999), 1e-8, 1.0
# The rate is small enough that the support, hence the work, stays what it is over the rounds, and large enough that the
# check sees every update far above the rounding of the weights.
SETTINGS: dict[str, Any] = dict(lr=1e-5, l1_coefficient=L1, betas=BETAS, eps=EPS)


@case(
    "step",
    mode="train",
    inputs=lambda world: world.batches,
    outcome=lambda sae, results: dict(sae.named_parameters()),
    memory=True,
    orders=8,
    goals=(
        Goal("time ÷ the bare product's", "time", OURS, "bare_product", at_most=0.65),
        Goal("peak memory ÷ the eager reference's", "peak_memory", OURS, "eager", at_most=0.1),
        Goal("dictionary_learning's time ÷ ours", "time", "dictionary_learning", OURS, at_least=20),
        Goal("dictionary_learning's time ÷ ours", "time", "dictionary_learning", OURS, at_least=10, at=SMALL),
        Goal("the eager reference's time ÷ ours, dense phase", "time", "eager", OURS, at_least=1, at=FULL.dense),
    ),
)
def step(sae: GatedSAE) -> Run:
    """As the paper writes it, by autograd, with Adam spelled out."""
    return by_autograd(sae)


def by_autograd(
    sae: GatedSAE, dialect: str = "paper", betas: tuple[float, float] = BETAS, clip: float | None = None
) -> Run:
    """A step of either dialect in plain PyTorch: only ``paper`` holds decoder rows at unit norm; ``clip`` is the largest
    norm of the whole gradient."""
    parameters = dict(sae.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    count = 0

    def run(x: torch.Tensor) -> None:
        nonlocal count
        count += 1
        loss = reference.gated_loss(x, **parameters, l1_coefficient=L1, dialect=dialect)  # type: ignore[arg-type]
        grads = torch.autograd.grad(loss.total, list(parameters.values()))
        with torch.no_grad():
            if clip is not None:
                factor = (clip / (torch.stack([grad.norm() for grad in grads]).norm() + 1e-6)).clamp(max=1)
                grads = tuple(factor * grad for grad in grads)
            for (name, p), grad in zip(parameters.items(), grads, strict=True):
                unit_rows = name == "W_dec" and dialect == "paper"
                reference.adam_step(p, grad, *moments[name], count, SETTINGS["lr"], betas, EPS, unit_rows=unit_rows)

    return run


@step.provider(OURS)
def ours(sae: GatedSAE) -> Run:
    return sf.Trainer(sae, **SETTINGS).step


@step.provider("eager")
def eager(sae: GatedSAE) -> Run:
    """As well as eager PyTorch allows: one encoder product, fused Adam."""
    return EagerTrainer(sae, **SETTINGS).step


@step.provider("eager_compiled", optional=True, slow=True)
def eager_compiled(sae: GatedSAE) -> Run:
    torch.compiler.reset()  # or a second shape would be compiled for any batch size, which is slower
    return EagerTrainer(sae, **SETTINGS, compile=True).step


add_products(step)
step.provider("floor", floor=True, optional=True)(step_floor)
