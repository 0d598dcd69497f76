"""dictionary_learning's Gated SAE: `GatedSAETrainer.update`, the `paper` dialect."""

from __future__ import annotations

from typing import Any

from dictionary_learning.trainers.gdm import GatedSAETrainer

from benchmarks.cases.step import L1, SETTINGS, step
from benchmarks.peers.handover import hand_over
from benchmarks.registry import Run
from sae_fast import GatedSAE

FOREVER = 1 << 40  # steps, where no schedule depends on them


def trainer_of(sae: GatedSAE, lr: float, l1: float, steps: int = FOREVER, **schedule: Any) -> GatedSAETrainer:
    """The peer's trainer on this SAE's weights, with the betas that it always has, (0, 0.999).

    Without ``schedule`` both warm-ups are off: by default the learning rate is 0 in the first step and grows over 1 000,
    λ over 2 000.
    """
    schedule = dict(warmup_steps=0, sparsity_warmup_steps=None) | schedule
    trainer = GatedSAETrainer(
        steps=steps, activation_dim=sae.d_in, dict_size=sae.d_sae, layer=0, lm_name="", lr=lr, l1_penalty=l1, device="cpu",
        **schedule,
    )  # fmt: skip
    peer = trainer.ae
    hand_over(sae.W_enc, peer.encoder.weight)
    hand_over(sae.W_dec, peer.decoder.weight, transposed=True)
    hand_over(sae.b_gate, peer.gate_bias)
    hand_over(sae.b_mag, peer.mag_bias)
    hand_over(sae.r_mag, peer.r_mag)
    hand_over(sae.b_dec, peer.decoder_bias)
    return trainer


def in_columns(sae: GatedSAE) -> Run:
    """The step's reference, with W_dec in memory as the peer lays it out: [d, F], a feature a column.

    That makes a difference to torch's own error in float32: a column's norm is summed through strided memory, term after
    term, and at d = 768 columns are four times as far from unit norm as rows are.  In this layout the reference and
    the peer give the same weights; held against rows, the peer would be found wrong for the way in which torch sums.
    """
    hand_over(sae.W_dec, sae.W_dec.new_empty(sae.d_in, sae.d_sae), transposed=True)
    return step.reference(sae)


@step.provider("dictionary_learning")
def update(sae: GatedSAE) -> Run:
    trainer = trainer_of(sae, SETTINGS["lr"], L1)
    return lambda x: trainer.update(0, x)
