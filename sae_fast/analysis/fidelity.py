"""The part of a model's behaviour that survives an SAE: loss recovered and KL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sae_fast.analysis.batching import check_repeatable
from sae_fast.analysis.splicing import splice
from sae_fast.data import sites
from sae_fast.nn import SparseAutoencoder


class Fidelity(NamedTuple):
    """Mean losses over the predictions, in nats where the loss is a cross-entropy.

    loss_recovered = 1 − (spliced − clean) / (zero − clean): 1 if the SAE changes nothing, 0 if it is as bad as zeros at the
    site (MATH.md §4); nan if zeros do not change the loss.  kl: KL(clean ‖ spliced) of the predicted distributions.
    """

    clean: float
    spliced: float
    zero: float
    loss_recovered: float
    kl: float
    predictions: int


def logits_of(output: Any) -> Tensor:
    """The logits [..., V] in a model's output: its ``.logits``, the output if it is a tensor, or the first of a tuple."""
    logits = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) and output else output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits: got a {type(output).__name__} without logits, want a function that finds them in it")
    return logits


def next_token_loss(output: Any, batch: Any) -> Tensor:
    """[n]: the cross-entropy of each next token of a causal language model, without padding (attention_mask 0)."""
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch[0] if isinstance(batch, (tuple, list)) else batch
    losses = F.cross_entropy(logits_of(output)[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return losses.flatten() if mask is None else losses[(mask[:, :-1] & mask[:, 1:]).bool()]


@torch.no_grad()
def fidelity(
    model: nn.Module,
    site: str | nn.Module,
    sae: SparseAutoencoder,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] = next_token_loss,
    logits: Callable[[Any], Tensor] = logits_of,
    where: Tensor | Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> Fidelity:
    """Runs the model on every batch three times: as it is, with x̂ at the site, and with zeros there.

    batches: each a tensor, a dict of keyword arguments or a tuple of positional ones.  loss(output, batch): one number a
    prediction, [n].  logits(output): [..., V], for KL, which is over all positions but those with attention_mask 0.
    where: as in `splice`, or a function of the batch that gives it; it holds for the zeros too.
    """
    if isinstance(batches, (Tensor, Mapping, str)):
        raise ValueError(f"batches: got a {type(batches).__name__}, want a list of batches: [batch] for one")
    place = sites.find(model, site)
    check_repeatable(model)
    sums = torch.zeros(4, dtype=torch.float64)  # clean, spliced, zero, kl
    predictions = compared = 0

    for batch in tqdm(batches, "fidelity", unit="batch", disable=not progress):
        mask = where(batch) if callable(where) else where

        def zero(x: Tensor, mask: Tensor | None = mask) -> Tensor:
            return torch.zeros_like(x) if mask is None else x.masked_fill(mask.to(x.device)[..., None], 0)

        clean = sites.run(model, batch)
        with splice(model, place, sae, error="drop", where=mask):
            spliced = sites.run(model, batch)
        with sites.changed(place, zero):
            zeroed = sites.run(model, batch)
        losses = [loss(output, batch).double() for output in (clean, spliced, zeroed)]
        if losses[0].dim() != 1 or len(losses[0]) == 0:
            raise ValueError(f"loss: got shape {tuple(losses[0].shape)}, want [n], one number a prediction")
        p, q = (F.log_softmax(logits(output).double(), dim=-1) for output in (clean, spliced))
        kl = torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum(-1)
        real = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        kl = kl[real.bool()] if real is not None and real.shape == kl.shape else kl.flatten()
        sums += torch.stack([*(each.sum() for each in losses), kl.sum()]).cpu()
        predictions, compared = predictions + len(losses[0]), compared + len(kl)
    if predictions == 0:
        raise ValueError("batches: got none, want at least one")
    c, s, z = (sums[:3] / predictions).tolist()
    recovered = 1 - (s - c) / (z - c) if z != c else float("nan")
    return Fidelity(c, s, z, recovered, float(sums[3]) / compared, predictions)
