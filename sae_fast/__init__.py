"""sae_fast: trains and runs sparse autoencoders many times faster, with exactly the same answers.

import sae_fast as sf

sae = sf.GatedSAE(d_in=768, d_sae=24576)
trainer = sf.Trainer(sae, lr=3e-4, l1_coefficient=3.0, init_l0=64)
for x in batches:                    # [B, 768]
    log = trainer.step(x)            # log.loss, log.l0 ...
x_hat = sae(x)
"""

import torch  # noqa: F401  (before the extension: both must share torch's OpenMP runtime)

from sae_fast import analysis, interop, metrics, objectives, ops, reference
from sae_fast.code import RowGradient, SparseCode, Transposed
from sae_fast.interop import load, published
from sae_fast.nn import BatchTopKSAE, GatedSAE, JumpReluSAE, ReluSAE, TopKSAE, normalize
from sae_fast.ops import use_backend
from sae_fast.optim import RowAdam
from sae_fast.train import StepLog, Trainer, save

__version__ = "0.1.0"
__all__ = [
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReluSAE",
    "ReluSAE",
    "RowAdam",
    "RowGradient",
    "SparseCode",
    "StepLog",
    "TopKSAE",
    "Trainer",
    "Transposed",
    "analysis",
    "interop",
    "load",
    "metrics",
    "normalize",
    "objectives",
    "ops",
    "published",
    "reference",
    "save",
    "use_backend",
]
