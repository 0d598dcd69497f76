"""A layer of every kind, for what holds of all of them."""

from __future__ import annotations

from typing import Any

import torch
from helpers import randn

import sae_fast as sf

KINDS = [sf.GatedSAE, sf.ReluSAE, sf.JumpReluSAE, sf.TopKSAE, sf.BatchTopKSAE]


def unlike(cls: type, d_in: int, d_sae: int, **options: Any) -> sf.nn.SparseAutoencoder:
    """A layer with no two parameters alike, and with features that rest."""
    k = {"k": 9} if issubclass(cls, (sf.TopKSAE, sf.BatchTopKSAE)) else {}
    sae = cls(d_in, d_sae, **k, seed=0, **options)
    with torch.no_grad():
        for i, (name, p) in enumerate(sae.named_parameters()):
            p.add_(randn(*p.shape, seed=i) * (0.2 if p.dim() == 1 else 0.1))
            if name in ("b_gate", "b_enc", "b_mag"):
                p.sub_(1.2)
    return sae
