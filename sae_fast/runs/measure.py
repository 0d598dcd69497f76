"""Measurements: how good an SAE is on a store of activations, and how fast a step of its training."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch

import sae_fast as sf
from sae_fast.analysis import features
from sae_fast.data.activations import ActivationStore
from sae_fast.metrics import Metrics
from sae_fast.train.eager import EagerTrainer


@torch.inference_mode()
def evaluate(sae: Any, store: ActivationStore, tally: features.Tally | None = None) -> Metrics:
    """The metrics of an SAE over a store; the codes go to a tally, too."""
    metrics = Metrics(sae.d_sae)
    for x in store.chunks():
        rows = x.to(sae.W_enc.device)
        code = sae.encode_sparse(rows)
        metrics.update(rows, sae.decode(code, rows), code)
        if tally is not None:
            tally.update(code)
    return metrics


def measure_speedup(
    sae: Any, x: torch.Tensor, lr: float, l1: float, betas: tuple[float, float] = (0.0, 0.999), rounds: int = 9
) -> dict[str, float]:
    """Milliseconds of a training step of a Gated SAE on x [B, d] by the engine and by dense eager PyTorch, here and now.

    Both train copies of `sae`, in turn, on the same threads; the median of `rounds` is taken after a warm-up.
    """
    trainers: tuple[Any, Any] = (
        sf.Trainer(copy.deepcopy(sae), lr, l1, betas),
        EagerTrainer(copy.deepcopy(sae), lr, l1, betas),
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for trainer, times in zip(trainers, seconds, strict=True):
            start = time.perf_counter()
            trainer.step(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times.append(time.perf_counter() - start)
    engine, dense = (1e3 * statistics.median(times[1:]) for times in seconds)
    return {"engine_ms": engine, "dense_ms": dense, "times_faster": dense / engine}
