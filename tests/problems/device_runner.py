"""Layers, batches and the band for the Trainer's steps on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import randn
from torch import Tensor
from torch.nn import functional

import sae_fast as sf
from problems.trainer import PlainTrainer
from sae_fast import use_backend
from sae_fast.train import device_steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, D, F, STEPS = 5, 6, 20, 6
FIELDS = ("loss", "reconstruction", "sparsity", "auxiliary", "l0", "lr", "l1_coefficient", "step")


def batches(n: int = STEPS, seed: int = 0, loud: tuple[int, ...] = ()) -> list[Tensor]:
    x = 0.8 * randn(12, B, D, seed=104 + seed)[:n]
    for batch, rows in zip(x, loud, strict=False):
        batch[:rows] *= 10
    return list(x.to(DEVICE))


def make(cls=sf.GatedSAE, seed: int = 0, device: str = DEVICE, precision: str = "exact"):
    """A layer in the middle of things: no two parameters alike, a few features open on an example."""
    sae = cls(D, F, seed=seed, precision=precision)
    with torch.no_grad():
        sae.W_enc.add_(0.05 * randn(F, D, seed=1))
        sae.b_dec.copy_(0.1 * randn(D, seed=2))
        sae.calibrate_(randn(64, D, seed=3), 3)
        if cls is sf.GatedSAE:
            sae.r_mag.copy_(0.1 * randn(F, seed=4))
            sae.b_mag.add_(0.1 * randn(F, seed=5))
        sae.W_dec.copy_(functional.normalize(sae.W_dec, dim=1))
    return sae.to(device)


def fields(logs) -> list[tuple]:
    return [tuple(getattr(log, field) for field in FIELDS) for log in logs]


def assert_within_the_spread(sae, data: list[Tensor], start, logs=None, grad_clip=None, **settings) -> list[float]:
    """Near DESIGN.md's rule for trajectories: the weights are as close to float64 as twice the farthest of 8 runs of plain
    PyTorch with the rows of each batch permuted, and of the CPU engine, as so few rows make little spread.  With ``logs``,
    the losses too.  Returns the norms of the gradients."""

    def run(dtype, permutation=None):
        plain = PlainTrainer(start, grad_clip=grad_clip, dtype=dtype, **settings)
        g, losses = torch.Generator().manual_seed(permutation or 0), []
        for i, x in enumerate(data):
            x = x.detach().cpu().to(dtype)
            if logs is not None:
                plain.adam.param_groups[0]["lr"], plain.l1 = logs[i].lr, logs[i].l1_coefficient
            losses.append(plain.step(x if permutation is None else x[torch.randperm(len(x), generator=g)]))
        return plain.p, losses

    exact, losses = run(torch.float64)
    yardsticks = [run(torch.float32, seed)[0] for seed in range(8)]
    with use_backend("cpu"):
        engine = sf.Trainer(copy.deepcopy(start), grad_clip=grad_clip, **settings)
        if logs is not None:
            engine._rates = lambda i: (logs[i].lr, logs[i].l1_coefficient)
        for x in data:
            engine.step(x.cpu())
    yardsticks.append(dict(engine.sae.named_parameters()))
    for name, p in sae.named_parameters():
        error, *others = (
            (t[name].detach().cpu().double() - exact[name]).norm() for t in (dict(sae.named_parameters()), *yardsticks)
        )
        allowed = 2 * max(others) + 2.0**-24 * exact[name].abs().max()
        assert error <= allowed, f"{name}: error {error:.3e}, torch's own up to {max(others):.3e}"
        assert (p.detach().cpu() - start.get_parameter(name)).abs().max() > 1e-4, f"{name} was trained"
    for log, (wanted, _) in zip(logs or [], losses, strict=False):
        got = (log.loss, log.reconstruction, log.sparsity, log.auxiliary)
        assert got == pytest.approx([float(t) for t in wanted], rel=1e-5, abs=1e-7)
    return [norm for _, norm in losses]


def recoveries_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(step, flag) of every step that had not happened when the host asked."""
    seen: list[tuple[int, int]] = []
    recover = device_steps.DeviceSteps._recover

    def spy(self, step, flag, candidates):
        seen.append((step.index, flag))
        return recover(self, step, flag, candidates)

    monkeypatch.setattr(device_steps.DeviceSteps, "_recover", spy)
    return seen
