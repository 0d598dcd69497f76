"""TopKTrainer, BatchTopKTrainer and MatryoshkaBatchTopKTrainer: AuxK, dead features, and a threshold for inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from sys import maxsize
from typing import Any

import torch
from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k
from torch import Tensor

from sae_fast import nn
from sae_fast.code import SparseCode
from sae_fast.interop.dictionary_learning._engine import Engine, OnEngine, check_dict_class, signed_as
from sae_fast.objectives import AuxK, Prefixes, Revived, TopK
from sae_fast.signals import uninterrupted
from sae_fast.train.steps import naming

NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "b_dec": "b_dec"}
OF_MATRYOSHKA = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "grad_clip": 1.0}


class _Watched(AuxK):
    """AuxK that keeps its last loss before α and the denominator: −1 where no feature was dead."""

    unscaled: Tensor | int = -1

    def revive(self, *args: Any, **kwargs: Any) -> Revived | None:
        revived = super().revive(*args, **kwargs)
        object.__setattr__(self, "unscaled", -1 if revived is None else revived.unscaled)
        return revived


class _Largest(OnEngine):
    """The part that the three share."""

    auxk_alpha: float
    top_k_aux: int
    dead_feature_threshold: int
    num_tokens_since_fired: Tensor
    threshold_start_step: int
    update_threshold: Callable[[Tensor], None]  # the package's

    @uninterrupted()
    def _update(self, step: int, x: Tensor, first_b_dec: Any) -> float:
        """A step, before the first of which ``first_b_dec`` of the batch makes b_dec; the loss."""
        x = x.to(self.device)
        if step != 0:
            return self._step(step, x).loss
        engine = self._ready()
        with naming(engine.trainer.step_count):
            engine.sae.check_input(x)
        b_dec = engine.ae.b_dec
        before, b_dec.data = b_dec.data, first_b_dec(x).to(b_dec)
        try:
            return self._step(step, x).loss
        except (ValueError, FloatingPointError):
            b_dec.data = before
            raise

    def _ready(self) -> Engine:
        engine = super()._ready()
        sae: Any = engine.sae
        sae.k = int(engine.ae.k)
        engine.trainer.state.since_fired = self.num_tokens_since_fired.to(sae.W_enc.device)
        return engine

    def _objective(self) -> TopK:
        aux = _Watched(self.auxk_alpha, self.top_k_aux) if self.auxk_alpha != 0 and self.top_k_aux > 0 else None
        return TopK(aux=aux, threshold_start=maxsize)  # the package's own code moves the threshold

    def _dead_after(self) -> int:
        return self.dead_feature_threshold

    def _coefficient(self, step: int) -> float:
        return 0.0

    @torch.no_grad()
    def _follow(self, step: int, code: SparseCode) -> None:
        if step > self.threshold_start_step:
            self.update_threshold(self._kept(code))
        assert self.engine is not None and self.engine.trainer.state.since_fired is not None
        self.num_tokens_since_fired.copy_(self.engine.trainer.state.since_fired)
        self.dead_features = int((self.num_tokens_since_fired >= self.dead_feature_threshold).sum())
        aux = self.engine.trainer.state.objective.aux
        self.pre_norm_auxk_loss = aux.unscaled if isinstance(aux, _Watched) else -1

    def _kept(self, code: SparseCode) -> Tensor:
        """The activations that the threshold follows, in the form that the package's update_threshold takes."""
        return code.magnitudes

    def _logged(self, losses: Tensor, code: SparseCode, residual: Tensor) -> dict[str, Any]:
        return {"l2_loss": losses[0], "auxk_loss": losses[2] / self.auxk_alpha if self.auxk_alpha else 0.0}


