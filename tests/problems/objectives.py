"""SAEs of every kind with an objective each, and the same step by autograd through plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from helpers import randn
from torch import Tensor

import sae_fast as sf
from sae_fast import objectives, reference
from sae_fast.objectives import L0, L1, AuxK, Gated, Matryoshka, Objective, TopK
from sae_fast.ops import dense_gradient

AUX = AuxK(0.5, k=3)
CASES: dict[str, tuple[type, Objective]] = {
    "gated": (sf.GatedSAE, Gated(0.4)),
    "gated saelens": (sf.GatedSAE, Gated(0.4, "saelens")),
    "gated p": (sf.GatedSAE, Gated(0.4, p=0.6)),
    "gated prefixes aux": (sf.GatedSAE, Matryoshka(Gated(0.4, aux=AUX), fractions=(0.25, 0.75))),
    "gated saelens prefixes aux": (sf.GatedSAE, Matryoshka(Gated(0.4, "saelens", aux=AUX), fractions=(0.5, 0.5))),
    "relu": (sf.ReluSAE, L1(0.4)),
    "relu april": (sf.ReluSAE, L1(0.4, decoder_norms=True)),
    "relu p": (sf.ReluSAE, L1(0.4, p=0.5)),
    "relu p rooted": (sf.ReluSAE, L1(0.4, p=0.5, rooted=True)),
    "relu aux": (sf.ReluSAE, L1(0.4, aux=AUX)),
    "step": (sf.JumpReluSAE, L0(0.3, bandwidth=0.4)),
    "step to input": (sf.JumpReluSAE, L0(0.3, bandwidth=0.4, ste_to_input=True)),
    "target": (sf.JumpReluSAE, L0(0.8, target=3.0, bandwidth=0.4)),
    "target of f": (sf.JumpReluSAE, L0(0.8, target=3.0, bandwidth=0.4, window="f", positive=False)),
    "quadratic": (sf.JumpReluSAE, L0(0.3, target=3.0, bandwidth=0.4, form="quadratic")),
    "tanh": (sf.JumpReluSAE, L0(0.3, bandwidth=0.4, form="tanh", tanh_scale=2.0, ste_to_input=True, unit_rows=False)),
    "step prefixes aux": (sf.JumpReluSAE, Matryoshka(L0(0.3, bandwidth=0.4, aux=AUX), fractions=(0.3, 0.7))),
    "topk": (sf.TopKSAE, TopK()),
    "topk aux": (sf.TopKSAE, TopK(aux=AUX)),
    "topk aux saelens": (sf.TopKSAE, TopK(aux=AuxK(0.5, k=3, dialect="saelens"))),
    "batchtopk aux": (sf.BatchTopKSAE, TopK(aux=AUX)),
    "matryoshka": (sf.BatchTopKSAE, Matryoshka(TopK(), fractions=(0.1, 0.2, 0.7), weights=(0.2, 0.0, 0.5))),
    "matryoshka aux": (sf.BatchTopKSAE, Matryoshka(TopK(aux=AUX), fractions=(0.1, 0.2, 0.7))),
}


@dataclass
class Problem:
    """An SAE away from its initialisation, a batch x [B, d], an objective, and the features [F] bool that are dead."""

    sae: sf.nn.SparseAutoencoder
    x: Tensor
    objective: Objective
    dead: Tensor

    def by_engine(self) -> dict[str, Tensor]:
        """The losses [3] and the gradient of each parameter, dense."""
        done, _ = self.sae.row_gradients(self.x, self.objective, dead=lambda code: self.dead)
        gradients = {name: dense_gradient(self.sae.get_parameter(name), g) for name, g in done.by_name.items()}
        return {"losses": done.losses, **gradients}

    def by_autograd(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same through plain PyTorch, in a dtype."""
        parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in self.sae.named_parameters()}
        losses = plain_losses(self, self.x.to(dtype), parameters)
        grads = torch.autograd.grad(losses.sum(), list(parameters.values()), materialize_grads=True)
        return {"losses": losses.detach(), **dict(zip(parameters, grads, strict=True))}


