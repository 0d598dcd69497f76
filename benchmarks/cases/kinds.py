"""kind_…: a whole training step of each kind of SAE, with what dictionary_learning's trainer of that kind has around it.

That is its Adam, mostly with momentum, the clip to norm 1 of projected gradients that all but Gated and ReLU have, and a
threshold that follows.  The SAE of a case shares its parameters with the world's Gated one, which the gate reads: b_gate is
its b_enc, and r_mag JumpReLU's threshold.  k is the shape's L0; the other kinds have the Gated SAE's own support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sae_fast as sf
from benchmarks.cases.floors import bare_product
from benchmarks.cases.step import EPS, L1, SETTINGS
from benchmarks.data import mean_l0
from benchmarks.registry import OURS, Case, Goal, Run, case
from sae_fast import GatedSAE, objectives, reference

LR, FOREVER = SETTINGS["lr"], 10_000_000  # the examples after which the peers' features are dead
BANDWIDTH = 0.01  # of activations of norm 9; the package's 0.001 is for norm 1
DEAD = 10  # every tenth feature
FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
AUX = objectives.AuxK()


@dataclass(frozen=True)
class Step:
    """A kind's step: its layer on the parameters of a Gated SAE, its loss in plain PyTorch, its Trainer's settings."""

    layer: Callable[[GatedSAE], Any]
    loss: Callable[[Any, Tensor], Tensor]
    objective: Callable[[GatedSAE], objectives.Objective]
    settings: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[GatedSAE], None] = lambda sae: None
    columns: bool = False  # the peer has a feature's row of W_dec in a column
    dead: bool = False
    at_most: float | None = None  # bare products that a step may take
    peer: float | None = None  # times as fast as its peer, wanted

    def start(self, sae: GatedSAE) -> Run:
        self.prepare(sae)
        trainer = sf.Trainer(self.layer(sae), LR, eps=EPS, objective=self.objective(sae), **self.settings)
        if self.dead:
            assert trainer.state.since_fired is not None
            trainer.state.since_fired[::DEAD] = FOREVER
        return trainer.step

    def reference(self, sae: GatedSAE) -> Run:
        self.prepare(sae)
        layer = self.layer(sae)
        parameters = dict(layer.named_parameters())
        moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
        count, betas, clip = 0, self.settings["betas"], self.settings.get("grad_clip")

        def run(x: Tensor) -> None:
            nonlocal count
            count += 1
            grads = dict(zip(parameters, torch.autograd.grad(self.loss(layer, x), list(parameters.values())), strict=True))
            with torch.no_grad():
                direction = F.normalize(layer.W_dec, dim=1)
                grads["W_dec"] -= (grads["W_dec"] * direction).sum(1, keepdim=True) * direction
                norm = torch.stack([g.norm() for g in grads.values()]).norm()
                factor = 1.0 if clip is None else (clip / (norm + 1e-6)).clamp(max=1)
                for name, p in parameters.items():
                    unit = name == "W_dec"
                    reference.adam_step(p, factor * grads[name], *moments[name], count, LR, betas, EPS, unit_rows=unit)

        return run


# ---- The kinds -------------------------------------------------------------------------------------------------------


def on(sae: GatedSAE, layer: type, threshold: bool = False, **options: Any) -> Any:
    """A layer of a kind on the Gated SAE's own parameters."""
    made = layer(sae.d_in, sae.d_sae, dtype=sae.W_enc.dtype, device="meta", **options)
    made.metadata = sae.metadata
    made.W_enc, made.W_dec, made.b_dec, made.b_enc = sae.W_enc, sae.W_dec, sae.b_dec, sae.b_gate
    if threshold:
        made.threshold = sae.r_mag
    elif isinstance(made, sf.BatchTopKSAE):
        made.threshold = torch.tensor(-1.0, device=sae.W_enc.device)
    return made


