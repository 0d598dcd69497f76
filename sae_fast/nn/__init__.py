"""The layers: one file a kind of SAE."""

from sae_fast.nn import normalize
from sae_fast.nn.base import SparseAutoencoder
from sae_fast.nn.batchtopk import BatchTopKSAE
from sae_fast.nn.gated import GatedSAE
from sae_fast.nn.grouped import GroupedSAE
from sae_fast.nn.jumprelu import JumpReluSAE
from sae_fast.nn.relu import ReluSAE
from sae_fast.nn.topk import TopKSAE

KINDS = {kind.__name__: kind for kind in (GatedSAE, ReluSAE, JumpReluSAE, TopKSAE, BatchTopKSAE)}  # by a checkpoint's word

__all__ = [
    "KINDS",
    "BatchTopKSAE",
    "GatedSAE",
    "GroupedSAE",
    "JumpReluSAE",
    "ReluSAE",
    "SparseAutoencoder",
    "TopKSAE",
    "normalize",
]
