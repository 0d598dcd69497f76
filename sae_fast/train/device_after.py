"""The rest of a step on a GPU, which has no gradient and follows from its code, if it happened: nothing is waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import nn
from sae_fast.kernels.compact import Gapped
from sae_fast.kernels.fired import fired
from sae_fast.objectives import TopK
from sae_fast.train.state import TrainState


def silent_after(state: TrainState, code: Gapped) -> Tensor | None:
    """[F]: the state's ``since_fired`` after a step on ``code``."""
    if state.since_fired is None:
        return None
    since = state.since_fired + code.begin.shape[0]
    fired(code.indices, code.values[0], since)
    return since


def follow(state: TrainState, code: Gapped, since: Tensor | None, step: Tensor, flag: Tensor) -> Tensor | None:
    """Moves the state on after a ``step``, which counts from 1, on ``code`` if the flag is not set; both are 0-d.  Returns
    the number of dead features, if they are counted."""
    sae, dead_after = state.sae, state.settings.dead_after
    if isinstance(state.objective, TopK) and isinstance(sae, nn.BatchTopKSAE):
        moved = state.objective.next_threshold(sae.threshold, code.values[0], step - 1)
        sae.threshold.copy_(torch.where(flag == 0, moved, sae.threshold))
    if state.clamps:
        threshold = sae.get_parameter("threshold").detach()
        threshold.copy_(torch.where(flag == 0, threshold.clamp(min=0), threshold))
    if since is None or state.since_fired is None or dead_after is None:
        return None
    state.since_fired.copy_(torch.where(flag == 0, since, state.since_fired))
    return (since >= dead_after).sum()
