"""The scale on which an SAE is trained: its activations divided by one number, so that λ and learning rates mean the same
everywhere."""

from __future__ import annotations

import sys

import torch

from sae_fast import arguments
from sae_fast.nn import SparseAutoencoder

INPUT_SCALE = "input_scale"  # in an SAE's metadata: s, where its weights take x / s


@torch.no_grad()
def scale_(sae: SparseAutoencoder, scale: float) -> None:
    """Turns an SAE of x / scale into one of x: scaling x, biases and thresholds alike scales f and x̂; the gates stay."""
    for name, value in sae.state_dict().items():
        unset = name == "threshold" and value.dim() == 0 and float(value) < 0  # BatchTopK's
        if name.startswith("b_") or (name == "threshold" and not unset):
            value.mul_(scale)


@torch.no_grad()
def scale_input_(sae: SparseAutoencoder, scale: float, out: float | None = None) -> None:
    """Turns an SAE of scale · x into one of x whose features are the same.  ``out``: a transcoder's, which gives out times
    what it is to give; by default as ``scale``."""
    if sae.normalize is not None:
        raise ValueError(f"sae: got a {type(sae).__name__} with normalize = {sae.normalize}, want one without to scale it")
    sae.W_enc.mul_(scale)
    sae.W_dec.div_(out or scale)
    sae.b_dec.div_(out or scale)
    if sae.W_skip is not None:
        sae.W_skip.mul_(scale / (out or scale))


def unscale_(sae: SparseAutoencoder) -> None:
    """Turns an SAE whose metadata has an INPUT_SCALE into one of activations as they are; another stays."""
    if (scale := sae.metadata.pop(INPUT_SCALE, None)) is not None:
        scale_(sae, arguments.average(f"metadata: {INPUT_SCALE}", scale, sys.float_info.max, "a positive number"))
