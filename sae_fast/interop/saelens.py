"""SAELens' training classes on the engine: same names, same arguments, same answers, in SAELens' own trainer and runner.

    from sae_fast.interop.saelens import GatedTrainingSAE, GatedTrainingSAEConfig

in the place of `from sae_lens import ...`; the rest of a training script stays.  The architectures are "sae_fast_gated" and
"sae_fast_standard" in a training checkpoint; `save_inference_model` writes plain "gated" and "standard" folders, which
SAELens loads without this package.

One training step is one sparse pass, forward and gradients together, in fp32 also under autocast.  SAELens' own dense pass
is taken where the engine cannot stand in for it (``why_dense()`` says why): while a hook sits on one of the SAE's hook
points, with a warning; for other dtypes, layer norm, lp_norm ≠ 1, subclasses with formulas of their own, with a log line.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_fast import gradients, ops
from sae_fast.activations import Activation, named
from sae_fast.code import Decoder, Layer, RowGradient, SparseCode
from sae_fast.extras import require
from sae_fast.gradients import HostKernels
from sae_fast.objectives import of_dialect
from sae_fast.ops import crossovers
from sae_fast.ops.dispatch import cpu_rejects, without_autocast
from sae_fast.ops.encode import screen

require("sae_lens", extra="saelens")

from sae_lens import registry  # noqa: E402
from sae_lens.saes import gated_sae, standard_sae  # noqa: E402
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss  # noqa: E402
from transformer_lens.hook_points import HookPoint  # noqa: E402

logger = logging.getLogger("sae_fast")

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDENTITY_NORMS = ("none", "expected_average_only_in", "covariance_whitening")  # the last two are the trainer's work
FORMULAS = ("process_sae_in", "encode_with_hidden_pre", "encode", "decode", "calculate_aux_loss")


# ---- One step -------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """The settings of a step, besides its tensors: vectors are the bias and the activation's parameters, in its order."""

    activation: Activation
    centred: bool  # apply_b_dec_to_input
    l1: float
    gradients: bool  # whether to take them along

    def code(self, x: Tensor, W: Tensor, b_dec: Tensor, bias: Tensor, *vectors: Tensor) -> tuple[Tensor, SparseCode]:
        """(what the encoder's product with W [F, d] takes, its code)."""
        x_c = x - b_dec if self.centred else x
        parameters: dict[str, Any] = dict(zip(self.activation.parameters, vectors, strict=True))
        return x_c, ops.encode(x_c, W, bias, activation=self.activation.name, precision=_precision(x), **parameters)

    def outputs(self, x: Tensor, W_enc: Tensor, W_dec: Tensor, b_dec: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """The differentiable outputs of _Forward, made of differentiable ops: what it is the short cut of."""
        _, code = self.code(x, W_enc.T, b_dec, *vectors)
        weight = of_dialect(self.activation.name, self.l1, "saelens").sparsity_weight(W_dec)
        losses = ops.decode_loss(code, W_dec, b_dec, x, weight, x.shape[0], stop_auxiliary=False).losses.unbind()
        acts = code.magnitudes if _listed(code) else code.to_dense()
        return _sum(losses), *losses, ops.decode(code, W_dec) + b_dec, acts


class _Forward(torch.autograd.Function):
    """(loss, mse, l1, auxiliary, x̂, feature_acts, indptr, indices) of a step; feature_acts are [nnz], or [B, F] unless
    the code is _listed.

    The gradients of ``loss`` are taken with it, as the support is at hand; of anything else, by doing it again with
    autograd.
    """

    @staticmethod
    def forward(ctx, step: _Step, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.step = step
        ctx.save_for_backward(*tensors)
        with without_autocast():
            x, W_enc, W_dec, b_dec, *vectors = tensors
            W = W_enc.T.contiguous()  # as it is, unless a parametrization made W_enc
            x_c, code = step.code(x, W, b_dec, *vectors)
            losses, x_hat, ctx.gradients = _pass(step, code, x_c, x, W, W_dec, b_dec, *vectors)
            acts = code.magnitudes.clone() if _listed(code) else _to_dense(code)
        ctx.mark_non_differentiable(code.indptr, code.indices)
        parts = [part.clone() for part in losses]
        return _sum(parts), *parts, x_hat, acts, code.indptr, code.indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, step, taken = ctx.saved_tensors, ctx.step, ctx.gradients
        ctx.gradients = None  # else autograd would copy them into .grad
        needed = ctx.needs_input_grad[1:]
        with without_autocast():
            if taken is not None and grads[0] is not None and all(g is None for g in grads[1:]):
                if grads[0].device.type != "cpu" or grads[0] != 1:
                    taken = [g.mul_(grads[0]) for g in taken]
                return (None, None, *(g if wanted else None for g, wanted in zip(taken, needed[1:], strict=True)))
            del taken
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip(tensors, needed, strict=True)]
                outputs = step.outputs(*leaves)
            chosen = [i for i, output in enumerate(outputs) if grads[i] is not None and output.requires_grad]
            if not chosen:
                return (None, *[None] * len(needed))
            found = iter(
                torch.autograd.grad(
                    [outputs[i] for i in chosen], [leaf for leaf in leaves if leaf.requires_grad],
                    [grads[i] for i in chosen], allow_unused=True,
                )
            )  # fmt: skip
            return (None, *(next(found) if wanted else None for wanted in needed))


def _precision(x: Tensor) -> str:
    """The precision for ops.encode.  SAELens takes torch's fp32 product, and so does a processor that has no bfloat16
    product to screen with, where ``exact`` would take half as long again."""
    return "fp32" if x.device.type == "cpu" and screen.unavailable() else "exact"


def _sum(losses) -> Tensor:
    mse, l1, auxiliary = losses
    return mse + l1 + auxiliary


def _pass(step, code, x_c, x, W, W_dec, b_dec, bias, *vectors):
    """losses [3], x̂, and the gradients of their sum for W_enc, W_dec, b_dec and the vectors, or None.  W is W_enc.T."""
    objective = of_dialect(step.activation.name, step.l1, "saelens")
    if not step.gradients:
        out = ops.decode_loss(code, W_dec, b_dec, x, objective.sparsity_weight(W_dec), x.shape[0], stop_auxiliary=False)
        return out.losses, out.residual + x, None
    parameters = dict(zip(step.activation.parameters, vectors, strict=True))
    layer = Layer.of(W, bias, step.activation.name, parameters)
    problem = code, x_c, x, layer, Decoder(W_dec, b_dec, step.centred), objective
    if ops.dense_step_pays(code, W_dec):
        losses, residual, by_name = gradients.of_dense_step(*problem)
    else:
        losses, residual, by_name = gradients.of_step(*problem, HostKernels(in_one_pass=True))
    dW_enc, dW_dec = (_dense(by_name[name], weight) for name, weight in (("W_enc", W), ("W_dec", W_dec)))
    of_vectors = (by_name[name] for name in (step.activation.bias, *step.activation.parameters))
    return losses, residual + x, [dW_enc.T, dW_dec, by_name["b_dec"], *of_vectors]


def _dense(gradient: RowGradient | Tensor, W: Tensor) -> Tensor:
    if isinstance(gradient, Tensor):
        return gradient
    dW = ops.outer(gradient.csc, gradient.values, gradient.A)
    return dW if gradient.self_coefficient is None else dW.addcmul_(gradient.self_coefficient[:, None], W)


def _listed(code: SparseCode) -> bool:
    """True if the trainer gets a code's entries rather than a dense matrix: it sorts them twice a step for its statistics,
    which costs as much as its passes over 64 zeros each."""
    return 64 * code.nnz <= code.batch * code.d_sae


def _to_dense(code: SparseCode) -> Tensor:
    """[B, F], outside of autograd."""
    if cpu_rejects(code.values) is not None:
        return code.to_dense()
    values = code.magnitudes.contiguous()
    out = values.new_empty(code.batch, code.d_sae)
    return crossovers.scatter(code.indptr, code.indices, None, 0, code.batch, values, out)


def _coo(indptr: Tensor, indices: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Sparse COO [B, F].  In order and without duplicates, so nothing need sort it."""
    rows = torch.repeat_interleave(
        torch.arange(shape[0], device=indptr.device), indptr.diff(), output_size=indices.shape[0]
    )
    at = torch.stack([rows, indices.long()])
    return torch.sparse_coo_tensor(at, values, shape, is_coalesced=True, check_invariants=False)


# ---- The SAEs -------------------------------------------------------------------------------------------------------


class OnTheEngine:
    """The methods that both classes put in front of SAELens' own.

    W_enc keeps its shape [d_in, d_sae] and has the memory of its transpose: the engine reads a feature's row in one run,
    its gradient comes so laid out, and torch's optimizers follow.
    """

    _activation: Activation
    _formulas: dict[str, Callable]  # SAELens' own, whose results the engine gives
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
            if type(point) not in (HookPoint, nn.Identity):
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
        replaced += ["activation_fn"] if type(sae.activation_fn) is not nn.ReLU or _has_hooks(sae.activation_fn) else []
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

    def _encoder_vectors(self) -> list[Tensor]:
        """The bias and the activation's parameters, which SAELens calls as we do."""
        return [getattr(self, name) for name in (self._activation.bias, *self._activation.parameters)]

    @torch.compiler.disable
    def _fast_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self._lay_out()
        sae: Any = self
        x = step_input.sae_in.to(torch.float32)
        gradients = torch.is_grad_enabled() and not x.requires_grad
        step = _Step(self._activation, sae.cfg.apply_b_dec_to_input, float(step_input.coefficients["l1"]), gradients)
        vectors = self._encoder_vectors()
        loss, mse, l1, auxiliary, sae_out, acts, indptr, indices = _Forward.apply(
            step, x, sae.W_enc, sae.W_dec, sae.b_dec, *vectors
        )
        if acts.dim() == 1:
            acts = _coo(indptr, indices, acts, torch.Size((x.shape[0], sae.W_dec.shape[0])))
        losses = {"mse_loss": mse, "l1_loss": l1}
        if self._activation.value_sets == 2:
            losses["auxiliary_reconstruction_loss"] = auxiliary
        return TrainStepOutput(
            sae_in=step_input.sae_in, sae_out=sae_out, feature_acts=acts, hidden_pre=acts, loss=loss, losses=losses
        )

    def encode(self, x: Tensor) -> Tensor:
        """Dense features [..., d_sae], as SAELens' encode gives them."""
        if self.why_dense() is not None or x.dtype not in INPUT_DTYPES or x.dim() < 2:
            return super().encode(x)  # type: ignore[misc]
        return self._fast_encode(x)

    @torch.compiler.disable
    def _fast_encode(self, x: Tensor) -> Tensor:
        self._lay_out()
        sae: Any = self
        bias, *magnitude = self._encoder_vectors()
        if magnitude:
            bias = bias.detach()  # a gate's step has no gradient, in SAELens not even one of 0
        step = _Step(self._activation, sae.cfg.apply_b_dec_to_input, 0.0, False)
        rows = x.to(torch.float32).reshape(x.shape[:-1].numel(), x.shape[-1])
        with without_autocast():
            _, code = step.code(rows, sae.W_enc.T, sae.b_dec, bias, *magnitude)
            dense = code.to_dense() if code.values.requires_grad else _to_dense(code)
        return dense.reshape(*x.shape[:-1], dense.shape[-1])


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


@dataclass
class GatedTrainingSAEConfig(gated_sae.GatedTrainingSAEConfig):
    """SAELens' GatedTrainingSAEConfig, for the class below."""

    @classmethod
    def architecture(cls) -> str:
        return "sae_fast_gated"

    def get_inference_config_class(self) -> Any:
        """SAELens' own: what save_inference_model writes needs nothing of ours."""
        return gated_sae.GatedSAEConfig


@dataclass
class StandardTrainingSAEConfig(standard_sae.StandardTrainingSAEConfig):
    """SAELens' StandardTrainingSAEConfig, for the class below."""

    @classmethod
    def architecture(cls) -> str:
        return "sae_fast_standard"

    def get_inference_config_class(self) -> Any:
        """SAELens' own: what save_inference_model writes needs nothing of ours."""
        return standard_sae.StandardSAEConfig


class GatedTrainingSAE(OnTheEngine, gated_sae.GatedTrainingSAE):
    """SAELens' GatedTrainingSAE, trained by the engine."""

    _activation = named("gated")


class StandardTrainingSAE(OnTheEngine, standard_sae.StandardTrainingSAE):
    """SAELens' StandardTrainingSAE, trained by the engine."""

    _activation = named("relu")


def _register(sae: Any, config: Any, inference: Any, inference_config: Any) -> None:
    sae._formulas = {name: getattr(sae, name) for name in FORMULAS}
    name = config.architecture()
    registry.SAE_TRAINING_CLASS_REGISTRY.pop(name, None)  # it may be ours from before a reload
    registry.SAE_CLASS_REGISTRY.pop(name, None)
    registry.register_sae_training_class(name, sae, config)
    registry.register_sae_class(name, inference, inference_config)


def _register_all() -> None:
    _register(GatedTrainingSAE, GatedTrainingSAEConfig, gated_sae.GatedSAE, gated_sae.GatedSAEConfig)
    _register(StandardTrainingSAE, StandardTrainingSAEConfig, standard_sae.StandardSAE, standard_sae.StandardSAEConfig)


_register_all()

__all__ = ["GatedTrainingSAE", "GatedTrainingSAEConfig", "StandardTrainingSAE", "StandardTrainingSAEConfig"]
