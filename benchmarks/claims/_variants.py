"""The Gated SAE and the paper's ablations of it, trained many at a time: M models on the same batches, in one bmm each.

Every tensor has the models first: W_enc, W_dec [M, F, d], b_gate, b_mag, r_mag [M, F], b_dec [M, d], and u [M, B, F].
Gradients are the closed forms of MATH.md §2, densely; the optimizer is the paper's: Adam with β = (0, 0.999), decoder rows
of unit norm, the learning rate falling to 0 over the last fifth of the steps.  No features are resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sae_fast import GatedSAE
from sae_fast.train import schedules

BETA2, EPS = 0.999, 1e-8
FROZEN, UNFROZEN = "frozen", "unfrozen"
Params = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Variant:
    """Which function an SAE is and which loss it trains on; by default the Gated SAE's, equation (8)."""

    name: str
    gated: bool = True  # f̃ = 1[π_gate > 0] ⊙ ReLU(π_mag); else f̃ = ReLU(π_gate), the baseline
    auxiliary: str | None = FROZEN  # the auxiliary term, and whether it moves W_dec and b_dec
    tied: bool = True  # π_mag = exp(r_mag) ⊙ u + b_mag; else x_c W_magᵀ + b_mag with a W_mag of its own
    fixed: frozenset[str] = frozenset()  # parameters that stay as they are


GATED = Variant("Gated")
NO_R_MAG = Variant("no r_mag", fixed=frozenset({"r_mag"}))
UNTIED = Variant("untied encoders", tied=False, fixed=frozenset({"r_mag"}))
UNFROZEN_DECODER = Variant("decoder not frozen in the auxiliary term", auxiliary=UNFROZEN)
NO_AUXILIARY = Variant("no auxiliary term", auxiliary=None)
NO_AUXILIARY_UNTIED = Variant("no auxiliary term, untied", auxiliary=None, tied=False, fixed=frozenset({"r_mag"}))
BASELINE = Variant("baseline ReLU", gated=False, auxiliary=None, fixed=frozenset({"b_mag", "r_mag"}))
# The paper's check that shrinkage is not all: a trained baseline, of which only magnitudes are learned anew.
RESCALE_AND_SHIFT = Variant(
    "baseline, rescale and shift", auxiliary=None, fixed=frozenset({"W_enc", "W_dec", "b_gate", "b_dec"})
)


def start(sample: Tensor, n_features: int, models: int, seed: int, l0: float) -> Params:
    """``models`` copies of one Gated SAE: random unit rows, W_enc = W_dec, b_dec at the mean of ``sample`` [n, d], and
    gates calibrated so that ``l0`` features fire on an example of it.  In the dtype of the sample."""
    sae = GatedSAE(sample.shape[1], n_features, dtype=sample.dtype, seed=seed)
    with torch.no_grad():
        sae.b_dec.copy_(sample.mean(0))
        sae.calibrate_(sample, l0)
    return {name: value.detach()[None].repeat(models, *[1] * value.dim()) for name, value in sae.named_parameters()}


def untie(p: Params) -> Params:
    """With a W_mag [M, F, d] of its own, which starts at W_enc."""
    return p | {"W_mag": p["W_enc"].clone()}


def encode(p: Params, x: Tensor, variant: Variant) -> tuple[Tensor, Tensor, Tensor]:
    """(π_mag's product with x, ReLU(π_gate), f̃), [M, B, F] each, of x [B, d]; the baseline's f̃ is ReLU(π_gate)."""
    u = _linear(p["W_enc"], p["b_dec"], x)
    gates = torch.add(u, p["b_gate"][:, None]).relu_()
    if not variant.gated:
        return u, gates, gates
    if not variant.tied:
        u = _linear(p["W_mag"], p["b_dec"], x)
    f = torch.addcmul(p["b_mag"][:, None], u, p["r_mag"].exp()[:, None]).relu_()
    return u, gates, _where(f, gates)


