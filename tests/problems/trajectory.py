"""Runs of the reference whose spread bounds a trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import reference

NAMES = ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")
D_IN, D_SAE, BATCH, STEPS, RUNS = 32, 256, 128, 300, 8
BETAS, EPS = (0.0, 0.999), 1e-8
# Where even permuted runs agree to the last bit the spread is 0, and an equally good result may round otherwise: one
# rounding to float32 of each parameter, four of a loss (each of its terms, and their sum).
ROUNDING = {"parameters": 2.0**-24, "loss": 4 * 2.0**-24}


def superposition(truth: int, active: float, seed: int) -> list[Tensor]:
    """STEPS batches of sparse combinations of ``truth`` random directions in D_IN dimensions."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(truth, D_IN, generator=g), dim=1)
    shape = (STEPS, BATCH, truth)
    amounts = (torch.rand(shape, generator=g) < active / truth) * (1.5 + 3 * torch.rand(shape, generator=g))
    return list(amounts @ directions)


class Run:
    """The loss [STEPS] and all the parameters [STEPS, n] of a run, and how far another is from it, relatively."""

    def __init__(self):
        self.losses, self.states = [], []

    def record(self, loss: float, parameters: dict[str, Tensor]) -> None:
        self.losses.append(loss)
        self.states.append(torch.cat([parameters[name].detach().flatten() for name in NAMES]))

    def deviation(self, other: Run) -> dict[str, Tensor]:
        loss, wanted = (torch.tensor(run.losses, dtype=torch.float64) for run in (self, other))
        states, wanted_states = (torch.stack(run.states).double() for run in (self, other))
        return {
            "loss": (loss - wanted).abs() / wanted,
            "parameters": (states - wanted_states).norm(dim=1) / wanted_states.norm(dim=1),
        }


def reference_run(start: dict[str, Tensor], batches: list[Tensor], lr: float, l1: float, permutation: int | None) -> Run:
    """sae_fast.reference.gated_loss, autograd and reference.adam_step, in float32."""
    run, g = Run(), None if permutation is None else torch.Generator().manual_seed(permutation)
    p = {name: t.clone().requires_grad_() for name, t in start.items()}
    m, v = ({name: torch.zeros_like(t) for name, t in start.items()} for _ in range(2))
    for step, x in enumerate(batches, start=1):
        if g is not None:
            x = x[torch.randperm(len(x), generator=g)]
        loss = reference.gated_loss(x, *(p[name] for name in NAMES), l1).total
        gradients = torch.autograd.grad(loss, [p[name] for name in NAMES])
        with torch.no_grad():
            for name, gradient in zip(NAMES, gradients, strict=True):
                reference.adam_step(p[name], gradient, m[name], v[name], step, lr, BETAS, EPS, unit_rows=name == "W_dec")
        run.record(float(loss.detach()), p)
    return run