def problem(case: str, B: int, d: int, F: int, seed: int = 0) -> Problem:
    kind, objective = CASES[case]
    grouped = issubclass(kind, sf.nn.GroupedSAE)
    sae = kind(d, F, seed=seed, **({"k": min(4, F)} if grouped else {}))
    x = randn(B, d, seed=seed + 1) + 0.3
    with torch.no_grad():
        for i, p in enumerate(sae.parameters()):
            p += 0.1 * randn(*p.shape, seed=seed + 2 + i)
        if B > 1:
            sae.calibrate_(x, 0.15 * F if not grouped else 0.5 * F)
        if kind is sf.JumpReluSAE:
            sae.threshold.copy_(0.3 * randn(F, seed=seed + 30).abs() + (0 if objective.window == "pi" else -0.1))
    if F < 10 and objective.prefixes is not None:  # groups of size 1, and of F
        objective = replace(objective, prefixes=objectives.Prefixes((1,) * F))
    dead = randn(F, seed=seed + 40) > 0.6
    if objective.aux is not None:  # what is dead has not fired
        _, code = sae.row_gradients(x, replace(objective, aux=None))
        dead[code.indices[code.magnitudes > 0].long()] = False
    return Problem(sae, x, objective, dead)


def plain_losses(problem: Problem, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """losses [3]: reconstruction, penalty, and the auxiliary ones."""
    sae, objective = problem.sae, problem.objective
    W_dec, b_dec, F = p["W_dec"], p["b_dec"], sae.d_sae
    bias = p[{"gated": "b_gate"}.get(sae.activation, "b_enc")]
    pi = reference.pre_activation(x, p["W_enc"], b_dec) + bias
    if isinstance(objective, Gated):
        code = reference.gated_encode(x, p["W_enc"], p["b_gate"], p["b_mag"], p["r_mag"], b_dec)
        f, last = code.f, torch.relu(code.pi_gate)
    elif isinstance(objective, L0):
        f = last = reference.jump(pi, p["threshold"], objective.bandwidth, objective.ste_to_input)
    elif isinstance(objective, TopK):
        f = last = reference.topk_encode(pi, sae.k, whole=isinstance(sae, sf.BatchTopKSAE))
    else:
        f = last = torch.relu(pi)
    prefixes = objective.prefixes
    ends = [F] if prefixes is None else list(accumulate(prefixes.sizes(F)))
    costs = [1.0] if prefixes is None else prefixes.costs(x).tolist()
    reconstruction = reference.prefix_reconstruction(x, f, W_dec, b_dec, ends, costs)
    auxiliary = torch.zeros_like(reconstruction)
    if isinstance(objective, Gated):
        of = (W_dec, b_dec) if objective.dialect == "saelens" else (W_dec.detach(), b_dec.detach())
        auxiliary = reference.prefix_reconstruction(x, last, *of, ends, costs)
    if objective.aux is not None and bool(problem.dead.any()):
        error = (x - reference.decode(f, W_dec, b_dec)).detach()
        auxiliary = auxiliary + plain_aux(objective.aux, pi, error, W_dec, problem.dead)
    return torch.stack([reconstruction, plain_penalty(objective, last, pi, p).to(x.dtype), auxiliary])


def plain_aux(aux: AuxK, pi: Tensor, error: Tensor, W_dec: Tensor, dead: Tensor) -> Tensor:
    if aux.dialect == "dictionary_learning":
        return reference.auxk_loss(pi, error, W_dec, dead, aux.k, aux.coefficient)
    n = int(dead.sum())
    top = torch.where(dead, pi, -torch.inf).topk(min(aux.k, n), dim=1)
    z = torch.zeros_like(pi).scatter(1, top.indices, top.values)
    return aux.coefficient * min(n / aux.k, 1.0) * (error - z @ W_dec).pow(2).sum(-1).mean()


def plain_penalty(objective: Objective, last: Tensor, pi: Tensor, p: dict[str, Tensor]) -> Tensor:
    c, norms = objective.coefficient, p["W_dec"].norm(dim=1)
    if isinstance(objective, TopK):
        return torch.zeros(())
    if isinstance(objective, L0):
        if objective.form == "tanh":
            return c * torch.tanh(objective.tanh_scale * last * norms).sum(-1).mean()
        of = last if objective.window == "f" else pi  # dictionary_learning's window is of f
        l0 = reference.step(of, p["threshold"], objective.bandwidth, objective.ste_to_input).sum(-1)
        if objective.form == "step":
            return c * l0.mean()
        if objective.form == "target":
            return c * (l0.mean() / objective.target - 1).square()
        return c * (2 / objective.target * (l0 - objective.target).square()).mean()
    if objective.p != 1:
        powers = torch.where(last > 0, last.clamp(min=1e-30).pow(objective.p), 0).sum(-1)
        return c * (powers.pow(1 / objective.p) if objective.rooted else powers).mean()
    return c * (last * (norms if objective.costs_norm else 1)).sum(-1).mean()
