"""dictionary_learning's trainer of each kind, on the cases kind_… of benchmarks/cases/kinds.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer

from benchmarks.cases.kinds import BANDWIDTH, DEAD, FOREVER, FRACTIONS, KINDS, LR, STEPS, Step, l0_of
from benchmarks.cases.step import L1
from benchmarks.peers.handover import hand_over
from benchmarks.registry import Run
from sae_fast import GatedSAE

BY_K: dict[str, Any] = dict(warmup_steps=0, auxk_alpha=1 / 32, threshold_start_step=0)
OF_L1: dict[str, Any] = dict(warmup_steps=0, sparsity_warmup_steps=None)
TRAINERS: dict[str, tuple[type, Callable[[GatedSAE], dict[str, Any]]]] = {
    "relu": (StandardTrainer, lambda sae: dict(OF_L1, l1_penalty=L1)),
    "topk": (TopKTrainer, lambda sae: dict(BY_K, k=l0_of(sae))),
    "topk_dead": (TopKTrainer, lambda sae: dict(BY_K, k=l0_of(sae))),
    "batchtopk": (BatchTopKTrainer, lambda sae: dict(BY_K, k=l0_of(sae))),
    "matryoshka": (MatryoshkaBatchTopKTrainer, lambda sae: dict(BY_K, k=l0_of(sae), group_fractions=list(FRACTIONS))),
    "jumprelu": (JumpReluTrainer, lambda sae: dict(OF_L1, bandwidth=BANDWIDTH, target_l0=l0_of(sae))),
}


def trainer_of(name: str, step: Step, sae: GatedSAE) -> Any:
    """The peer's trainer of a kind, on the weights of the case's SAE, which are views of the peer's from then on."""
    cls, options = TRAINERS[name]
    trainer = cls(
        steps=1 << 40,
        activation_dim=sae.d_in,
        dict_size=sae.d_sae,
        layer=0,
        lm_name="",
        lr=LR,
        device="cpu",
        **options(sae),
    )
    peer = trainer.ae
    if step.columns:
        hand_over(sae.W_enc, peer.encoder.weight)
        hand_over(sae.W_dec, peer.decoder.weight, transposed=True)
        hand_over(sae.b_gate, peer.encoder.bias)
        hand_over(sae.b_dec, peer.bias if name == "relu" else peer.b_dec)
    else:
        hand_over(sae.W_enc, peer.W_enc, transposed=True)
        for ours, theirs in ((sae.W_dec, peer.W_dec), (sae.b_gate, peer.b_enc), (sae.b_dec, peer.b_dec)):
            hand_over(ours, theirs)
    if name == "jumprelu":
        hand_over(sae.r_mag, peer.threshold)
    if step.dead:
        trainer.num_tokens_since_fired[::DEAD] = FOREVER
    return trainer


def update_of(name: str) -> Callable[[GatedSAE], Run]:
    def update(sae: GatedSAE) -> Run:
        STEPS[name].prepare(sae)
        trainer = trainer_of(name, STEPS[name], sae)
        return lambda x: trainer.update(1, x)  # 0 would move b_dec to the batch's geometric median

    return update


def in_columns(name: str) -> Callable[[GatedSAE], Run]:
    """The case's reference, with W_dec in memory as the peer lays it out: see dictionary_learning.in_columns."""

    def reference(sae: GatedSAE) -> Run:
        if STEPS[name].columns:
            hand_over(sae.W_dec, sae.W_dec.new_empty(sae.d_in, sae.d_sae), transposed=True)
        return STEPS[name].reference(sae)

    return reference


for name in TRAINERS:
    KINDS[name].provider("dictionary_learning")(update_of(name))
