"""step: a whole training step of a Gated SAE: loss, every gradient, the decoder's constraint, Adam."""

from __future__ import annotations

from typing import Any

import torch

import sae_fast as sf
from benchmarks.registry import Goal, Run, case
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
    goals=(
        Goal("time ÷ the bare product's", "time", "sae_fast", "bare_product", at_most=1.35),
        Goal("the eager reference's time ÷ ours", "time", "eager", "sae_fast", at_least=7),
        Goal("peak memory ÷ the eager reference's", "peak_memory", "sae_fast", "eager", at_most=0.25),
    ),
)
def step(sae: GatedSAE) -> Run:
    """As the paper writes it, by autograd, with Adam spelled out."""
    parameters = dict(sae.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    count = 0

    def run(x: torch.Tensor) -> None:
        nonlocal count
        count += 1
        loss = reference.gated_loss(x, **parameters, l1_coefficient=L1)  # type: ignore[arg-type]
        grads = torch.autograd.grad(loss.total, list(parameters.values()))
        with torch.no_grad():
            for (name, p), grad in zip(parameters.items(), grads, strict=True):
                m, v = moments[name]
                reference.adam_step(p, grad, m, v, count, SETTINGS["lr"], BETAS, EPS, unit_rows=name == "W_dec")

    return run


@step.provider("sae_fast")
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


@step.provider("bare_product", floor=True)
def bare_product(sae: GatedSAE) -> Run:
    """The encoder's product, as one writes it."""
    W_enc = sae.W_enc.detach()
    return lambda x: x @ W_enc.T


@step.provider("bare_product_out", floor=True)
def bare_product_out(sae: GatedSAE) -> Run:
    """The same into memory that is there already: no page of the result is new to the process."""
    W_enc, out = sae.W_enc.detach(), torch.empty(0)
    return lambda x: torch.mm(x, W_enc.T, out=out.resize_(x.shape[0], W_enc.shape[0]))
