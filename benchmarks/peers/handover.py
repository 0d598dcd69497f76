"""Gives a peer the weights of our SAE, and our SAE the peer's memory: what the peer trains is what the gate reads."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def hand_over(ours: Tensor, theirs: Tensor, transposed: bool = False) -> None:
    """The peer's parameter takes the values of ours, in the memory layout that the peer made it with; ours becomes a view
    of it.  The peer has to update it in place, as optimizers do."""
    view = theirs.data.T if transposed else theirs.data
    if view.shape != ours.shape:
        raise ValueError(f"theirs: got shape {tuple(view.shape)}, want {tuple(ours.shape)}")
    view.copy_(ours)
    ours.data = view