def l0_of(sae: Any) -> int:
    """The shape's L0; in the dense phase an eighth of all features, which dead ones are not among."""
    return min(round(sae.metadata["l0"]), sae.d_sae // 8)


def grouped(layer: type, fractions: tuple[float, ...] | None = None) -> Callable[[GatedSAE], Any]:
    def made(sae: GatedSAE) -> Any:
        sizes = None if fractions is None else objectives.Prefixes(fractions=fractions).sizes(sae.d_sae)
        return on(sae, layer, k=l0_of(sae), group_sizes=sizes)

    return made


@torch.no_grad()
def without_bias(sae: GatedSAE) -> None:
    """As TopK SAEs start: half of all features are positive, and more than k on every example."""
    sae.b_gate.zero_()


@torch.no_grad()
def with_dead(sae: GatedSAE) -> None:
    """Every tenth feature is never among the largest, though it is positive on half of the examples."""
    without_bias(sae)
    sae.W_enc[::DEAD] *= 1 / 16


@torch.no_grad()
def with_thresholds(sae: GatedSAE) -> None:
    """The same support by thresholds on π = x·w + b_enc, as the package's JumpReLU has it, which takes no b_dec from x."""
    sae.r_mag.copy_((-sae.b_gate).clamp(min=0))
    sae.b_gate.copy_(-(sae.W_enc.double() @ sae.b_dec.double()).float())  # the same float32 in any dtype


def pre_activation(sae: Any, x: Tensor) -> Tensor:
    return F.linear(x, sae.W_enc, sae.b_enc - sae.W_enc @ sae.b_dec)  # x − b_dec would cost a product more backwards


def squared(error: Tensor) -> Tensor:
    return error.pow(2).sum(1).mean()


def topk_loss(sae: Any, x: Tensor, over_batch: bool = False, dead: bool = False) -> Tensor:
    f = torch.relu(pre_activation(sae, x))
    kept = f.flatten().topk(sae.k * len(x)) if over_batch else f.topk(sae.k, dim=1)
    chosen = torch.zeros_like(f.flatten() if over_batch else f).scatter(-1, kept.indices, kept.values).view_as(f)
    if sae.group_sizes is not None:
        parts = [c @ W for c, W in zip(chosen.split(sae.group_sizes, 1), sae.W_dec.split(sae.group_sizes), strict=True)]
        prefixes = torch.stack(parts).cumsum(0) + sae.b_dec
        return torch.stack([squared(x - x_hat) for x_hat in prefixes]).sum() / len(parts) ** 2
    error = x - chosen @ sae.W_dec - sae.b_dec
    return squared(error) + (AUX.coefficient * aux_loss(sae, f, error.detach()) if dead else 0)


def aux_loss(sae: Any, f: Tensor, error: Tensor) -> Tensor:
    dead = f[:, ::DEAD]
    kept = dead.topk(min(sae.d_in // 2, dead.shape[1]), dim=1)
    of_dead = torch.zeros_like(dead).scatter(1, kept.indices, kept.values) @ sae.W_dec[::DEAD]
    return squared(error - of_dead) / squared(error - error.mean(0))


class Jump(torch.autograd.Function):
    """1[π > θ] π and the number of those that are > θ of the result, with the package's gradients."""

    @staticmethod
    def forward(ctx: Any, pi: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pi, threshold)
        f = torch.where(pi > threshold, pi, 0)
        return f, (f > threshold).to(pi.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (of_f, of_step), (pi, threshold) = grads, ctx.saved_tensors
        f = torch.where(pi > threshold, pi, 0)
        at_pi, at_f = (((z - threshold) / BANDWIDTH).abs() < 0.5 for z in (pi, f))
        pulled = of_f * at_pi * threshold + of_step * at_f
        return of_f * (pi > threshold), -(pulled / BANDWIDTH).sum(0)


def jumprelu_loss(sae: Any, x: Tensor) -> Tensor:
    f, fires = Jump.apply(F.linear(x, sae.W_enc, sae.b_enc), sae.threshold)
    return squared(x - f @ sae.W_dec - sae.b_dec) + (fires.sum(1).mean() / l0_of(sae) - 1).pow(2)


def relu_loss(sae: Any, x: Tensor) -> Tensor:
    f = torch.relu(pre_activation(sae, x))
    return squared(x - f @ sae.W_dec - sae.b_dec) + L1 * f.sum(1).mean()


def gated_loss(sae: GatedSAE, x: Tensor) -> Tensor:
    return reference.gated_loss(x, **dict(sae.named_parameters()), l1_coefficient=L1).total  # type: ignore[arg-type]


def topk(sae: GatedSAE) -> objectives.Objective:
    return objectives.TopK(threshold_start=0)


def matryoshka(sae: GatedSAE) -> objectives.Objective:
    """The package weights groups by 1/G and takes their mean."""
    n = len(FRACTIONS)
    return objectives.Matryoshka(topk(sae), fractions=FRACTIONS, weights=[1 / n**2] * n)


def l0(sae: GatedSAE) -> objectives.Objective:
    return objectives.L0(target=l0_of(sae), bandwidth=BANDWIDTH, window="f", positive=False)


MOMENTUM: dict[str, Any] = dict(betas=(0.9, 0.999))
CLIPPED: dict[str, Any] = dict(**MOMENTUM, grad_clip=1.0, dead_after=FOREVER)
STEPS = {
    "gated": Step(lambda sae: sae, gated_loss, lambda sae: objectives.Gated(L1), MOMENTUM, at_most=0.68),
    "relu": Step(partial(on, layer=sf.ReluSAE), relu_loss, lambda sae: objectives.L1(L1), MOMENTUM, columns=True),
    "topk": Step(grouped(sf.TopKSAE), topk_loss, topk, CLIPPED, without_bias, columns=True, at_most=0.70, peer=11),
    "topk_dead": Step(
        grouped(sf.TopKSAE), partial(topk_loss, dead=True), topk, CLIPPED | dict(aux=AUX), with_dead, columns=True,
        dead=True, at_most=0.875, peer=11,
    ),
    "batchtopk": Step(
        grouped(sf.BatchTopKSAE), partial(topk_loss, over_batch=True), topk, CLIPPED, without_bias, columns=True,
        at_most=0.70, peer=11,
    ),
    "matryoshka": Step(
        grouped(sf.BatchTopKSAE, FRACTIONS), partial(topk_loss, over_batch=True), matryoshka, CLIPPED, without_bias,
        at_most=0.75, peer=11,
    ),
    "jumprelu": Step(
        partial(on, layer=sf.JumpReluSAE, threshold=True, apply_b_dec_to_input=False), jumprelu_loss, l0,
        dict(betas=(0.0, 0.999), grad_clip=1.0), with_thresholds, at_most=0.62, peer=13,
    ),
}  # fmt: skip


def register(name: str, step: Step) -> Case:
    goals = [Goal("peak memory ÷ dictionary_learning's", "peak_memory", OURS, "dictionary_learning", at_most=0.1)]
    if step.at_most is not None:
        goals.append(Goal("time ÷ the bare product's", "time", OURS, "bare_product", at_most=step.at_most))
    if step.peer is not None:
        goals.append(Goal("dictionary_learning's time ÷ ours", "time", "dictionary_learning", OURS, at_least=step.peer))
    made = case(
        f"kind_{name}",
        mode="train",
        inputs=lambda world: world.batches,
        outcome=lambda sae, results: dict(sae.named_parameters()),
        memory=True,
        orders=8,
        goals=tuple(goals),
        l0=lambda sae, x: mean_l0(step.layer(sae), x),
    )(step.reference)
    made.provider(OURS)(step.start)
    made.provider("bare_product", floor=True)(bare_product)
    return made


KINDS = {name: register(name, step) for name, step in STEPS.items()}
