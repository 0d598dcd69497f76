"""OnTheEngine: the methods that our training classes put in front of SAELens' own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sae_lens import registry
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss
from sae_lens.saes.topk_sae import SparseHookPoint
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from sae_fast.interop.saelens.step import Forward, Step, coo, to_dense
from sae_fast.ops.dispatch import without_autocast

logger = logging.getLogger("sae_fast")

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDENTITY_NORMS = ("none", "expected_average_only_in", "covariance_whitening")  # the last two are the trainer's work
FORMULAS = (
    "process_sae_in", "encode_with_hidden_pre", "encode", "decode", "calculate_aux_loss", "calculate_topk_aux_loss",
    "update_topk_threshold", "_iterable_decode",
)  # fmt: skip


class OnTheEngine:
    """The methods that our classes put in front of SAELens' own.

    W_enc keeps its shape [d_in, d_sae] and has the memory of its transpose: the engine reads a feature's row in one run,
    its gradient comes so laid out, and torch's optimizers follow.
    """

    _formulas: dict[str, Callable]  # SAELens' own, whose results the engine gives
    _activation_fn: type = nn.ReLU
    W_enc: nn.Parameter

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)  # type: ignore[call-arg]
        self._said: set[str] = set()
        self._own = {
            name: getattr(self, name) for name in ("run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out")
        }

    def initialize_weights(self) -> None:
        super().initialize_weights()  # type: ignore[misc]
        self._lay_out()

    def _lay_out(self) -> None:
        if not self.W_enc.T.is_contiguous():  # new, or assigned by load_state_dict
            self.W_enc.data = self.W_enc.data.T.contiguous().T

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """safetensors takes contiguous tensors only."""
        super().process_state_dict_for_saving(state_dict)  # type: ignore[misc]
        state_dict.update({name: t.contiguous() for name, t in state_dict.items() if isinstance(t, Tensor)})

    def why_dense(self) -> str | None:
        """The reason why a training step would take SAELens' own dense pass now; None when the engine takes it."""
        sae: Any = self
        for name in sae.hook_dict:
            point = getattr(sae, name)  # an Identity while SAELens keeps its hooks out
            if _has_hooks(point):
                return f"a hook is registered on {name}"
            if type(point) not in (HookPoint, SparseHookPoint, nn.Identity):
                return f"{name} is a {type(point).__name__}"
        dtypes = {p.dtype for p in sae.parameters()} | {sae.dtype}
        if dtypes != {torch.float32}:
            return f"the dtype is {', '.join(sorted(str(d) for d in dtypes))}; the engine computes in float32"
        if sae.W_enc.device.type not in ("cpu", "cuda"):
            return f"the device is {sae.W_enc.device}"
        if sae.cfg.normalize_activations not in IDENTITY_NORMS:
            return f"normalize_activations is {sae.cfg.normalize_activations!r}"
        if getattr(sae.cfg, "lp_norm", 1.0) != 1:
            return f"lp_norm is {sae.cfg.lp_norm}"
        if sae.hook_z_reshaping_mode:
            return "hook_z reshaping is on"
        for name, own in self._formulas.items():
            if getattr(type(self), name) is not own or name in vars(self):
                return f"{name} is not SAELens' own"
        replaced = [name for name, own in self._own.items() if getattr(self, name) is not own]
        replaced += ["mse_loss_fn"] if sae.mse_loss_fn is not mse_loss else []
        activation = sae.activation_fn
        replaced += (
            [] if type(activation) is self._activation_fn and not _has_hooks(sae.activation_fn) else ["activation_fn"]
        )
        return f"{replaced[0]} is not SAELens' own" if replaced else None

    def _takes(self, x: Tensor) -> bool:
        """True if the engine takes a training step on x; if not, logs why, once for each reason."""
        why = self.why_dense()
        if why is None and not (x.dim() == 2 and x.shape[0] > 0 and x.dtype in INPUT_DTYPES):
            why = f"sae_in is {x.dtype} {tuple(x.shape)}, not a batch [B, d_in] of float32, bfloat16 or float16"
        if why is None:
            return True
        hook = why.startswith("a hook")
        key = "hook" if hook else why
        if key not in self._said:
            self._said.add(key)
            if hook:
                warnings.warn(
                    f"{why}: dense activations are materialised and training is slow while it is there", stacklevel=3
                )
            else:
                logger.warning("%s: SAELens' own dense pass trains, as %s", type(self).__name__, why)
        return False

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' training_forward_pass on the engine.

        ``feature_acts`` is a sparse COO tensor [B, d_sae], or a dense one while more than 1/64 of it is active, as zero
        biases make it.  ``hidden_pre`` is the same tensor: where a feature fires the two are equal, and where none does
        nothing here computes what the activation function would have cut to 0.  All outputs are differentiable.
        """
        if not self._takes(step_input.sae_in):
            return super().training_forward_pass(step_input)  # type: ignore[misc]
        return self._fast_forward_pass(step_input)

    def _vectors(self) -> list[Tensor]:
        """The encoder's bias and the activation's parameters, in its order."""
        raise NotImplementedError

    def _step(self, step_input: TrainStepInput | None) -> Step:
        """The settings of a step, or, of None, of an encoding."""
        raise NotImplementedError

    @torch.compiler.disable
    def _fast_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self._lay_out()
        sae: Any = self
        x = step_input.sae_in.to(torch.float32)
        step = replace(self._step(step_input), gradients=torch.is_grad_enabled() and not x.requires_grad)
        vectors = self._vectors()
        with torch.no_grad(), without_autocast():
            code = step.code_to_train(step.centre(x, sae.b_dec), sae.W_enc.T.contiguous(), sae.W_dec, *vectors)
        loss, sae_out, acts, *parts = Forward.apply(step, code, x, sae.W_enc, sae.W_dec, sae.b_dec, *vectors)
        acts = acts if acts.dim() == 2 else coo(code, acts)
        return TrainStepOutput(
            sae_in=step_input.sae_in, sae_out=sae_out, feature_acts=acts, hidden_pre=acts, loss=loss,
            losses=dict(zip(step.names, parts, strict=True)),
        )  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        """Dense features [..., d_sae], as SAELens' encode gives them."""
        if self.why_dense() is not None or x.dtype not in INPUT_DTYPES or x.dim() < 2:
            return super().encode(x)  # type: ignore[misc]
        return self._fast_encode(x)

    def _vectors_of_encode(self) -> list[Tensor]:
        """Those of :meth:`_vectors`, without what SAELens' encode has no gradient for."""
        return self._vectors()

    @torch.compiler.disable
    def _fast_encode(self, x: Tensor) -> Tensor:
        self._lay_out()
        sae: Any = self
        step = self._step(None)
        rows = x.to(torch.float32).reshape(x.shape[:-1].numel(), x.shape[-1])
        with without_autocast():
            code = step.code(step.centre(rows, sae.b_dec), sae.W_enc.T, sae.W_dec, *self._vectors_of_encode())
            code = code.with_values(step.acts(code, sae.W_dec)[None])
            dense = code.to_dense() if code.values.requires_grad else to_dense(code)
        return dense.reshape(*x.shape[:-1], dense.shape[-1])


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


class OurConfig:
    """A configuration of SAELens' for a class of ours."""

    @classmethod
    def architecture(cls) -> str:
        return f"sae_fast_{super().architecture()}"  # type: ignore[misc]


def register(sae: Any, config: Any, *inference: Any) -> None:
    """Lets SAELens find a training class and its configuration, and SAELens' own that a training checkpoint is for
    ``inference``, if there are."""
    sae._formulas = {name: getattr(sae, name) for name in FORMULAS if hasattr(sae, name)}
    name = config.architecture()
    registry.SAE_TRAINING_CLASS_REGISTRY.pop(name, None)  # it may be ours from before a reload
    registry.SAE_CLASS_REGISTRY.pop(name, None)
    registry.register_sae_training_class(name, sae, config)
    if inference:
        registry.register_sae_class(name, *inference)
