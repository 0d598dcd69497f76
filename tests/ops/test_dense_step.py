"""The dense way through a step: the gradients of the sparse ops, from products of dense matrices."""

from __future__ import annotations

import pytest
import torch
from helpers import Judge, assert_repeats, randn

import sae_fast as sf
from sae_fast import ops, use_backend
from sae_fast.objectives import L0, Gated, of_dialect
from sae_fast.ops import crossovers, dense_gradient
from sae_fast.reference import DIALECTS

B, D, F, L1 = 57, 33, 100, 0.7


def layer(kind: type, density: float, seed: int = 0) -> tuple[sf.nn.SparseAutoencoder, torch.Tensor]:
    """A layer away from its initialisation, that opens ``density`` of its gates on the batch beside it."""
    x = randn(B, D, seed=seed + 1) + 0.3
    sae = kind(D, F, seed=seed)
    with torch.no_grad():
        for i, p in enumerate(sae.parameters()):
            p += 0.1 * randn(*p.shape, seed=seed + 2 + i)
    sae.calibrate_(x, density * F)
    with torch.no_grad():
        if kind is sf.GatedSAE:
            sae.b_mag += 0.2 * randn(F, seed=seed + 20)  # gates open at magnitude 0, magnitudes behind closed gates
    return sae, x


def gradients(sae, x, dialect) -> dict[str, torch.Tensor]:
    done, _ = sae.row_gradients(x, of_dialect(sae.activation, L1, dialect))
    grads = {name: dense_gradient(sae.get_parameter(name), g) for name, g in done.by_name.items()}
    return {"losses": done.losses, **grads}


def by_autograd(sae, x, dialect) -> dict[str, torch.Tensor]:
    with use_backend("reference"):
        loss = sae.loss(x, L1, dialect)
        grads = torch.autograd.grad(loss.total, list(sae.parameters()))
    losses = torch.stack([loss.reconstruction, loss.sparsity, loss.auxiliary])
    return {"losses": losses, **{n: g for (n, _), g in zip(sae.named_parameters(), grads, strict=True)}}


@pytest.mark.parametrize("density", [0.5, 0.03, 1.0], ids=["half", "sparse", "all"])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", [sf.GatedSAE, sf.ReluSAE])
def test_gradients_are_as_near_to_float64_as_torchs(kind, dialect, density, isa, dense_way, monkeypatch):
    monkeypatch.setattr(crossovers, "CHUNK", 2 * F * 10)  # 10 rows a chunk, a ragged last one
    trials = Judge()
    for seed in range(3):
        sae, x = layer(kind, density, seed)
        assert ops.dense_step_pays(sae.encode_sparse(x), sae.W_dec)
        got, torchs = gradients(sae, x, dialect), by_autograd(sae, x, dialect)
        truth = by_autograd(sae.double(), x.double(), dialect)
        assert got.keys() == truth.keys()
        for name in truth:
            trials.add(name, got[name], torchs[name], truth[name])
    trials.verdict()


@torch.no_grad()
def test_repeats_bit_for_bit(dense_way):
    sae, x = layer(sf.GatedSAE, 0.5)

    def run():
        return list(gradients(sae, x, "paper").values())

    assert_repeats(run, threads=[torch.get_num_threads()])  # the BLAS rounds differently with other numbers of threads


def test_the_way_depends_on_the_density_of_the_code_alone():
    for density, dense in ((0.03, False), (0.5, True)):
        sae, x = layer(sf.GatedSAE, density)
        code = sae.encode_sparse(x)
        assert ops.dense_step_pays(code, sae.W_dec) == dense
        with use_backend("reference"):
            assert not ops.dense_step_pays(code, sae.W_dec)
    assert not ops.dense_step_pays(code, sae.W_dec.double())


def test_an_empty_code_has_gradients_of_zero(dense_way):
    sae, x = layer(sf.GatedSAE, 0.5)
    with torch.no_grad():
        sae.b_gate.fill_(-100)
    grads = gradients(sae, x, "paper")
    for name in ("W_enc", "W_dec", "b_gate", "b_mag", "r_mag"):
        assert not grads[name].any(), name
    assert grads["b_dec"].any()


@pytest.mark.parametrize("kind", [sf.GatedSAE, sf.JumpReluSAE])
def test_training_from_a_dense_start_follows_the_sparse_way(kind, monkeypatch):
    """The same weights to rounding, whichever way each step takes."""
    weights = []
    objective = Gated(0.1) if kind is sf.GatedSAE else L0(target=5, bandwidth=0.1)
    for crossover in (0.11, 9.0):
        monkeypatch.setitem(crossovers.CROSSOVER, "step", crossover)
        sae = kind(D, F, seed=3)
        trainer = sf.Trainer(sae, lr=1e-3, objective=objective, betas=(0.0, 0.9))
        for step in range(5):
            trainer.step(randn(B, D, seed=step))
        weights.append(torch.cat([p.detach().flatten() for p in sae.parameters()]))
    assert (weights[0] - weights[1]).norm() < 1e-4 * weights[0].norm()
