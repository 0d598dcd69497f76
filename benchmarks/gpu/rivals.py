"""Training steps in plain PyTorch, and a peer's: what the engine's speed-ups are measured against on a GPU.

A step is called with x [B, d] and returns its total loss before the update, on the device: none of them waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sae_fast import GatedSAE
from sae_fast.train.eager import gated_loss_dense


class DictionaryLearning:
    """The operations of dictionary_learning 0.1.0's ``GatedSAETrainer.update`` with its defaults, rewritten, since the
    package cannot be installed without a network: fp32, autograd through [B, F] tensors, and its ConstrainedAdam."""

    def __init__(self, sae: GatedSAE, lr: float, l1: float):
        F_, d = sae.W_enc.shape
        self.encoder, self.decoder = (nn.Linear(n, m, bias=False, device="meta") for n, m in ((d, F_), (F_, d)))
        self.encoder.weight = nn.Parameter(sae.W_enc.detach().clone())
        self.decoder.weight = nn.Parameter(sae.W_dec.detach().T.contiguous())  # [d, F], a feature a column
        names = ("b_gate", "b_mag", "r_mag", "b_dec")
        self.b_gate, self.b_mag, self.r_mag, self.b_dec = (nn.Parameter(getattr(sae, n).detach().clone()) for n in names)
        rest = [self.b_gate, self.b_mag, self.r_mag, self.b_dec]
        self.optimizer = torch.optim.Adam([self.encoder.weight, self.decoder.weight, *rest], lr=lr, betas=(0.0, 0.999))
        self.l1 = l1

    def __call__(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(x)
        loss.backward()
        p = self.decoder.weight
        with torch.no_grad():
            assert p.grad is not None
            normed = p / p.norm(dim=0, keepdim=True)
            p.grad -= (p.grad * normed).sum(dim=0, keepdim=True) * normed
        self.optimizer.step()
        with torch.no_grad():
            p /= p.norm(dim=0, keepdim=True)
        return loss.detach()

    def loss(self, x: Tensor) -> Tensor:
        u = self.encoder(x - self.b_dec)
        pi_gate = u + self.b_gate
        gate = (pi_gate > 0).to(u.dtype)
        f = gate * torch.relu(self.r_mag.exp() * u + self.b_mag)
        f_gate = torch.relu(pi_gate)
        x_hat = self.decoder(f) + self.b_dec
        x_hat_gate = f_gate @ self.decoder.weight.detach().T + self.b_dec.detach()
        sparsity = torch.linalg.norm(f_gate, ord=1, dim=-1).mean()
        return (x - x_hat).pow(2).sum(-1).mean() + self.l1 * sparsity + (x - x_hat_gate).pow(2).sum(-1).mean()

    def parameters(self) -> dict[str, Tensor]:
        """Under the names of a GatedSAE."""
        weights = {"W_enc": self.encoder.weight, "W_dec": self.decoder.weight.T}
        return weights | {name: getattr(self, name) for name in ("b_gate", "b_mag", "r_mag", "b_dec")}


def gated_loss(l1: float) -> Callable[[GatedSAE, Tensor], Tensor]:
    return lambda sae, x: gated_loss_dense(x, sae.W_enc, sae.b_gate, sae.b_mag, sae.r_mag, sae.W_dec, sae.b_dec, l1)


class Dense:
    """As well as dense PyTorch allows: one encoder product, fused Adam; ``compile`` (a mode of torch.compile) compiles
    loss, projection and renormalisation; ``precision`` is "fp32", "tf32", or "bf16" by autocast."""

    def __init__(
        self, sae: Any, loss: Callable[[Any, Tensor], Tensor], lr: float, precision: str = "fp32",
        compile: str | None = None, betas: tuple[float, float] = (0.0, 0.999),
    ):  # fmt: skip
        self.sae, self.precision = sae, precision
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=betas, fused=True)
        wrap: Any = (lambda fn: torch.compile(fn, mode=compile, dynamic=False)) if compile else (lambda fn: fn)
        self.loss, self.project, self.renormalise = (wrap(fn) for fn in (lambda x: loss(sae, x), _project, _renormalise))

    def __call__(self, x: Tensor) -> Tensor:
        sae = self.sae
        self.optimizer.zero_grad()
        with _tf32(self.precision == "tf32"):
            with self._autocast(x.device.type):
                loss = self.loss(x)
            loss.backward()
        with torch.no_grad():
            self.project(sae.W_dec.grad, sae.W_dec)
            self.optimizer.step()
            self.renormalise(sae.W_dec)
        return loss.detach()

    def _autocast(self, device: str) -> AbstractContextManager:
        return torch.autocast(device, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.sae.named_parameters())


def _project(grad: Tensor, W: Tensor) -> None:
    direction = F.normalize(W, dim=1)
    grad.sub_((grad * direction).sum(1, keepdim=True) * direction)


def _renormalise(W: Tensor) -> None:
    W.copy_(F.normalize(W, dim=1))


class _tf32:
    def __init__(self, allowed: bool):
        self.allowed = allowed

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.allowed

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self.before


class Sparsify:
    """A step of EleutherAI sparsify's TopK, with its Triton decoder, put together from the package's parts as its trainer's
    hook does: unit rows, forward (under bfloat16 autocast), FVU, backward, projection, Adam.  ImportError without it."""

    def __init__(self, sae: Any, k: int, lr: float):
        os.environ["SPARSIFY_DISABLE_TRITON"] = "0"  # read on import
        from sparsify import SparseCoder, SparseCoderConfig

        self.coder = SparseCoder(sae.d_in, SparseCoderConfig(num_latents=sae.d_sae, k=k), device=sae.W_enc.device)
        coder = self.coder
        named = {"W_enc": coder.encoder.weight, "b_enc": coder.encoder.bias, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(getattr(sae, name))
        self.named: dict[str, Tensor] = named
        self.optimizer = torch.optim.Adam(coder.parameters(), lr=lr)

    def __call__(self, x: Tensor) -> Tensor:
        """The squared error of an example, as the others have it."""
        coder = self.coder
        coder.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        fvu = coder(x, total_variance=total_variance).fvu
        fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return fvu.detach() * total_variance / x.shape[0]

    def parameters(self) -> dict[str, Tensor]:
        return self.named
