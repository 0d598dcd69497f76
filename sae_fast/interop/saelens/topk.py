"""TopK, BatchTopK and Matryoshka: the classes that keep the largest, and revive dead features by AuxK."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from sae_lens.saes import batchtopk_sae, matryoshka_batchtopk_sae, topk_sae
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from sae_fast import ops
from sae_fast.activations import named
from sae_fast.code import Layer, SparseCode
from sae_fast.gradients import StepGradients
from sae_fast.interop.saelens.engine import OnTheEngine, OurConfig, register
from sae_fast.interop.saelens.step import Step, precision
from sae_fast.objectives import AuxK, Matryoshka, Revived, TopK


@dataclass(frozen=True)
class _Largest(Step):
    """The k largest π of a row, or int(k · B) of the ``whole`` batch; ``by_norm``: the largest π‖d_i‖, which are
    feature_acts then, and x̂ of them over ‖d_i‖ is Σ ReLU(π_i) d_i again.  ``dead`` [F]: the features to revive."""

    k: float = 1
    whole: bool = False
    by_norm: bool = False
    dead: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        inner = () if self.objective.prefixes is None else self._ends()[:-1]
        return ("mse_loss", "auxiliary_reconstruction_loss", *(f"inner_mse_loss_{end}" for end in inner))

    def code(self, x_c: Tensor, W: Tensor, W_dec: Tensor, *vectors: Tensor) -> SparseCode:
        support, (bias,) = "batch_topk" if self.whole else "topk", vectors
        norms = W_dec.norm(dim=1) if self.by_norm else None
        if norms is not None:
            W, bias = W * norms[:, None], bias * norms
        code = self.encode(x_c, W, bias, support=support, k=self.k if self.whole else ceil(self.k))
        if norms is None:
            return code
        at = norms[code.indices]
        return replace(code, u=code.u / at, values=code.values / at)

    def acts(self, code: SparseCode, W_dec: Tensor) -> Tensor:
        return code.magnitudes * W_dec.norm(dim=1)[code.indices] if self.by_norm else code.magnitudes

    def revived(self, x_c: Tensor, error: Tensor, layer: Layer, W_dec: Tensor) -> Revived | None:
        if self.objective.aux is None or self.dead is None:
            return None
        return self.objective.aux.revive(x_c, error, layer, W_dec, self.dead, precision(x_c))

    def parts(self, done: StepGradients, code: SparseCode, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> list[Tensor]:
        reconstruction, _, auxiliary = done.losses
        if self.objective.prefixes is None:
            return [reconstruction, auxiliary]
        *inner, outer = _mean_squares(self._reconstructions(code, W_dec, b_dec) - x)
        return [outer, auxiliary, *inner]

    def outputs(self, x: Tensor, W: Tensor, W_dec: Tensor, b_dec: Tensor, *vectors: Tensor) -> tuple[list[Tensor], ...]:
        x_c = self.centre(x, b_dec)
        code = self.code(x_c, W, W_dec, *vectors)
        x_hats = self._reconstructions(code, W_dec, b_dec)
        *inner, outer = _mean_squares(x_hats - x)
        auxiliary = self._auxiliary(x_c, (x - x_hats[-1]).detach(), W, W_dec, *vectors)
        return [outer, auxiliary, *inner], [x_hats[-1], self.given(code, W_dec)]

    def _ends(self) -> tuple[int, ...]:
        assert self.objective.prefixes is not None
        sizes = self.objective.prefixes.group_sizes
        assert sizes is not None
        return self.objective.prefixes.ends(sum(sizes))

    def _reconstructions(self, code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """[G, B, d]: x̂ of each prefix."""
        ends = [code.d_sae] if self.objective.prefixes is None else self._ends()
        return ops.decode(code, W_dec, groups=[0, *ends]).cumsum(0) + b_dec

    def _auxiliary(self, x_c: Tensor, error: Tensor, W: Tensor, W_dec: Tensor, bias: Tensor) -> Tensor:
        """The auxiliary loss that :meth:`revived` has, by autograd."""
        aux, ids = self.objective.aux, None if self.dead is None else self.dead.nonzero()[:, 0]
        if aux is None or ids is None or ids.shape[0] == 0:
            return x_c.new_zeros(())
        wanted = max(1, error.shape[1] // 2)
        pi, D = x_c @ W[ids].T + bias[ids], W_dec[ids]
        ranked = pi * D.norm(dim=1) if self.by_norm else pi
        at = ranked.topk(min(wanted, ids.shape[0]), dim=1, sorted=False).indices
        recons = torch.zeros_like(pi).scatter(1, at, pi.gather(1, at)) @ D
        return aux.coefficient * min(ids.shape[0] / wanted, 1.0) * _mean_squares((recons - error)[None])[0]


def _mean_squares(residuals: Tensor) -> list[Tensor]:
    """E‖r‖² of residuals [G, B, d]."""
    return list(residuals.pow(2).sum(-1).mean(-1).unbind())


class _KeepsLargest(OnTheEngine):
    """The part that the three classes share."""

    cfg: Any
    activation_fn: Any
    b_enc: nn.Parameter

    def why_dense(self) -> str | None:
        why = super().why_dense()
        if why is None and not 0 < self.activation_fn.k <= self.cfg.d_sae:
            why = f"k is {self.activation_fn.k}"
        if why is None and not self.cfg.aux_loss_coefficient >= 0:
            why = f"aux_loss_coefficient is {self.cfg.aux_loss_coefficient}"
        return why

    def _objective(self) -> TopK:
        coefficient = self.cfg.aux_loss_coefficient
        by_norm = self.cfg.rescale_acts_by_decoder_norm
        aux = AuxK(coefficient, dialect="saelens", by_norm=by_norm) if coefficient > 0 else None
        return TopK(aux=aux, unit_rows=False)

    def _step(self, step_input: TrainStepInput | None) -> Step:
        whole = self._activation_fn is batchtopk_sae.BatchTopK
        return _Largest(
            named("relu"), self._objective(), self.cfg.apply_b_dec_to_input,
            sparse=not whole and self.activation_fn.use_sparse_activations, k=self.activation_fn.k, whole=whole,
            by_norm=self.cfg.rescale_acts_by_decoder_norm, dead=None if step_input is None else step_input.dead_neuron_mask,
        )  # fmt: skip

    def _vectors(self) -> list[Tensor]:
        return [self.b_enc]


class _KeepsLargestOfBatch(_KeepsLargest):
    _activation_fn = batchtopk_sae.BatchTopK
    topk_threshold: Tensor
    update_topk_threshold: Any

    @torch.compiler.disable
    def _fast_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        out = super()._fast_forward_pass(step_input)
        acts = out.feature_acts.detach()
        self.update_topk_threshold(acts.values() if acts.is_sparse else acts)
        out.metrics["topk_threshold"] = self.topk_threshold
        return out


@dataclass
class TopKTrainingSAEConfig(OurConfig, topk_sae.TopKTrainingSAEConfig):
    """SAELens' TopKTrainingSAEConfig, for the class below."""