def gradients(p: Params, x: Tensor, l1: Tensor, variant: Variant) -> Params:
    """The gradients of every parameter that is not fixed, for x [B, d] and λ = ``l1`` [M].  MATH.md §2."""
    u, gates, f = encode(p, x, variant)
    mean = 2 / len(x)  # of the squared errors' gradients; in r and r_aux from the start
    error = (p["b_dec"][:, None] - x) * mean
    r = torch.baddbmm(error, f, p["W_dec"], alpha=mean)
    grads = {}
    if "W_dec" not in variant.fixed:
        grads = {"W_dec": torch.bmm(f.mT, r), "b_dec": r.sum(1)}
    if variant.gated:
        g_mag = _where(torch.bmm(r, p["W_dec"].mT), f)
        scale = p["r_mag"].exp()
        grads |= {"b_mag": g_mag.sum(1), "r_mag": u.mul_(g_mag).sum(1) * scale}
        g_mag.mul_(scale[:, None])  # from here on of the product
    if variant.auxiliary:
        r = torch.baddbmm(error, gates, p["W_dec"], alpha=mean)
        if variant.auxiliary == UNFROZEN:
            grads["W_dec"] += torch.bmm(gates.mT, r)
            grads["b_dec"] += r.sum(1)
    if "W_enc" not in variant.fixed:
        cost = (l1 / len(x))[:, None, None]
        if variant.auxiliary or not variant.gated:  # r is that of ReLU(π_gate)
            g_gate = torch.baddbmm(cost, r, p["W_dec"].mT)
        else:
            g_gate = cost.expand_as(gates)
        g_gate = _where(g_gate, gates)
        grads["b_gate"] = g_gate.sum(1)
        deltas = {"W_enc": g_gate}
        if variant.gated:
            deltas = {"W_enc": g_gate.add_(g_mag)} if variant.tied else deltas | {"W_mag": g_mag}
        for name, delta in deltas.items():
            total = delta.sum(1)
            grads[name] = torch.bmm(delta.mT, x.expand(len(l1), *x.shape)) - total[:, :, None] * p["b_dec"][:, None]
            grads["b_dec"] -= torch.bmm(total[:, None], p[name])[:, 0]  # from the b_dec of x − b_dec
    return {name: grad for name, grad in grads.items() if name not in variant.fixed}


@torch.no_grad()
def train(
    p: Params,
    batches: Sequence[Tensor],
    l1: Tensor,
    lr: Tensor,
    variant: Variant,
    watch: Callable[[int], object] = lambda step: None,
) -> None:
    """Trains p in place, one step a batch [B, d], with λ and the learning rate of each model in ``l1`` and ``lr`` [M].

    ``watch(step)`` is called before each step and after the last one.
    """
    squares: Params = {}
    for step, x in enumerate(batches):
        watch(step)
        rate = lr * schedules.decay(step, len(batches) * 4 // 5, len(batches))
        correction = (1 - BETA2 ** (step + 1)) ** 0.5
        for name, grad in gradients(p, x, l1, variant).items():
            if name == "W_dec":  # whose rows are unit: without the component along d_i
                grad -= (grad * p[name]).sum(-1, keepdim=True) * p[name]
            square = squares.setdefault(name, torch.zeros_like(grad))
            square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
            grad *= rate.view(-1, *[1] * (grad.dim() - 1))
            p[name].addcdiv_(grad, (square.sqrt() / correction).add_(EPS), value=-1)
            if name == "W_dec":
                p[name].copy_(F.normalize(p[name], dim=-1))
    watch(len(batches))


@torch.no_grad()
def quality(p: Params, x: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """(L0, FVU), [M] each, on held-out x [n, d]."""
    error, l0 = torch.zeros(2, len(p["W_enc"]), dtype=torch.double)
    for rows in x.split(512):
        _, _, f = encode(p, rows, variant)
        error += (torch.baddbmm(p["b_dec"][:, None], f, p["W_dec"]) - rows).double().pow(2).sum((1, 2))
        l0 += f.count_nonzero((1, 2))
    return l0 / len(x), error / (x - x.mean(0)).double().pow(2).sum()


@torch.no_grad()
def reconstruction_bias(p: Params, x: Tensor, variant: Variant) -> Tensor:
    """γ = E‖x̂‖² ÷ E[x̂·x], [M], both about the mean of x [n, d].  MATH.md §4: below 1 a larger x̂ would be nearer to x."""
    mean, squares, products = x.mean(0), *torch.zeros(2, len(p["W_enc"]), dtype=torch.double)
    for rows in x.split(512):
        x_hat = (torch.baddbmm(p["b_dec"][:, None], encode(p, rows, variant)[2], p["W_dec"]) - mean).double()
        squares += x_hat.pow(2).sum((1, 2))
        products += (x_hat * (rows - mean)).sum((1, 2))
    return squares / products


def side_by_side(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The jobs' results.  Each job has one of torch's threads, and as many run at a time as torch has.

    All threads for one small operation after the other are slower, on shared cores many times so, for they spin while they
    wait for each other.  And so no result depends on their number.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda job: job(), jobs))
    finally:
        torch.set_num_threads(threads)


def _where(values: Tensor, positive: Tensor) -> Tensor:
    """values ⊙ 1[positive > 0], in one pass: what torch's backward of ReLU computes."""
    return torch.ops.aten.threshold_backward(values, positive, 0)


def _linear(W: Tensor, b_dec: Tensor, x: Tensor) -> Tensor:
    """(x − b_dec) Wᵀ, [M, B, F]."""
    return torch.baddbmm(-(b_dec[:, None] @ W.mT), x.expand(len(W), *x.shape), W.mT)
