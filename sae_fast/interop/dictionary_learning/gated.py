"""GatedSAETrainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dictionary_learning.dictionary import GatedAutoEncoder
from dictionary_learning.trainers import gdm
from torch import Tensor

from sae_fast import nn
from sae_fast.code import SparseCode
from sae_fast.interop.dictionary_learning._engine import OnEngine, check_dict_class, l1_mean, signed_as
from sae_fast.objectives import Gated
from sae_fast.signals import uninterrupted

NAMES = {
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag",
    "decoder_bias": "b_dec",
}  # fmt: skip


class GatedSAETrainer(OnEngine, gdm.GatedSAETrainer):
    """dictionary_learning's GatedSAETrainer, same arguments, same trajectory but for rounding.

    ``init_l0`` (not in the package): calibrate the gates' biases on the first batch so that this many features fire; the
    package starts with half of all gates open, which is slow for as long as it lasts.  None: as the package.
    """

    l1_penalty: float
    sparsity_warmup_fn: Callable[[int], float]

    @signed_as(gdm.GatedSAETrainer)
    def __init__(self, *args: Any, init_l0: float | None = None, **kwargs: Any):
        check_dict_class(gdm.GatedSAETrainer, GatedAutoEncoder, args, kwargs)
        super().__init__(*args, **kwargs)
        self._start(nn.GatedSAE, NAMES, init_l0=init_l0)

    @uninterrupted()
    def update(self, step: int, x: Tensor) -> None:
        self._step(step, x)

    def loss(self, x: Tensor, step: int, logging: bool = False, **kwargs: Any) -> Any:
        return self._evaluate(x, step, logging)

    def _objective(self) -> Gated:
        return Gated(self.l1_penalty)

    def _coefficient(self, step: int) -> float:
        return self.l1_penalty * self.sparsity_warmup_fn(step)

    def _logged(self, losses: Tensor, code: SparseCode, residual: Tensor) -> dict[str, Any]:
        return {"mse_loss": losses[0], "sparsity_loss": l1_mean(code), "aux_loss": losses[2]}
