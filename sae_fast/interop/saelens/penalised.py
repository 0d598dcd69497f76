"""Gated and Standard: the classes whose losses penalise what features cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sae_lens.saes import gated_sae, standard_sae
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_fast import ops
from sae_fast.activations import named
from sae_fast.code import SparseCode
from sae_fast.gradients import StepGradients
from sae_fast.interop.saelens.engine import OnTheEngine, OurConfig, register
from sae_fast.interop.saelens.step import Step
from sae_fast.objectives import of_dialect


@dataclass(frozen=True)
class _Standard(Step):
    names: ClassVar[tuple[str, ...]] = ("mse_loss", "l1_loss")

    def parts(self, done: StepGradients, code: SparseCode, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> list[Tensor]:
        return list(done.losses[: len(self.names)])

    def outputs(self, x: Tensor, W: Tensor, W_dec: Tensor, b_dec: Tensor, *vectors: Tensor) -> tuple[list[Tensor], ...]:
        code = self.code(self.centre(x, b_dec), W, W_dec, *vectors)
        weight = self.objective.sparsity_weight(W_dec)
        losses = ops.decode_loss(code, W_dec, b_dec, x, weight, x.shape[0], stop_auxiliary=False).losses
        return list(losses[: len(self.names)]), [ops.decode(code, W_dec) + b_dec, self.given(code, W_dec)]


class _Gated(_Standard):
    names = ("mse_loss", "l1_loss", "auxiliary_reconstruction_loss")


class _Penalised(OnTheEngine):
    _kind: type[_Standard]
    _name: str

    def _step(self, step_input: TrainStepInput | None) -> Step:
        l1 = 0.0 if step_input is None else float(step_input.coefficients["l1"])
        objective = of_dialect(self._name, l1, "saelens")
        return self._kind(named(self._name), objective, self.cfg.apply_b_dec_to_input)  # type: ignore[attr-defined]

    def _vectors(self) -> list[Tensor]:
        activation = named(self._name)
        return [getattr(self, name) for name in (activation.bias, *activation.parameters)]  # SAELens calls them as we do


@dataclass
class GatedTrainingSAEConfig(OurConfig, gated_sae.GatedTrainingSAEConfig):
    """SAELens' GatedTrainingSAEConfig, for the class below."""


@dataclass
class StandardTrainingSAEConfig(OurConfig, standard_sae.StandardTrainingSAEConfig):
    """SAELens' StandardTrainingSAEConfig, for the class below."""


class GatedTrainingSAE(_Penalised, gated_sae.GatedTrainingSAE):
    """SAELens' GatedTrainingSAE, trained by the engine."""

    _kind, _name = _Gated, "gated"

    def _vectors_of_encode(self) -> list[Tensor]:
        b_gate, *others = self._vectors()
        return [b_gate.detach(), *others]  # a gate's step has no gradient, in SAELens not even one of 0


class StandardTrainingSAE(_Penalised, standard_sae.StandardTrainingSAE):
    """SAELens' StandardTrainingSAE, trained by the engine."""

    _kind, _name = _Standard, "relu"


register(GatedTrainingSAE, GatedTrainingSAEConfig, gated_sae.GatedSAE, gated_sae.GatedSAEConfig)
register(StandardTrainingSAE, StandardTrainingSAEConfig, standard_sae.StandardSAE, standard_sae.StandardSAEConfig)
