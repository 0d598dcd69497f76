"""Random weights, of a seed or of torch's global generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sae_fast import arguments


def unit_rows(rows: int, widths: tuple[int, ...], device: torch.device, seed: int | None) -> list[Tensor]:
    """Unit rows [rows, width] for each width, one matrix for equal ones.  On the device "meta" nothing is drawn."""
    different = tuple(dict.fromkeys(widths))
    if device.type == "meta":
        drawn = [torch.empty(rows, d, device=device) for d in different]
    else:
        seed = None if seed is None else arguments.whole("seed", seed, -(2**63), 2**64 - 1, "an int of 64 bits")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        random = [torch.randn(rows, d, generator=generator, dtype=torch.float32, device="cpu") for d in different]
        drawn = [nn.functional.normalize(matrix, dim=1) for matrix in random]
    return [drawn[different.index(d)] for d in widths]
