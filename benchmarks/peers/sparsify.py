"""step_topk: EleutherAI sparsify's TopK step, for scale: its loss is FVU, its support of fixed size.

Its trainer runs only inside a language model's hook, so the step is put together here from the package's parts as that hook
does: unit rows, forward, FVU, backward, projection, Adam (its `optimizer="adam"`, where bitsandbytes is absent).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # read on import; the worlds of the benchmarks are on the CPU

from sparsify import SparseCoder, SparseCoderConfig

from benchmarks.cases.floors import bare_product
from benchmarks.data import World
from benchmarks.peers.handover import hand_over
from benchmarks.registry import Run, case
from sae_fast import GatedSAE, reference

LR, BETAS, EPS = 1e-5, (0.9, 0.999), 1e-8
TRAINED = ("W_enc", "b_gate", "W_dec", "b_dec")  # b_gate as the encoder's bias


@dataclass(frozen=True)
class Batch:
    x: Tensor
    k: int

    def double(self) -> Batch:
        return Batch(self.x.double(), self.k)


def batches(world: World) -> list[Batch]:
    return [Batch(x, round(world.shape.l0)) for x in world.batches]


def without_bias(sae: GatedSAE) -> GatedSAE:
    """As the package starts, so that more than k features are positive on every example.  Where fewer are, its backward
    pass gives gradients to zeros, which are no part of the function."""
    sae.b_gate.data.zero_()
    return sae


@case(
    "step_topk",
    mode="train",
    inputs=batches,
    outcome=lambda sae, results: {name: sae.get_parameter(name) for name in TRAINED},
    memory=True,
)
def step_topk(sae: GatedSAE) -> Run:
    W_enc, bias, W_dec, b_dec = parameters = [without_bias(sae).get_parameter(name) for name in TRAINED]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    count = 0

    def run(batch: Batch) -> None:
        nonlocal count
        count += 1
        x = batch.x
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True) + torch.finfo(W_dec.dtype).eps)
        values, indices = torch.relu(F.linear(x - b_dec, W_enc, bias)).topk(batch.k)
        x_hat = (values[..., None] * W_dec[indices]).sum(1) + b_dec
        fvu = (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        grads = torch.autograd.grad(fvu, parameters)
        with torch.no_grad():
            along = (grads[2] * W_dec).sum(1, keepdim=True) * W_dec
            for p, grad, (m, v) in zip(parameters, grads, moments, strict=True):
                reference.adam_step(p, grad - along if p is W_dec else grad, m, v, count, LR, BETAS, EPS)

    return run


@step_topk.provider("sparsify")
def theirs(sae: GatedSAE) -> Run:
    peer = SparseCoder(sae.d_in, SparseCoderConfig(num_latents=sae.d_sae))
    theirs = (peer.encoder.weight, peer.encoder.bias, peer.W_dec, peer.b_dec)
    for name, parameter in zip(TRAINED, theirs, strict=True):
        hand_over(without_bias(sae).get_parameter(name), parameter)
    adam = torch.optim.Adam(peer.parameters(), lr=LR)

    def run(batch: Batch) -> None:
        peer.cfg.k = batch.k
        peer.set_decoder_norm_to_unit_norm()
        total_variance = (batch.x - batch.x.mean(0)).pow(2).sum()
        peer(batch.x, total_variance=total_variance).fvu.backward()
        peer.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return run


@step_topk.provider("bare_product", floor=True)
def product(sae: GatedSAE) -> Run:
    run = bare_product(sae)
    return lambda batch: run(batch.x)
