"""A training step for the GPU in which the host waits for nothing: the kernels in order, in buffers of a fixed capacity.

What would need a decision by the host sets a bit of one flag on the device instead, and while the flag is set no weight
changes.  device_steps.py reads it later, and repeats what did not happen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import functional, nn
from sae_fast.code import Shadow
from sae_fast.kernels.compact import NOT_FINITE, OVERFLOW
from sae_fast.kernels.decode_loss import StepOutputs, decode_loss
from sae_fast.kernels.decode_loss import scratch as loss_scratch
from sae_fast.kernels.encode import Layer, candidates, members
from sae_fast.kernels.grad_sqnorm import grad_sqnorm, slices
from sae_fast.kernels.outer import outer, runs
from sae_fast.kernels.transpose import scratch as transpose_scratch
from sae_fast.kernels.transpose import transpose
from sae_fast.kernels.weight_step import new_adam, row_step, set_adam, weight_step
from sae_fast.ops.dispatch import without_autocast
from sae_fast.optim import RowAdam

STALE, NOT_FINITE_LOSS = 4, 8  # bits of the flag, beside the kernels' own
REPORT = ("reconstruction", "sparsity", "auxiliary", "fired", "candidates", "flag")


class DeviceStep:
    """The step of one SAE at β1 = 0, with a code of up to ``capacity`` candidates."""

    def __init__(
        self, sae: nn.SparseAutoencoder, optimizer: RowAdam, shadow: Shadow, dialect: str, beta2: float, eps: float,
        grad_clip: float | None, capacity: int,
    ):  # fmt: skip
        self.sae, self.optimizer, self.shadow, self.dialect, self.capacity = sae, optimizer, shadow, dialect, capacity
        self.beta2, self.eps, self.grad_clip = beta2, eps, grad_clip
        device = sae.W_enc.device
        self.adam = new_adam(device)
        self.l1 = torch.zeros((), dtype=torch.float32, device=device)
        self.flag = torch.zeros((), dtype=torch.int32, device=device)
        self.report = torch.zeros(len(REPORT), dtype=torch.float64, device=device)
        self.ones = self.l1.new_ones(capacity)
        bias, *self._vectors = sae.per_feature
        self._gradient_names = [bias, *(("r_mag", "b_mag") if sae.activation == "gated" else ())]

    def set(self, step: int, lr: float, l1: float) -> None:
        """What the next run is made with; ``step`` counts from 1."""
        set_adam(self.adam, step, lr, self.beta2, self.eps)
        self.l1.fill_(l1)

    @torch.no_grad()
    @without_autocast()
    def run(self, x: Tensor) -> None:
        """One step on x [B, d]; ``report`` says what it saw."""
        sae, flag = self.sae, self.flag
        x_c = self.ones.new_empty(x.shape)
        code, total, longest = self._encode(x, x_c)
        weight = self.l1 * sae.W_dec.norm(dim=1) if self.dialect == "saelens" else self.l1.expand(sae.d_sae).contiguous()
        losses, residuals, entries = self._decode(x, code, weight)
        csc = self._transpose(code, x.shape[0])
        split = runs(csc[0], self.capacity)

        def sums(columns: Tensor) -> Tensor:
            """[F, n]: each feature's sums of columns [C, n]: outer with an entry in the place of an example."""
            out = self.ones.new_empty(sae.d_sae, columns.shape[1])
            outer(csc[0], csc[2].int(), csc[2], [self.ones], [columns], None, 0, out, split, accumulate=False)
            return out

        n = x.shape[0]
        decoder, coefficient = ([entries.decoder], [residuals[0]]), None
        if self.dialect == "saelens":
            if len(residuals) == 2:  # x̂_aux is not stopped
                decoder = [entries.decoder, code.values[1] * (2 / n)], list(residuals)
            coefficient = sae._norm_cost(sums(code.values[-1:].T.contiguous())[:, 0], self.l1 / n)
        delta, *vectors = sums(entries.entries).T.contiguous()
        gradients = dict(zip(self._gradient_names, vectors, strict=False))
        gradients["b_dec"] = sum(r.sum(0) for r in decoder[1]) * (2 / n) - functional.weighted_rows(delta, sae.W_enc)
        weights = {"W_enc": ([entries.delta], [x_c], None), "W_dec": (*decoder, coefficient)}
        # No element of a weight's gradient is larger than B times the largest value times the longest row.
        residual = (losses[::2] * n).amax().sqrt()
        lengths = [(entries.delta, longest), *((values, residual) for values in decoder[0])]
        reach = [values.abs().amax() * length * n for values, length in lengths]
        finite = [torch.isfinite(t.float()).all() for t in (losses, delta, *gradients.values(), *reach)]
        if coefficient is not None:
            finite.append(torch.isfinite(coefficient).all())
        flag.bitwise_or_(torch.where(torch.stack(finite).all(), 0, NOT_FINITE_LOSS).to(torch.int32))
        scale = self._clip(csc, split, weights, gradients)
        for name, (values, A, own) in weights.items():
            W, v, last = self._state(name)
            unit, shadow = (False, self.shadow) if name == "W_enc" else (self.dialect == "paper", None)
            weight_step(W, v, last, *csc, values, A, own, 0, self.adam, unit, scale, flag, shadow, split)
        for name, gradient in gradients.items():
            W, v, last = (t.view(-1, 1) if i < 2 else t for i, t in enumerate(self._state(name)))
            row_step(W, v, last, gradient.view(-1, 1), self.adam, False, scale, flag)
        fired = (code.values[0] != 0).sum()  # the gaps hold zeros
        self.report.copy_(torch.stack([*losses.double(), fired.double(), total.double(), flag.double()]))

    def _encode(self, x, x_c):
        sae = self.sae
        bias, *vectors = (sae.get_parameter(name) for name in sae.per_feature)
        named = dict(zip(self._vectors, vectors, strict=True))
        scale = named["r_mag"].exp() if "r_mag" in named else None
        layer = Layer(sae.W_enc, *self.shadow, bias, sae.activation, scale, named.get("b_mag"))
        exact = sae.precision == "exact"
        screened = candidates(x, layer, exact, sae.b_dec, x_c, self.flag)
        longest = (screened.norms[:, 1::2].sum(1).sqrt() / screened.norms[:, 0]).amax().double()
        return members(x_c, layer, screened, self.capacity, self.flag, exact), screened.end[-1], longest

    def _decode(self, x, code, weight):
        """losses [3], residuals [V, B, d] and the entries' gradients."""
        (B, d), (V, C), device = x.shape, code.values.shape, x.device
        residuals, grads, losses = (self.ones.new_empty(size) for size in ((V, B, d), (V, C), (B, 3)))
        scale = self.sae.get_parameter("r_mag").exp() if V == 2 else None
        delta, decoder = self.ones.new_zeros(2, C)  # zeros in the gaps
        entries = StepOutputs(code.u, scale, delta, self.ones.new_empty(C, 4), decoder)
        decode_loss(
            code.begin, code.end, code.indices, code.values, self.sae.W_dec, self.sae.b_dec, x, weight, float(B), residuals,
            *loss_scratch(V, B, d, C, device), losses, grads, entries,
        )  # fmt: skip
        return losses.sum(0, dtype=torch.float64) / B, residuals, entries

    def _transpose(self, code, B):
        F, device = self.sae.d_sae, code.indices.device
        colptr = torch.empty(F + 1, dtype=torch.int64, device=device)
        rows, perm = torch.empty_like(code.indices), torch.empty(self.capacity, dtype=torch.int64, device=device)
        scratch = transpose_scratch(B, F, device)
        transpose(code.begin, code.end, code.indices, F, colptr, rows, perm, *scratch)
        return colptr, rows, perm

    def _clip(self, csc, split, weights, gradients):
        """0-d factor that brings the global gradient norm to ``grad_clip``, or None."""
        if self.grad_clip is None:
            return None
        total = torch.stack([g.double().pow(2).sum() for g in gradients.values()]).sum()
        for name, (values, A, own) in weights.items():
            W = self.sae.get_parameter(name)
            squares = torch.empty(W.shape[0], slices(W.shape[1], False), dtype=torch.float64, device=W.device)
            grad_sqnorm(*csc, values, A, own, 0, W, False, squares, split)
            total += squares.sum()
        return (self.grad_clip / (total.sqrt() + 1e-6)).clamp(max=1.0).float()

    def _state(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        W = self.sae.get_parameter(name)
        state = self.optimizer.state[W]
        return W.detach(), state["exp_avg_sq"], state["last_step"]


__all__ = ["NOT_FINITE", "NOT_FINITE_LOSS", "OVERFLOW", "REPORT", "STALE", "DeviceStep"]
