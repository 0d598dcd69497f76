"""JumpReLU: the class whose thresholds are trained by straight-through estimators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sae_lens.saes import jumprelu_sae
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_fast import ops
from sae_fast.activations import named
from sae_fast.code import SparseCode
from sae_fast.gradients import StepGradients
from sae_fast.interop.saelens.engine import OnTheEngine, OurConfig, register
from sae_fast.interop.saelens.step import Step
from sae_fast.objectives import L0

MODES = ("step", "tanh", "quadratic")


@dataclass(frozen=True)
class _Jumps(Step):
    names: ClassVar[tuple[str, ...]] = ("mse_loss", "l0_loss")
    objective: L0

    def code_to_train(self, x_c: Tensor, W: Tensor, W_dec: Tensor, *vectors: Tensor) -> SparseCode:
        layer = self.layer(W, *vectors)
        return self.objective.code(self.encode(x_c, W, *vectors, slack=self.objective.slack(layer)), layer)

    def code(self, x_c: Tensor, W: Tensor, W_dec: Tensor, *vectors: Tensor) -> SparseCode:
        code = self.encode(x_c, W, *vectors, slack=self.objective.slack(self.layer(W, *vectors)))
        return code.with_values(self._estimated(jumprelu_sae.JumpReLU, code, *vectors)[None])

    def parts(self, done: StepGradients, code: SparseCode, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> list[Tensor]:
        return list(done.losses[:2])

    def outputs(self, x: Tensor, W: Tensor, W_dec: Tensor, b_dec: Tensor, *vectors: Tensor) -> tuple[list[Tensor], ...]:
        code, form = self.code(self.centre(x, b_dec), W, W_dec, *vectors), self.objective
        x_hat = ops.decode(code, W_dec) + b_dec
        if form.form == "tanh":
            entries = torch.tanh(form.tanh_scale * code.magnitudes * W_dec.norm(dim=1)[code.indices])
        else:
            entries = self._estimated(jumprelu_sae.Step, code, *vectors)
        l0 = x.new_zeros(x.shape[0]).index_add(0, code.row_ids(), entries)
        if form.form == "quadratic":
            assert form.target is not None
            l0 = 2 / form.target * (l0 - form.target) ** 2
        parts = [(x_hat - x).pow(2).sum(-1).mean(), (form.coefficient * l0).mean()]
        return parts, [x_hat, self.given(code, W_dec)]

    def _estimated(self, function: Any, code: SparseCode, bias: Tensor, threshold: Tensor) -> Tensor:
        """[nnz]: SAELens' function of the entries, which takes them for features of one example."""
        pi, at = code.u + bias[code.indices], threshold[code.indices]
        return function.apply(pi[None], at, self.objective.bandwidth, self.objective.ste_to_input)[0]


@dataclass
class JumpReLUTrainingSAEConfig(OurConfig, jumprelu_sae.JumpReLUTrainingSAEConfig):
    """SAELens' JumpReLUTrainingSAEConfig, for the class below."""


class JumpReLUTrainingSAE(OnTheEngine, jumprelu_sae.JumpReLUTrainingSAE):
    """SAELens' JumpReLUTrainingSAE, trained by the engine."""

    def why_dense(self) -> str | None:
        if why := super().why_dense():
            return why
        mode = self.cfg.jumprelu_sparsity_loss_mode
        if mode not in MODES:
            return f"jumprelu_sparsity_loss_mode is {mode!r}"
        if self.cfg.pre_act_loss_coefficient is not None:
            return "pre_act_loss_coefficient is set, whose loss is of all features that are dead"
        for name, value in (("bandwidth", self.bandwidth), ("jumprelu_tanh_scale", self.cfg.jumprelu_tanh_scale)):
            if not value > 0:
                return f"{name} is {value}"
        return None

    def _step(self, step_input: TrainStepInput | None) -> Step:
        cfg = self.cfg
        objective = L0(
            0.0 if step_input is None else float(step_input.coefficients["l0"]),
            target=cfg.target_l0 if cfg.jumprelu_sparsity_loss_mode == "quadratic" else None,
            bandwidth=self.bandwidth, form=cfg.jumprelu_sparsity_loss_mode, tanh_scale=cfg.jumprelu_tanh_scale,
            ste_to_input=cfg.jumprelu_ste_to_input, positive=False, unit_rows=False,
        )  # fmt: skip
        return _Jumps(named("jumprelu"), objective, cfg.apply_b_dec_to_input)

    def _vectors(self) -> list[Tensor]:
        return [self.b_enc, self.threshold]

    @torch.compiler.disable
    def _fast_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.threshold.data.clamp_(min=0.0)
        return super()._fast_forward_pass(step_input)


register(
    JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig
)  # fmt: skip
