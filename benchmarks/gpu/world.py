"""The world of a shape, made on the device: planted activations, and a Gated SAE that is at home on them.

As benchmarks/data.py, but every feature of the SAE is a planted direction, and how often each fires is given: all alike
("uniform"), or ∝ 1 / rank ("zipf"), where a few features own a large part of the entries and many fire a few times a batch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.data import Shape, World, mean_l0
from sae_fast import GatedSAE

FREQUENCIES = ("uniform", "zipf")
LARGE = Shape(B=8192, d=2304, F=65536, l0=64)
SMALL = Shape(B=4096, d=768, F=24576, l0=46)
BATCHES = 4  # of 30 MB and more, beside weights of 75 MB and more: no L2 cache holds what comes next


def rates(shape: Shape, frequencies: str, device: torch.device | str) -> Tensor:
    """[F]: how often each feature fires on an example; their sum is l0 (but for the cap at a half)."""
    if frequencies not in FREQUENCIES:
        raise ValueError(f"frequencies: got {frequencies!r}, want one of {FREQUENCIES}")
    rank = torch.arange(1, shape.F + 1, device=device, dtype=torch.float64)
    weight = torch.ones_like(rank) if frequencies == "uniform" else 1 / rank
    rate = weight * shape.l0 / weight.sum()
    for _ in range(20):  # what the cap takes from the commonest goes to the others
        rate = (rate * (shape.l0 / rate.sum())).clamp(max=0.5)
    return rate


def batch(n: int, directions: Tensor, rate: Tensor, mean: Tensor, random: torch.Generator) -> Tensor:
    """[n, d]: a mean, plus each direction as often as its rate says with a log-normal strength, plus a little noise."""
    total = round(n * float(rate.sum()))
    new = dict(generator=random, device=rate.device)
    which = torch.multinomial(rate.float(), total, replacement=True, generator=random)
    strengths = (0.5 * torch.randn(total, **new)).exp()
    starts = torch.arange(n, device=rate.device) * total // n
    sums = F.embedding_bag(which, directions, starts, mode="sum", per_sample_weights=strengths)
    return sums + mean + 0.02 * torch.randn(n, directions.shape[1], **new)


@torch.no_grad()
def calibrate(sae: GatedSAE, x: Tensor, rate: Tensor) -> None:
    """Sets each b_gate so that its feature fires on x as often as its rate says."""
    n = x.shape[0]
    for first in range(0, sae.d_sae, 1024):
        u = ((x - sae.b_dec) @ sae.W_enc[first : first + 1024].T).sort(dim=0, descending=True).values
        dither = torch.arange(first, first + u.shape[1], device=u.device, dtype=torch.float64) * 0.6180339887498949 % 1.0
        count = (rate[first : first + 1024] * n + dither).long().clamp(max=n - 1)[None]
        above = u.gather(0, (count - 1).clamp(min=0)) + (count == 0) * (u[:1] - u[-1:]) / n
        sae.b_gate[first : first + 1024] = -((above + u.gather(0, count)) / 2)[0]


@lru_cache(maxsize=1)
def world(shape: Shape, frequencies: str, device: str = "cuda", batches: int = BATCHES, seed: int = 0) -> World:
    random = torch.Generator(device).manual_seed(seed)
    rate = rates(shape, frequencies, device)
    directions = F.normalize(torch.randn(shape.F, shape.d, generator=random, device=device), dim=1)
    mean = 3 * F.normalize(torch.randn(shape.d, generator=random, device=device), dim=0)
    sae = GatedSAE(shape.d, 1, device=device)
    sae.d_sae = shape.F
    sae.metadata["l0"] = shape.l0  # the k of other kinds
    for name in (*sae.per_feature, "W_enc", "W_dec"):  # the constructor draws on the host, which is slow at this size
        like = directions if name.startswith("W") else torch.zeros(shape.F, device=device)
        setattr(sae, name, torch.nn.Parameter(like.clone()))
    with torch.no_grad():
        sample = batch(max(2048, min(shape.B, 8192)), directions, rate, mean, random)
        sae.b_dec.copy_(sample.mean(0))
        calibrate(sae, sample, rate)
        fresh = batch(shape.B, directions, rate, mean, random)
        calibrate(sae, sample, rate * min(2.0, shape.l0 / max(mean_l0(sae, fresh), 1e-3)))  # a sample's tails are thin
        sae.r_mag.uniform_(-0.1, 0.1, generator=random)  # so that magnitudes and gates differ, on one support
        sae.b_mag.copy_(sae.r_mag.exp() * sae.b_gate)
    return World(shape, [batch(shape.B, directions, rate, mean, random) for _ in range(batches)], sae)
