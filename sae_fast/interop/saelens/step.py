"""Step: a training step as SAELens' classes share it, and the function that autograd sees of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_fast import gradients, ops
from sae_fast.activations import Activation
from sae_fast.code import Decoder, Layer, SparseCode
from sae_fast.gradients import HostKernels, StepGradients
from sae_fast.objectives import Objective, Revived
from sae_fast.ops import crossovers
from sae_fast.ops.dispatch import cpu_rejects, trusted, without_autocast
from sae_fast.ops.encode import screen

KERNELS = HostKernels(in_one_pass=True)


@dataclass(frozen=True)
class Step:
    """The settings of a step, besides its tensors: x [B, d], W [F, d], W_dec, b_dec and the ``vectors`` [F], which are the
    bias and the activation's parameters, in its order."""

    names: ClassVar[tuple[str, ...]]  # of the parts of the loss, as SAELens has them

    activation: Activation
    objective: Objective
    centred: bool  # apply_b_dec_to_input
    sparse: bool = False  # whether feature_acts are always
    gradients: bool = False  # whether to take them along

    def code(self, x_c: Tensor, W: Tensor, W_dec: Tensor, *vectors: Tensor) -> SparseCode:
        """The code that the loss is of, of what the encoder is given; its values are differentiable."""
        return self.encode(x_c, W, *vectors)

    def code_to_train(self, x_c: Tensor, W: Tensor, W_dec: Tensor, *vectors: Tensor) -> SparseCode:
        """The same for what follows without autograd."""
        return self.code(x_c, W, W_dec, *vectors)

    def acts(self, code: SparseCode, W_dec: Tensor) -> Tensor:
        """[nnz]: SAELens' feature_acts."""
        return code.magnitudes

    def given(self, code: SparseCode, W_dec: Tensor) -> Tensor:
        """The same as Forward gives them: [nnz], or [B, F] unless the code is listed()."""
        acts = self.acts(code, W_dec)
        return acts if listed(self, code) else code.to_dense(acts)

    def parts(self, done: StepGradients, code: SparseCode, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> list[Tensor]:
        """The parts of the loss, 0-d each, by ``names``."""
        raise NotImplementedError

    def outputs(self, x: Tensor, W: Tensor, W_dec: Tensor, b_dec: Tensor, *vectors: Tensor) -> tuple[list[Tensor], ...]:
        """(the parts, [x̂, feature_acts]), made of differentiable ops: what Forward is the short cut of."""
        raise NotImplementedError

    def revived(self, x_c: Tensor, error: Tensor, layer: Layer, W_dec: Tensor) -> Revived | None:
        """The entries of dead features for an error x − x̂, if they have any."""
        return None

    def encode(self, x_c: Tensor, W: Tensor, bias: Tensor, *vectors: Tensor, **options: Any) -> SparseCode:
        parameters: dict[str, Any] = dict(zip(self.activation.parameters, vectors, strict=True))
        return ops.encode(x_c, W, bias, activation=self.activation.name, precision=precision(x_c), **options, **parameters)

    def centre(self, x: Tensor, b_dec: Tensor) -> Tensor:
        return x - b_dec if self.centred else x

    def layer(self, W: Tensor, bias: Tensor, *vectors: Tensor) -> Layer:
        return Layer.of(W, bias, self.activation.name, dict(zip(self.activation.parameters, vectors, strict=True)))

    def take(self, x: Tensor, code: SparseCode, W: Tensor, W_dec: Tensor, b_dec: Tensor, *vectors: Tensor) -> StepGradients:
        """The step on a code that :meth:`code_to_train` gave: gradients by name, if it takes them along."""
        x_c, layer, decoder = self.centre(x, b_dec), self.layer(W, *vectors), Decoder(W_dec, b_dec, self.centred)

        def revived(error: Tensor) -> Revived | None:
            return self.revived(x_c, error, layer, W_dec)

        problem = code, x_c, x, layer, decoder, self.objective
        if self.gradients and self.objective.prefixes is None and ops.dense_step_pays(code, W_dec):
            return gradients.of_dense_step(*problem, revived)
        if self.gradients:
            return gradients.of_step(*problem, KERNELS, revived)
        entries = KERNELS.entries(code, layer, decoder, x, self.objective)
        alive = revived(-entries.error)
        losses = entries.losses if alive is None else torch.cat([entries.losses[:2], entries.losses[2:] + alive.loss])
        return StepGradients(losses, entries.error, {})


class Forward(torch.autograd.Function):
    """(loss, x̂, feature_acts, each part) of a step on a code that was taken of the same tensors, x, W_enc [d, F], W_dec,
    b_dec and the vectors; feature_acts are [nnz], or [B, F] unless the code is listed().

    The gradients of ``loss`` are taken with it, as the support is at hand; of anything else, by doing it again with
    autograd.
    """

    @staticmethod
    def forward(ctx, step: Step, code: SparseCode, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.step = step
        ctx.save_for_backward(*tensors)
        with without_autocast(), trusted():
            x, W_enc, W_dec, b_dec, *vectors = tensors
            W = W_enc.T.contiguous()  # as it is, unless a parametrization made W_enc
            done = step.take(x, code, W, W_dec, b_dec, *vectors)
            parts = [part.clone() for part in step.parts(done, code, x, W_dec, b_dec)]
            acts = step.acts(code, W_dec)
            acts = acts.clone() if listed(step, code) else to_dense(code.with_values(acts[None]))
            ctx.gradients = _in_order(step, done, W, W_dec) if step.gradients else None
        return total(parts), done.residual + x, acts, *parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, step, taken = ctx.saved_tensors, ctx.step, ctx.gradients
        ctx.gradients = None  # else autograd would copy them into .grad
        needed = ctx.needs_input_grad[2:]
        with without_autocast():
            if taken is not None and grads[0] is not None and all(g is None for g in grads[1:]):
                if grads[0].device.type != "cpu" or grads[0] != 1:
                    taken = [g.mul_(grads[0]) for g in taken]
                return (None, None, None, *(g if wanted else None for g, wanted in zip(taken, needed[1:], strict=True)))
            del taken
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip(tensors, needed, strict=True)]
                x, W_enc, *others = leaves
                parts, made = step.outputs(x, W_enc.T, *others)
                outputs = [total(parts), *made, *parts]
            chosen = [i for i, output in enumerate(outputs) if grads[i] is not None and output.requires_grad]
            if not chosen:
                return (None, None, *[None] * len(needed))
            found = iter(
                torch.autograd.grad(
                    [outputs[i] for i in chosen], [leaf for leaf in leaves if leaf.requires_grad],
                    [grads[i] for i in chosen], allow_unused=True,
                )
            )  # fmt: skip
            return (None, None, *(next(found) if wanted else None for wanted in needed))


def precision(x: Tensor) -> str:
    """The precision for ops.encode.  SAELens takes torch's fp32 product, and so does a processor that has no bfloat16
    product to screen with, where ``exact`` would take half as long again."""
    return "fp32" if x.device.type == "cpu" and screen.unavailable() else "exact"


def total(parts: list[Tensor]) -> Tensor:
    """The loss, added up in SAELens' order."""
    loss, *others = parts
    for part in others:
        loss = loss + part
    return loss


def listed(step: Step, code: SparseCode) -> bool:
    """True if the trainer gets a code's entries rather than a dense matrix: it sorts them twice a step for its statistics,
    which costs as much as its passes over 64 zeros each."""
    return step.sparse or 64 * code.nnz <= code.batch * code.d_sae


def to_dense(code: SparseCode) -> Tensor:
    """[B, F], outside of autograd."""
    if cpu_rejects(code.values) is not None:
        return code.to_dense()
    values = code.magnitudes.contiguous()
    out = values.new_empty(code.batch, code.d_sae)
    return crossovers.scatter(code.indptr, code.indices, None, 0, code.batch, values, out)


def coo(code: SparseCode, values: Tensor) -> Tensor:
    """Sparse COO [B, F] of values [nnz].  In order and without duplicates, so nothing need sort it."""
    at = torch.stack([code.row_ids(), code.indices.long()])
    return torch.sparse_coo_tensor(at, values, code.shape, is_coalesced=True, check_invariants=False)


def _in_order(step: Step, done: StepGradients, W: Tensor, W_dec: Tensor) -> list[Tensor]:
    """The gradients of W_enc [d, F], W_dec, b_dec and the vectors."""
    by_name = done.by_name
    dW_enc, dW_dec = ops.dense_gradient(W, by_name["W_enc"]), ops.dense_gradient(W_dec, by_name["W_dec"])
    vectors = (by_name[name] for name in (step.activation.bias, *step.activation.parameters))
    return [dW_enc.T, dW_dec, by_name["b_dec"], *vectors]  # type: ignore[list-item]
