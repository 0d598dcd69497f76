"""step_saelens: SAELens' own Gated step, `SAETrainer.step`, in its own dialect.

The sparsity is weighted by the decoder's norms, the auxiliary decoder is not stopped, no row is held at unit norm, Adam has
β = (0.9, 0.999), and the gradient is clipped to norm 1.
"""

from __future__ import annotations

from typing import Any

from sae_lens.config import SAETrainerConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

import sae_fast as sf
from benchmarks.cases.floors import bare_product
from benchmarks.cases.step import EPS, L1, by_autograd
from benchmarks.cases.step import SETTINGS as step_settings
from benchmarks.peers.handover import hand_over
from benchmarks.registry import OURS, Run, case
from sae_fast import GatedSAE

LR, BETAS, CLIP = step_settings["lr"], (0.9, 0.999), 1.0
SETTINGS: dict[str, Any] = dict(lr=LR, l1_coefficient=L1, betas=BETAS, eps=EPS, dialect="saelens", grad_clip=CLIP)


@case(
    "step_saelens",
    mode="train",
    inputs=lambda world: world.batches,
    outcome=lambda sae, results: dict(sae.named_parameters()),
    memory=True,
)
def step_saelens(sae: GatedSAE) -> Run:
    return by_autograd(sae, "saelens", BETAS, CLIP)


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