class TopKTrainer(_Largest, top_k.TopKTrainer):
    """dictionary_learning's TopKTrainer, same arguments.  A row with fewer than k positive activations keeps those; the
    package counts zeros, of features that it happens to choose, as fired."""

    @signed_as(top_k.TopKTrainer, init_l0=False)
    def __init__(self, *args: Any, **kwargs: Any):
        check_dict_class(top_k.TopKTrainer, top_k.AutoEncoderTopK, args, kwargs)
        super().__init__(*args, **kwargs)
        self._start(nn.TopKSAE, NAMES, options={"k": self.k}, **SETTINGS)

    def update(self, step: int, x: Tensor) -> float:
        return self._update(step, x, top_k.geometric_median)

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        return self._evaluate(x, step, logging)

    def _kept(self, code: SparseCode) -> Tensor:
        positive = torch.where(code.magnitudes > 0, code.magnitudes, torch.inf)
        return torch.segment_reduce(positive, "min", offsets=code.indptr, initial=torch.inf)[:, None]

    def _follow(self, step: int, code: SparseCode) -> None:
        dead = self.dead_features
        super()._follow(step, code)
        self.effective_l0 = int(self.ae.k)
        if not self.auxk_alpha > 0:  # the package does not look then
            self.dead_features = dead


class BatchTopKTrainer(_Largest, batch_top_k.BatchTopKTrainer):
    """dictionary_learning's BatchTopKTrainer, same arguments."""

    @signed_as(batch_top_k.BatchTopKTrainer, init_l0=False)
    def __init__(self, *args: Any, **kwargs: Any):
        check_dict_class(batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE, args, kwargs)
        super().__init__(*args, **kwargs)
        self._start(nn.BatchTopKSAE, NAMES, options={"k": self.k}, **SETTINGS)

    def update(self, step: int, x: Tensor) -> float:
        return self._update(step, x, self.geometric_median)

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        return self._evaluate(x, step, logging)

    def _follow(self, step: int, code: SparseCode) -> None:
        super()._follow(step, code)
        self.effective_l0 = self.k


class MatryoshkaBatchTopKTrainer(_Largest, matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer):
    """dictionary_learning's MatryoshkaBatchTopKTrainer, same arguments; the last of the groups that are active needs a
    weight > 0."""

    @signed_as(matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer, init_l0=False)
    def __init__(self, *args: Any, **kwargs: Any):
        package = matryoshka_batch_top_k
        check_dict_class(package.MatryoshkaBatchTopKTrainer, package.MatryoshkaBatchTopKSAE, args, kwargs)
        super().__init__(*args, **kwargs)
        options = {"k": self.k, "group_sizes": self.group_sizes}
        self._start(nn.BatchTopKSAE, OF_MATRYOSHKA, "W_enc", options, **SETTINGS)

    def update(self, step: int, x: Tensor) -> float:
        return self._update(step, x, self.geometric_median)

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        return self._evaluate(x, step, logging)

    def _ready(self) -> Engine:
        assert self.engine is not None
        sae: Any = self.engine.sae
        sae.active_groups = self.engine.ae.active_groups
        return super()._ready()

    def _objective(self) -> TopK:
        """TopK() with prefixes of the active groups: the last of them has the features, 0, of those that are off."""
        on, sizes = self._ae.active_groups, self.group_sizes
        weights = tuple(weight / on for weight in self.group_weights[:on])
        prefixes = Prefixes((*sizes[: on - 1], sum(sizes[on - 1 :])), weights=weights)
        return replace(super()._objective(), prefixes=prefixes)

    def _follow(self, step: int, code: SparseCode) -> None:
        super()._follow(step, code)
        self.effective_l0 = self.k

    def _logged(self, losses: Tensor, code: SparseCode, residual: Tensor) -> dict[str, Any]:
        sae = self._sae
        x_hats = sae.decode_prefixes(code)[: sae.active_groups]
        errors = x_hats - (residual + x_hats[-1])
        l2 = errors.pow(2).sum(-1).flatten(1).mean(1) * errors.new_tensor(self.group_weights[: sae.active_groups])
        return {**super()._logged(losses, code, residual), "min_l2_loss": l2.min(), "max_l2_loss": l2.max()}
