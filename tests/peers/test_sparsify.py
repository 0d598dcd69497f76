"""sparsify's SparseCoder with our forward pass, against its own.  Only in the environment of the peers."""

from __future__ import annotations

import copy
import logging
import os

import pytest
import torch
from helpers import Judge, make_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels want a GPU
pytest.importorskip("sparsify", reason="the peers are in an environment of their own: make test-peers builds it")

from sparsify import SparseCoder, SparseCoderConfig

from sae_fast.interop.sparsify import FastSparseCoder, accelerate

B, D, F, K = 60, 20, 150, 4
OPTIONS = {
    "an SAE": {},
    "a transcoder": {"transcode": True},
    "a transcoder with a skip": {"transcode": True, "skip_connection": True},
}


def problem(seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> tuple[Tensor, Tensor, SparseCoder]:
    """(x, y, a coder) with at least K positive features in each row, which rounding does not choose between."""
    for n in range(seed, 1000, 10):
        p, g = make_inputs(B, D, F, 0.2, n), torch.Generator().manual_seed(n)
        x, y = p.x.to(dtype), torch.randn(B, D, generator=g).to(dtype)
        coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **config), dtype=dtype)
        values = {"encoder.weight": p.W_enc, "encoder.bias": p.b_gate, "W_dec": p.W_dec, "b_dec": p.b_dec}
        for name, parameter in coder.named_parameters():
            parameter.data.copy_(values.get(name, torch.eye(D) / 3))
        pi = coder.double().encode(x.double()).pre_acts.sort(dim=1, descending=True).values
        coder.to(dtype)
        if pi[:, K].min() > 0 and (pi[:, K - 1] - pi[:, K]).min() > 3e-6:
            return x, y, coder
    raise AssertionError


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_is_as_near_to_float64_as_sparsifys_own(option):
    judge = Judge()
    dead = torch.arange(F) % 5 == 3
    for seed in range(4):
        x, y, coder = problem(seed, **OPTIONS[option])
        target = y if coder.cfg.transcode else None
        coders = copy.deepcopy(coder).double(), copy.deepcopy(coder), accelerate(copy.deepcopy(coder))
        found, chosen = [], []
        for sae in coders:
            rows, wanted = x.to(sae.dtype), None if target is None else target.to(sae.dtype)
            with Seen() as seen:
                out = sae(rows, wanted, dead_mask=dead)
            assert ("sae_fast.encode.default" in seen.ops) == (sae is coders[2])
            (out.fvu + out.auxk_loss / 32).backward()
            order = out.latent_indices.argsort(dim=1)
            acts = out.latent_acts.gather(1, order)
            found.append([out.sae_out, acts, out.fvu, out.auxk_loss, *(p.grad for p in sae.parameters())])
            chosen.append(out.latent_indices.gather(1, order))
            assert torch.equal(chosen[-1], chosen[0])
            assert out.auxk_loss > 0 and out.multi_topk_fvu == 0
        for i, (truth, theirs, ours) in enumerate(zip(*found, strict=True)):
            judge.add(f"result {i}", ours, theirs, truth)
    judge.verdict()


def test_training_files_and_what_is_left_to_sparsify(tmp_path):
    x, _, coder = problem()
    states = []
    for sae in (copy.deepcopy(coder), accelerate(copy.deepcopy(coder))):
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        for _ in range(5):
            sae.set_decoder_norm_to_unit_norm()
            sae(x).fvu.backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
        states.append(sae.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=3e-5)
    assert type(sae) is FastSparseCoder
    sae.save_to_disk(tmp_path / "coder")
    loaded = SparseCoder.load_from_disk(tmp_path / "coder")
    torch.testing.assert_close(loaded(x).sae_out, sae(x).sae_out)
    assert torch.equal(loaded.encode(x).pre_acts, sae.encode(x).pre_acts)


@pytest.mark.parametrize(
    "config, reason", [({"multi_topk": True}, "multi_topk"), ({"activation": "groupmax", "num_latents": 160}, "groupmax")]
)
def test_what_the_engine_does_not_cover_is_sparsifys_own_pass_with_the_reason_once(config, reason, caplog):
    torch.manual_seed(0)
    coder = SparseCoder(D, SparseCoderConfig(**{"num_latents": F, "k": K, **config}))
    ours, x = accelerate(copy.deepcopy(coder)), torch.randn(B, D)
    with caplog.at_level(logging.WARNING, "sae_fast"):
        for _ in range(2):
            assert torch.equal(ours(x).sae_out, coder(x).sae_out)
    said = [r.getMessage() for r in caplog.records if r.name == "sae_fast"]
    assert len(said) == 1 and reason in said[0]


def test_a_row_with_fewer_than_k_features_is_sparsifys_own():
    x, _, coder = problem()
    coder.encoder.bias.data.fill_(-100)
    ours = accelerate(copy.deepcopy(coder))
    assert torch.equal(ours(x).sae_out, coder(x).sae_out)


def test_a_subclass_with_formulas_of_its_own_is_refused():
    class Other(SparseCoder):
        pass

    with pytest.raises(ValueError, match="coder: got a Other, want sparsify's SparseCoder itself"):
        accelerate(Other(D, SparseCoderConfig(num_latents=F, k=K)))
