"""PAnnealTrainer and GatedAnnealTrainer: p of the penalty Σ fᵖ falls on the way, and its weight follows."""

from __future__ import annotations

from collections.abc import Callable
from sys import maxsize
from typing import Any

import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder
from dictionary_learning.trainers import gated_anneal, p_anneal
from torch import Tensor

from sae_fast import nn
from sae_fast.code import SparseCode
from sae_fast.interop.dictionary_learning._engine import OnEngine, check_dict_class, signed_as
from sae_fast.interop.dictionary_learning.gated import NAMES as OF_GATED
from sae_fast.interop.dictionary_learning.standard import ADAM, NAMES, count_steps, drawn_by_error, forget
from sae_fast.objectives import L1, Gated
from sae_fast.signals import uninterrupted


class _Annealed(OnEngine):
    """The part that the two share: the package's schedule, in its attributes."""

    p: float
    next_p: float | None
    p_end: float
    p_values: Tensor
    p_step_count: int
    n_sparsity_updates: int
    sparsity_update_steps: Tensor
    sparsity_coeff: float
    sparsity_queue: list[list[float]]
    sparsity_queue_length: int
    sparsity_function: str
    sparsity_warmup_fn: Callable[[int], float]
    steps_since_active: Tensor | None
    resample_steps: int | None
    resample_neurons: Callable[[Any, Tensor], None]  # the package's, or another in its place

    @uninterrupted()
    def _update(self, step: int, activations: Tensor) -> None:
        x = activations.to(self.device)
        self._step(step, x)
        since, every = self.steps_since_active, self.resample_steps
        if since is not None and every is not None and step % every == every - 1:
            self.resample_neurons(since > every / 2, x)

    def _norm(self) -> dict[str, Any]:
        """The arguments of an Lp objective.  At p = 0 the penalty is a constant."""
        if self.sparsity_function not in ("Lp", "Lp^p"):
            raise ValueError("Sparsity function must be 'Lp' or 'Lp^p'")
        if self.sparsity_function == "Lp" and 0 in (self.p, self.next_p):
            raise ZeroDivisionError(
                "p_end: got p = 0 with sparsity_function 'Lp', whose exponent is 1/p; want p_end > 0, or 'Lp^p'"
            )
        return {"p": float(self.p or 1), "rooted": self.sparsity_function == "Lp"}

    def _coefficient(self, step: int) -> float:
        return self.sparsity_coeff * self.sparsity_warmup_fn(step) if self.p else 0.0

    def _lp(self, code: SparseCode, p: float) -> Tensor:
        """The package's lp_norm of a code: a mean over the examples."""
        if p == 0:
            return code.values.new_tensor(float(code.d_sae))  # 0⁰ = 1
        by_row = code.row_sums(code.gates.pow(p))
        return (by_row.pow(1 / p) if self.sparsity_function == "Lp" else by_row).mean()

    @torch.no_grad()
    def _follow(self, step: int, code: SparseCode) -> None:
        self.lp_loss = self._lp(code, self.p)
        self.scaled_lp_loss = self.lp_loss * self.sparsity_coeff * self.sparsity_warmup_fn(step)
        self.constant = 0.0 if self.p else self.scaled_lp_loss
        if self.next_p is not None:
            self.sparsity_queue.append([self.lp_loss.item(), self._lp(code, self.next_p).item()])
            self.sparsity_queue = self.sparsity_queue[-self.sparsity_queue_length :]
        if step in self.sparsity_update_steps and step >= self.sparsity_update_steps[self.p_step_count]:
            self._anneal()
        count_steps(self.steps_since_active, code)

    def _anneal(self) -> None:
        """p takes its next value, and the coefficient what keeps the penalty as it was."""
        if self.next_p is not None:
            now, then = (torch.tensor(losses).mean() for losses in zip(*self.sparsity_queue, strict=True))
            self.sparsity_coeff = self.sparsity_coeff * (now / then).item()
        self.p = self.p_values[self.p_step_count].item()
        last = self.p_step_count >= self.n_sparsity_updates - 1
        self.next_p = self.p_end if last else self.p_values[self.p_step_count + 1].item()
        self.p_step_count += 1

    def _schedule(self) -> dict[str, Any]:
        return {"p": self.p, "next_p": self.next_p, "lp_loss": self.lp_loss, "sparsity_coeff": self.sparsity_coeff}


class PAnnealTrainer(_Annealed, p_anneal.PAnnealTrainer):
    """dictionary_learning's PAnnealTrainer, same arguments; ``init_l0`` as :class:`GatedSAETrainer`.  Its default, 'Lp'
    with p_end = 0, divides by 0 before the last step, there and here: ``ZeroDivisionError``."""

    @signed_as(p_anneal.PAnnealTrainer)
    def __init__(self, *args: Any, init_l0: float | None = None, **kwargs: Any):
        check_dict_class(p_anneal.PAnnealTrainer, AutoEncoder, args, kwargs)
        super().__init__(*args, **kwargs)
        self._start(nn.ReluSAE, NAMES, init_l0=init_l0, betas=ADAM)

    def update(self, step: int, activations: Tensor) -> None:
        self._update(step, activations)

    def loss(self, x: Tensor, step: int, logging: bool = False) -> Any:
        return self._evaluate(x, step, logging)

    def _objective(self) -> L1:
        return L1(**self._norm())

    @torch.no_grad()
    def resample_neurons(self, deads: Tensor, activations: Tensor) -> None:
        """Dead features lose Adam's moments, and keep their weights: the package draws new ones, but writes them into
        copies."""
        if bool(deads.any()):
            drawn_by_error(self._sae, deads, activations)
            for name in ("W_enc", "b_enc", "W_dec"):
                forget(self.optimizer, self._sae.get_parameter(name), deads)

    def _logged(self, losses: Tensor, code: SparseCode, residual: Tensor) -> dict[str, Any]:
        return {"scaled_lp_loss": self.scaled_lp_loss, **self._schedule()}

    def _as_log(self, x: Tensor, x_hat: Tensor, f: Tensor, log: dict[str, Any]) -> tuple[Any, ...]:
        del log["loss"]
        return x, x_hat, f, log


class GatedAnnealTrainer(_Annealed, gated_anneal.GatedAnnealTrainer):
    """dictionary_learning's GatedAnnealTrainer, same arguments; ``init_l0`` as :class:`GatedSAETrainer`.  Its resampling
    asks for an encoder bias, which a Gated SAE has not: ``TypeError``, there and here, once a feature is dead."""

    @signed_as(gated_anneal.GatedAnnealTrainer)
    def __init__(self, *args: Any, init_l0: float | None = None, **kwargs: Any):
        check_dict_class(gated_anneal.GatedAnnealTrainer, GatedAutoEncoder, args, kwargs)
        super().__init__(*args, **kwargs)
        self._start(nn.GatedSAE, OF_GATED, init_l0=init_l0)

    def update(self, step: int, activations: Tensor) -> None:
        self._update(step, activations)

    def loss(self, x: Tensor, step: int, logging: bool = False, **kwargs: Any) -> Any:
        return self._evaluate(x, step, logging)

    def _objective(self) -> Gated:
        return Gated(**self._norm())

    def _dead_after(self) -> int:
        return maxsize  # counted, so that the steps are the host's, whose codes the schedule reads

    def _logged(self, losses: Tensor, code: SparseCode, residual: Tensor) -> dict[str, Any]:
        terms = {"mse_loss": losses[0], "aux_loss": losses[2], "sparsity_loss": self.scaled_lp_loss}
        return {**terms, **self._schedule()}
