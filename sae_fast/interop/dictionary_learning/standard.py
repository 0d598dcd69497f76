"""StandardTrainer, with dead-neuron resampling, and StandardTrainerAprilUpdate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dictionary_learning.dictionary import AutoEncoder
from dictionary_learning.trainers import standard
from torch import Tensor

from sae_fast import nn
from sae_fast.code import SparseCode
from sae_fast.interop.dictionary_learning._engine import OnEngine, check_dict_class, l1_mean, signed_as
from sae_fast.objectives import L1
from sae_fast.signals import uninterrupted

NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "bias": "b_dec"}
ADAM = (0.9, 0.999)


class _L1(OnEngine):
    """The part that the two share."""

    l1_penalty: float
    sparsity_warmup_fn: Callable[[int], float]

    def _coefficient(self, step: int) -> float:
        return self.l1_penalty * self.sparsity_warmup_fn(step)

    def _logged(self, losses: Tensor, code: SparseCode, residual: Tensor) -> dict[str, Any]:
        return {"l2_loss": residual.norm(dim=-1).mean(), "mse_loss": losses[0], "sparsity_loss": l1_mean(code)}


class StandardTrainer(_L1, standard.StandardTrainer):
    """dictionary_learning's StandardTrainer, same arguments, dead-neuron resampling included; ``init_l0`` as
    :class:`GatedSAETrainer`.  Its Adam has β1 = 0.9, so every row that ever had a gradient moves in every step."""

    @signed_as(standard.StandardTrainer)
    def __init__(self, *args: Any, init_l0: float | None = None, **kwargs: Any):
        check_dict_class(standard.StandardTrainer, AutoEncoder, args, kwargs)
        super().__init__(*args, **kwargs)
        self._start(nn.ReluSAE, NAMES, init_l0=init_l0, betas=ADAM)

    @uninterrupted()
    def update(self, step: int, activations: Tensor) -> None:
        x = activations.to(self.device)
        self._step(step, x)
        if self.resample_steps is not None and step % self.resample_steps == 0:
            self.resample_neurons(self.steps_since_active > self.resample_steps / 2, x)

    def loss(self, x: Tensor, step: int, logging: bool = False, **kwargs: Any) -> Any:
        return self._evaluate(x, step, logging)

    def _objective(self) -> L1:
        return L1(self.l1_penalty)

    def _follow(self, step: int, code: SparseCode) -> None:
        count_steps(self.steps_since_active, code)

    @torch.no_grad()
    def resample_neurons(self, deads: Tensor, activations: Tensor) -> None:
        """Dead features start anew at examples drawn by their error: encoder a fifth of the living rows' mean norm, decoder
        unit, bias and Adam's moments 0.  As many as there are dead ones and examples."""
        if not bool(deads.any()):
            return
        sae = self._sae
        drawn = drawn_by_error(sae, deads, activations)
        alive_norm = sae.W_enc[~deads].norm(dim=-1).mean()
        which = deads.nonzero()[: drawn.shape[0], 0]
        unit = torch.nn.functional.normalize(drawn, dim=-1)
        for name, new in (("W_enc", drawn * alive_norm * 0.2), ("W_dec", unit), ("b_enc", drawn.new_zeros(drawn.shape[0]))):
            parameter = sae.get_parameter(name)
            if parameter.requires_grad:  # frozen ones stay
                parameter[which] = new
                forget(self.optimizer, parameter, which)


class StandardTrainerAprilUpdate(_L1, standard.StandardTrainerAprilUpdate):
    """dictionary_learning's StandardTrainerAprilUpdate, same arguments: decoder rows of any norm, which the penalty counts,
    and clipped gradients; ``init_l0`` as :class:`GatedSAETrainer`."""

    @signed_as(standard.StandardTrainerAprilUpdate)
    def __init__(self, *args: Any, init_l0: float | None = None, **kwargs: Any):
        check_dict_class(standard.StandardTrainerAprilUpdate, AutoEncoder, args, kwargs)
        super().__init__(*args, **kwargs)
        self._start(nn.ReluSAE, NAMES, init_l0=init_l0, betas=ADAM, grad_clip=1.0)

    @uninterrupted()
    def update(self, step: int, activations: Tensor) -> None:
        self._step(step, activations)

    def loss(self, x: Tensor, step: int, logging: bool = False, **kwargs: Any) -> Any:
        return self._evaluate(x, step, logging)

    def _objective(self) -> L1:
        return L1(self.l1_penalty, decoder_norms=True)

    def _logged(self, losses: Tensor, code: SparseCode, residual: Tensor) -> dict[str, Any]:
        norms = self._sae.W_dec.norm(dim=1)
        return {**super()._logged(losses, code, residual), "sparsity_loss": l1_mean(code, norms)}


@torch.no_grad()
def count_steps(since_active: Tensor | None, code: SparseCode) -> None:
    """Adds a step to ``since_active`` [F], and sets it to 0 where a feature fires."""
    if since_active is not None:
        since_active += 1
        since_active[code.indices[code.magnitudes != 0].long()] = 0


@torch.no_grad()
def drawn_by_error(sae: nn.SparseAutoencoder, deads: Tensor, activations: Tensor) -> Tensor:
    """Examples [n, d], drawn by their error without replacement, for n of the dead features [F] bool; says how many are
    dead."""
    print(f"resampling {int(deads.sum())} neurons")
    sae.settle()
    activations = activations.to(sae.W_enc.dtype)
    errors = (activations - sae(activations)).norm(dim=-1)
    n = min(int(deads.sum()), errors.shape[0])
    return activations[torch.multinomial(errors, num_samples=n, replacement=False)]


def forget(optimizer: torch.optim.Optimizer, parameter: Tensor, which: Tensor) -> None:
    """Sets Adam's moments of a parameter to 0 at some of its rows."""
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[parameter][moment][which] = 0.0
