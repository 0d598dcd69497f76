"""sparsify's SparseCoder with its forward pass on the engine.

    for coder in trainer.saes.values():
        accelerate(coder)

Its trainer makes its coders itself, so a coder is changed where it stands: its parameters, files and methods stay.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.functional import relu

from sae_fast import ops
from sae_fast.code import SparseCode
from sae_fast.extras import require

require("sparsify", extra="sparsify")

from sparsify.sparse_coder import ForwardOutput, SparseCoder  # noqa: E402

logger = logging.getLogger("sae_fast")


class FastSparseCoder(SparseCoder):
    """A SparseCoder whose ``forward`` makes no [B, num_latents] matrix.  ``encode`` and ``decode`` are sparsify's: all
    pre-activations are part of encode's answer."""

    def why_dense(self) -> str | None:
        """The reason why ``forward`` would be sparsify's own; None when it is the engine's."""
        if self.cfg.activation != "topk":
            return f"activation is {self.cfg.activation!r}"
        if self.cfg.multi_topk:
            return "multi_topk is on, whose second choice is of all pre-activations"
        if self.device.type != "cpu":
            return f"the device is {self.device}, where sparsify computes in bfloat16"
        if self.W_dec is None or {p.dtype for p in self.parameters()} != {torch.float32}:
            return "there is no decoder in float32"
        return None

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, dead_mask: Tensor | None = None, total_variance: Tensor | None = None
    ) -> ForwardOutput:
        """SparseCoder.forward.  Sparsify's own pass answers where why_dense() has a reason, and for a batch of which a row
        has fewer than k positive features, as there the features that it fills up with are trained, too."""
        code, x_c = None, x
        why = self.why_dense()
        if why is None and x.dim() == 2 and x.dtype == torch.float32:
            x_c = x if self.cfg.transcode else x - self.b_dec
            code = ops.encode(x_c, self.encoder.weight, self.encoder.bias, activation="relu", support="topk", k=self.cfg.k)
        if code is None or code.nnz != x.shape[0] * self.cfg.k:
            if why not in (None, getattr(self, "_said", None)):
                self._said = why
                logger.warning("FastSparseCoder: sparsify's own pass runs, as %s", why)
            return super().forward(x, y, dead_mask=dead_mask, total_variance=total_variance)
        return self._of_code(code, x, x if y is None else y, x_c, dead_mask, total_variance)

    def _of_code(
        self, code: SparseCode, x: Tensor, y: Tensor, x_c: Tensor, dead_mask: Tensor | None, total_variance: Tensor | None
    ) -> ForwardOutput:
        sae_out = ops.decode(code, self.W_dec) + self.b_dec
        if self.W_skip is not None:
            sae_out = sae_out + x @ self.W_skip.mT
        e = y - sae_out
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        auxk_loss = sae_out.new_zeros(())
        if dead_mask is not None and bool(dead_mask.any()):
            auxk_loss = self._auxk(x_c, e.detach(), dead_mask) / total_variance
        shape = x.shape[0], self.cfg.k
        latents = code.magnitudes.view(shape), code.indices.long().view(shape)
        return ForwardOutput(sae_out, *latents, e.pow(2).sum() / total_variance, auxk_loss, sae_out.new_zeros(()))

    def _auxk(self, x_c: Tensor, e: Tensor, dead_mask: Tensor) -> Tensor:
        """As in sparsify, whose encoder gives pre-activations no gradient: this loss trains W_dec alone."""
        dead = dead_mask.nonzero()[:, 0]
        k = e.shape[1] // 2
        with torch.no_grad():
            pi = relu(x_c @ self.encoder.weight[dead].T + self.encoder.bias[dead])
            best = pi.topk(min(k, dead.shape[0]), sorted=False)
            z = torch.zeros_like(pi).scatter(1, best.indices, best.values)
        return min(dead.shape[0] / k, 1.0) * (z @ self.W_dec[dead] - e).pow(2).sum()


def accelerate(coder: SparseCoder) -> FastSparseCoder:
    """The coder, changed in place: from here on its forward pass is the engine's."""
    if type(coder) not in (SparseCoder, FastSparseCoder):
        raise ValueError(f"coder: got a {type(coder).__name__}, want sparsify's SparseCoder itself")
    coder.__class__ = FastSparseCoder
    return coder
