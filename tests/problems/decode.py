"""Codes and groups for decode, and its sums in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch


def plain(bounds):
    """f W_dec by feature group, [V, G, B, d]."""
    return lambda f, W: torch.stack([f[..., a:b] @ W[a:b] for a, b in pairwise(bounds)], dim=1)


def groups_of(F: int) -> list[int]:
    """Groups of 0, 1 and more features, that cover neither the first nor the last feature where there are enough."""
    return [*sorted({F // 8, F // 4, F // 4 + 1, F // 2, F - F // 5}), F - F // 5]