@dataclass
class BatchTopKTrainingSAEConfig(OurConfig, batchtopk_sae.BatchTopKTrainingSAEConfig):
    """SAELens' BatchTopKTrainingSAEConfig, for the class below."""


@dataclass
class MatryoshkaBatchTopKTrainingSAEConfig(OurConfig, matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig):
    """SAELens' MatryoshkaBatchTopKTrainingSAEConfig, for the class below."""


class TopKTrainingSAE(_KeepsLargest, topk_sae.TopKTrainingSAE):
    """SAELens' TopKTrainingSAE, trained by the engine."""

    _activation_fn = topk_sae.TopK

    def encode(self, x: Tensor) -> Tensor:
        """Features [..., d_sae], as SAELens' encode gives them: dense, or sparse with use_sparse_activations."""
        if self.cfg.use_sparse_activations:
            return topk_sae.TopKTrainingSAE.encode(self, x)
        return super().encode(x)


class BatchTopKTrainingSAE(_KeepsLargestOfBatch, batchtopk_sae.BatchTopKTrainingSAE):
    """SAELens' BatchTopKTrainingSAE, trained by the engine."""


class MatryoshkaBatchTopKTrainingSAE(_KeepsLargestOfBatch, matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE):
    """SAELens' MatryoshkaBatchTopKTrainingSAE, trained by the engine."""

    def why_dense(self) -> str | None:
        why = super().why_dense()
        if why is None and self.cfg.use_matryoshka_aux_loss:
            why = "use_matryoshka_aux_loss is on, whose levels have residuals of their own"
        return why

    def _objective(self) -> TopK:
        widths = self.cfg.matryoshka_widths
        sizes = [b - a for a, b in pairwise([0, *widths])]
        return Matryoshka(super()._objective(), sizes, weights=[1.0] * len(sizes))  # type: ignore[return-value]


register(TopKTrainingSAE, TopKTrainingSAEConfig, topk_sae.TopKSAE, topk_sae.TopKSAEConfig)
register(BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig)
register(MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig)
