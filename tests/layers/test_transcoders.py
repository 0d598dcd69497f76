"""Transcoders: a width of their own for what they give, and a linear path around the features."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close_2x, assert_repeats, randn, same_bits
from problems.layers import KINDS, unlike
from torch import Tensor

import sae_fast as sf
from sae_fast.nn.scale import scale_input_

D, F, BATCH = 19, 130, 60
kinds = pytest.mark.parametrize("cls", KINDS)
widths = pytest.mark.parametrize("d_out", [7, D, 40])
skips = pytest.mark.parametrize("skip", [False, True])


def make(cls, d_out: int | None = D, skip: bool = True, dtype: torch.dtype = torch.float32, **options):
    return unlike(cls, D, F, d_out=d_out, skip=skip, dtype=dtype, **options)


def whole(sae, f: Tensor, x: Tensor) -> Tensor:
    """x̂, from the formula in the dtype of f."""
    W_dec, b_dec = sae.W_dec.detach().to(f.dtype), sae.b_dec.detach().to(f.dtype)
    x_hat = f @ W_dec + b_dec
    return x_hat if sae.W_skip is None else x_hat + x.to(f.dtype) @ sae.W_skip.detach().to(f.dtype).T


@kinds
@widths
@skips
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_it_gives_is_the_formula_within_twice_torchs_own_error(cls, d_out, skip, dtype):
    sae, x = make(cls, d_out, skip), randn(3, 20, D, seed=9).to(dtype)
    plain = type(sae)(D, F, **{"k": 9} if hasattr(sae, "k") else {}, apply_b_dec_to_input=False)
    plain.load_state_dict(
        {n: t for n, t in sae.state_dict().items() if n not in ("W_dec", "b_dec", "W_skip")}, strict=False
    )
    assert not sae.apply_b_dec_to_input and sae.W_dec.shape == (F, d_out) and sae.b_dec.shape == (d_out,)
    code = sae.encode_sparse(x)
    assert code.nnz > 0 and same_bits(code.to_dense(), plain.encode(x)), "the code is that of an SAE of the same encoder"
    f = code.to_dense().double()
    assert sae(x).shape == (3, 20, d_out) and sae(x).dtype == dtype
    assert_close_2x(sae(x), whole(sae, f.float(), x.float()).to(dtype), whole(sae, f, x), "forward")
    for given in (code, code.to_dense()):
        assert_close_2x(sae.decode(given, x), whole(sae, f.float(), x.float()), whole(sae, f, x), "decode with x")
        of_features = [
            f.to(t) @ sae.W_dec.detach().to(t) + sae.b_dec.detach().to(t) for t in (torch.float32, torch.float64)
        ]
        assert_close_2x(sae.decode(given), *of_features, "decode")
    assert_repeats(lambda: sae(x))


@kinds
def test_of_16_bits_within_twice_torchs_own_error(cls):
    sae, x = make(cls, 7, True, torch.bfloat16), randn(BATCH, D, seed=9).bfloat16()
    f = sae.encode(x)
    assert f.any() and sae(x).dtype == torch.bfloat16
    assert_close_2x(sae(x), whole(sae, f, x), whole(sae, f.double(), x), "forward")


@pytest.mark.parametrize("cls", [sf.TopKSAE, sf.BatchTopKSAE])
def test_of_prefixes_each_has_the_path_around_the_features(cls):
    sae, x = make(cls, 7, True, group_sizes=[30, 100]), randn(BATCH, D, seed=9)
    code = sae.encode_sparse(x)
    parts = sae.decode_prefixes(code, x)
    first = code.with_values(torch.where(code.indices < 30, code.values, 0))
    assert parts.shape == (2, BATCH, 7)
    torch.testing.assert_close(parts, torch.stack([sae.decode(first, x), sae.decode(code, x)]))


def test_gradients_are_autograds_of_the_formula():
    sae, x = make(sf.ReluSAE, 7, dtype=torch.float64), randn(BATCH, D, seed=9).double().requires_grad_()
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    leaves = {"x": x, **dict(sae.named_parameters())}
    got = torch.autograd.grad((sae(x) * weights).sum(), list(leaves.values()))
    x_hat = torch.relu(x @ sae.W_enc.T + sae.b_enc) @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T
    wanted = torch.autograd.grad((x_hat * weights).sum(), list(leaves.values()))
    for name, g, w in zip(leaves, got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@kinds
@widths
@skips
def test_a_checkpoint_gives_the_same_layer_again(cls, d_out, skip, tmp_path):
    sae, x = make(cls, d_out, skip), randn(BATCH, D, seed=9)
    sf.save(sae, tmp_path / "own")
    again = sf.load(tmp_path / "own")
    assert repr(again) == repr(sae) and same_bits(again(x), sae(x))
    assert (again.d_out, again.W_skip is not None, again.apply_b_dec_to_input) == (d_out, skip, False)


def test_the_jumprelu_form_of_a_gated_transcoder_is_one():
    sae, x = make(sf.GatedSAE, 7), randn(BATCH, D, seed=9)
    torch.testing.assert_close(sae.to_jumprelu()(x), sae(x), rtol=1e-4, atol=1e-5)


def test_b_dec_is_subtracted_where_it_is_asked_for_and_fits():
    assert make(sf.ReluSAE, None).apply_b_dec_to_input and not make(sf.ReluSAE, D).apply_b_dec_to_input
    assert make(sf.ReluSAE, D, apply_b_dec_to_input=True).apply_b_dec_to_input
    with pytest.raises(
        ValueError, match="apply_b_dec_to_input: got True with d_out = 7, want False unless it is d_in = 19"
    ):
        make(sf.ReluSAE, 7, apply_b_dec_to_input=True)


@kinds
def test_what_is_wrong_is_named(cls):
    sae, x = make(cls, 7), randn(BATCH, D, seed=9)
    code = sae.encode_sparse(x)
    with pytest.raises(ValueError, match=r"x: got shape \(59, 19\), want \[60, d_in\], as f"):
        sae.decode(code, x[1:])
    with pytest.raises(ValueError, match="d_out: got 0, want a positive int"):
        make(cls, 0)
    with pytest.raises(ValueError, match="skip: got 1, want True or False"):
        make(cls, skip=1)


@kinds
@pytest.mark.parametrize(
    "options, said", [((7, False), "d_out = 7"), ((D, True), "W_skip"), ((7, True), "d_out = 7 and W_skip")]
)
def test_training_and_the_formats_that_hold_none_refuse_it(cls, options, said, tmp_path):
    sae = make(cls, *options)
    for to in ("dictionary_learning", "saelens", "saebench"):
        with pytest.raises(ValueError, match=f"{cls.__name__} with {said}, want one without to save it as|cannot hold"):
            sf.interop.save(sae, tmp_path / to, to)
    objective = sf.objectives.TopK() if hasattr(sae, "k") else sf.objectives.Gated(1.0) if cls is sf.GatedSAE else None
    if objective is None:
        objective = sf.objectives.L1(1.0) if cls is sf.ReluSAE else sf.objectives.L0(1.0)
    with pytest.raises(ValueError, match=f"{cls.__name__} with {said}, want one without to train"):
        sf.Trainer(sae, objective=objective)
    with pytest.raises(ValueError, match=f"{cls.__name__} with {said}, want one without to train"):
        sae.loss(randn(BATCH, D), objective)
    if cls in (sf.GatedSAE, sf.ReluSAE):
        with pytest.raises(ValueError, match=f"with {said}, want one without to train"):
            sae.loss(randn(BATCH, D), 1.0)


@kinds
@widths
@pytest.mark.parametrize("out", [None, 2.0])
def test_a_scale_of_its_input_is_one_of_the_path_around_the_features_too(cls, d_out, out):
    sae, scaled, x = make(cls, d_out), make(cls, d_out), randn(BATCH, D, seed=9)
    scale_input_(scaled, 4.0, out)
    assert same_bits(scaled.encode(x), sae.encode(4 * x)), "a power of two rounds nothing"
    assert same_bits(scaled(x), sae(4 * x) / (out or 4.0))
