"""JumpReluTrainer."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers import jumprelu
from torch import Tensor

from sae_fast import nn
from sae_fast.code import SparseCode
from sae_fast.interop.dictionary_learning._engine import OnEngine, check_dict_class, signed_as
from sae_fast.objectives import L0
from sae_fast.signals import uninterrupted

NAMES = {name: name for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")}

LossLog = namedtuple("LossLog", ["x", "recon", "f", "losses"])


class JumpReluTrainer(OnEngine, jumprelu.JumpReluTrainer):
    """dictionary_learning's JumpReluTrainer, same arguments; ``init_l0`` as :class:`GatedSAETrainer`.  A threshold may
    become negative, and so may features then, in training, as in the package."""

    @signed_as(jumprelu.JumpReluTrainer)
    def __init__(self, *args: Any, init_l0: float | None = None, **kwargs: Any):
        check_dict_class(jumprelu.JumpReluTrainer, JumpReluAutoEncoder, args, kwargs)
        super().__init__(*args, **kwargs)
        options = {"apply_b_dec_to_input": False}
        self._start(nn.JumpReluSAE, NAMES, "W_enc", options, init_l0=init_l0, grad_clip=1.0)

    @property  # type: ignore[misc]
    def ae(self) -> Any:
        """The package's dictionary, a submodule as there."""
        return self._modules["ae"]

    @uninterrupted()
    def update(self, step: int, x: Tensor) -> float:
        return self._step(step, x).loss

    def loss(self, x: Tensor, step: int, logging: bool = False, **_: Any) -> Any:
        return self._evaluate(x.to(self.ae.W_enc.dtype), step, logging)

    def _objective(self) -> L0:
        penalty, target, width = self.sparsity_coefficient, self.target_l0, self.bandwidth
        return L0(penalty, target=target, bandwidth=width, window="f", positive=False)

    def _coefficient(self, step: int) -> float:
        return self.sparsity_coefficient * self.sparsity_warmup_fn(step)

    @torch.no_grad()
    def _follow(self, step: int, code: SparseCode) -> None:
        since = self.num_tokens_since_fired
        fired = code.magnitudes.new_zeros(code.d_sae).index_add_(0, code.indices.long(), code.magnitudes) > 0
        since += code.batch
        since[fired.to(since.device)] = 0
        self.dead_features = int((since > self.dead_feature_threshold).sum())

    def _logged(self, losses: Tensor, code: SparseCode, residual: Tensor) -> dict[str, Any]:
        return {"l2_loss": losses[0]}

    def _as_log(self, x: Tensor, x_hat: Tensor, f: Tensor, log: dict[str, Any]) -> LossLog:
        return LossLog(x, x_hat, f, log)
