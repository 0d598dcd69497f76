"""step_saelens: SAELens' own Gated step, `SAETrainer.step`, in its own dialect.

The sparsity is weighted by the decoder's norms, the auxiliary decoder is not stopped, no row is held at unit norm, Adam has
β = (0.9, 0.999), and the gradient is clipped to norm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

import sae_fast as sf
from benchmarks.cases.floors import bare_product
from benchmarks.cases.step import EPS, L1
from benchmarks.peers.handover import hand_over
from benchmarks.registry import OURS, Run, case
from sae_fast import GatedSAE, reference

LR, BETAS, CLIP = 1e-5, (0.9, 0.999), 1.0
SETTINGS: dict[str, Any] = dict(lr=LR, l1_coefficient=L1, betas=BETAS, eps=EPS, dialect="saelens", grad_clip=CLIP)


@case(
    "step_saelens",
    mode="train",
    inputs=lambda world: world.batches,
    outcome=lambda sae, results: dict(sae.named_parameters()),
    memory=True,
)
def step_saelens(sae: GatedSAE) -> Run:
    parameters = dict(sae.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    count = 0

    def run(x: torch.Tensor) -> None:
        nonlocal count
        count += 1
        loss = reference.gated_loss(x, **parameters, l1_coefficient=L1, dialect="saelens")
        grads = torch.autograd.grad(loss.total, list(parameters.values()))
        with torch.no_grad():
            norm = torch.stack([grad.norm() for grad in grads]).norm()
            factor = (CLIP / (norm + 1e-6)).clamp(max=1)
            for (name, p), grad in zip(parameters.items(), grads, strict=True):
                reference.adam_step(p, factor * grad, *moments[name], count, LR, BETAS, EPS)

    return run


@step_saelens.provider(OURS)
def ours(sae: GatedSAE) -> Run:
    return sf.Trainer(sae, **SETTINGS).step


@step_saelens.provider("sae_lens")
def theirs(sae: GatedSAE) -> Run:
    """With apply_b_dec_to_input, its default; the clip is fixed in its code."""
    peer = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=sae.d_in, d_sae=sae.d_sae, l1_coefficient=L1))
    hand_over(sae.W_enc, peer.W_enc, transposed=True)
    for name in ("W_dec", "b_gate", "b_mag", "r_mag", "b_dec"):
        hand_over(sae.get_parameter(name), peer.get_parameter(name))
    trainer = SAETrainer(
        SAETrainerConfig(1 << 40, 1, lr=LR, lr_end=LR, adam_beta1=BETAS[0], adam_beta2=BETAS[1]), peer, iter(())
    )
    return trainer.step


step_saelens.provider("bare_product", floor=True)(bare_product)
