"""Layers that normalise each example: the formulas, the way back, and who carries it."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import assert_close_2x, assert_repeats, randn, same_bits
from problems.layers import KINDS, unlike
from torch import Tensor

import sae_fast as sf
from sae_fast.nn import normalize
from sae_fast.nn.normalize import ConstantNorm, LayerNorm, Scale

MAPS = [LayerNorm(), LayerNorm(eps=0.1), ConstantNorm(), Scale(by=3.0), Scale(by=3.0, out=0.5)]
D, F, BATCH = 19, 130, 60
kinds = pytest.mark.parametrize("cls", KINDS)
maps = pytest.mark.parametrize("how", [*MAPS, LayerNorm(undo=False)], ids=str)


def make(cls, how, dtype: torch.dtype = torch.float32, **options):
    return unlike(cls, D, F, normalize=how, dtype=dtype, **options)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    """Examples of very different lengths and means, one of them constant and one 0."""
    x = randn(BATCH, D, seed=9) * torch.logspace(-2, 2, BATCH)[:, None] + randn(BATCH, 1, seed=8)
    x[3], x[4] = 2.0, 0.0
    return x.to(dtype)


def formula(how, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x′, and scale and shift of the way back [B, 1], as the packages write them."""
    one = torch.ones_like(x[:, :1])
    if isinstance(how, LayerNorm):
        mu = x.mean(-1, keepdim=True)
        sigma = (x - mu).std(-1, keepdim=True)
        return (x - mu) / (sigma + how.eps), *((sigma, mu) if how.undo else (one, 0 * mu))
    if isinstance(how, ConstantNorm):
        coefficient = D**0.5 / x.norm(dim=-1, keepdim=True)
        return torch.where(x == 0, 0, x * coefficient), 1 / coefficient, 0 * one
    return x * how.by, one / (how.out or how.by), 0 * one


@kinds
@maps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encode_and_decode_are_the_formulas_within_twice_torchs_own_error(cls, how, dtype):
    sae, plain, x = make(cls, how), make(cls, None), batch(dtype)
    (mapped32, *back32), (mapped64, *back64) = formula(how, x.float()), formula(how, x.double())
    code = sae.encode_sparse(x)
    f = code.to_dense()
    wide = plain.double()
    assert 0 < code.nnz < f.numel() and torch.equal(f != 0, wide.encode(mapped64) != 0)
    assert_close_2x(f, make(cls, None).encode(mapped32), wide.encode(mapped64), "encode")
    given = f.double() @ sae.W_dec.detach().double() + sae.b_dec.detach().double()
    x32 = (f @ sae.W_dec.detach() + sae.b_dec.detach()) * back32[0] + back32[1]
    x64 = given * back64[0] + back64[1]
    assert_close_2x(sae.decode(code), x32, x64, "decode(code)")
    assert_close_2x(sae.decode(f, x), x32, x64, "decode(f, x)")
    assert_close_2x(sae(x), x32.to(dtype), x64, "forward")
    assert torch.isfinite(sae(x)).all() and sae(x).dtype == dtype
    assert_repeats(lambda: sae(x))


@kinds
@maps
def test_a_layer_of_16_bits_takes_statistics_in_float32(cls, how):
    sae, x = make(cls, how, torch.bfloat16), batch(torch.bfloat16)
    mapped, scale, shift = formula(how, x.double())
    f = sae.encode(x)
    assert same_bits(f, make(cls, None, torch.bfloat16).encode(mapped.bfloat16()))
    x_hat = (f.double() @ sae.W_dec.detach().double() + sae.b_dec.detach().double()) * scale + shift
    of_torch = ((f @ sae.W_dec.detach() + sae.b_dec.detach()) * scale.float() + shift.float()).bfloat16()
    assert_close_2x(sae(x), of_torch, x_hat)


@maps
def test_the_way_back_goes_with_the_rows_of_a_code(how):
    sae, x = make(sf.TopKSAE, how), batch()
    code, whole = sae.encode_sparse(x.view(6, 10, D)), sae(x)
    assert same_bits(sae.decode(code).view(BATCH, D), whole)
    parts = [code.of_rows(0, 7), code.of_rows(7, 7), code.of_rows(7, BATCH)]
    for part, rows in zip(parts, (whole[:7], whole[7:7], whole[7:]), strict=True):
        torch.testing.assert_close(sae.decode(part), rows, rtol=1e-4, atol=1e-4)
    assert same_bits(sae.decode(sf.SparseCode.cat(parts)), whole)
    twice = sae.decode(code.with_values(2 * code.values))
    torch.testing.assert_close(
        twice.view(BATCH, D), sae.decode(2 * code.to_dense().view(BATCH, F), x), rtol=1e-4, atol=1e-4
    )
    if how.undo:
        with pytest.raises(ValueError, match="codes: got some of a layer that normalises its input, and some not"):
            sf.SparseCode.cat([code.of_rows(0, 7), make(sf.TopKSAE, None).encode_sparse(x)])


@pytest.mark.parametrize("how", MAPS, ids=str)
def test_a_dense_code_wants_its_x(how):
    sae, x = make(sf.ReluSAE, how), batch()
    f = sae.encode(x)
    with pytest.raises(ValueError, match="x: got None, want the x of f, whose normalisation is undone, or the SparseCode"):
        sae.decode(f)
    with pytest.raises(ValueError, match=r"x: got shape \(59, 19\), want \[60, d_in\], as f"):
        sae.decode(f, x[1:])


@maps
def test_gradients_are_autograds_of_the_formula(how):
    sae, x = make(sf.ReluSAE, how, torch.float64), batch()[5:].double().requires_grad_()
    weights = torch.linspace(-1, 2, D, dtype=torch.float64)
    leaves = {"x": x, **dict(sae.named_parameters())}
    got = torch.autograd.grad((sae(x) * weights).sum(), list(leaves.values()))
    mapped, scale, shift = formula(how, x)
    x_hat = (torch.relu((mapped - sae.b_dec) @ sae.W_enc.T + sae.b_enc) @ sae.W_dec + sae.b_dec) * scale + shift
    wanted = torch.autograd.grad((x_hat * weights).sum(), list(leaves.values()))
    for name, g, w in zip(leaves, got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@kinds
@maps
def test_a_checkpoint_gives_the_same_layer_again(cls, how, tmp_path):
    sae, x = make(cls, how, d_out=7, skip=True), batch()
    sf.save(sae, tmp_path / "own")
    again = sf.load(tmp_path / "own")
    assert again.normalize == how and repr(again) == repr(sae) and same_bits(again(x), sae(x))


@maps
def test_the_path_around_the_features_takes_x_as_it_is(how):
    sae, x = make(sf.ReluSAE, how, skip=True), batch()
    around = x.double() @ sae.W_skip.detach().double().T
    torch.testing.assert_close(sae(x).double(), sae.decode(sae.encode_sparse(x)).double() + around, rtol=1e-4, atol=1e-4)


def test_calibration_sees_what_the_encoder_sees():
    sae, x = make(sf.ReluSAE, LayerNorm()), randn(500, D, seed=1) * 100 + 7
    sae.calibrate_(x, l0=12)
    assert abs(float(sae.encode_sparse(x).l0().double().mean()) - 12) < 0.5


def test_it_compiles():
    sae, x = make(sf.ReluSAE, LayerNorm()), batch()
    assert same_bits(torch.compile(sae, backend="eager")(x), sae(x))


@kinds
@maps
def test_training_and_the_formats_that_hold_none_refuse_it(cls, how, tmp_path):
    sae = make(cls, how)
    for to in ("dictionary_learning", "sparsify", "saebench"):
        with pytest.raises(ValueError, match=f"{cls.__name__} with normalize = {type(how).__name__}|cannot hold"):
            sf.interop.save(sae, tmp_path / to, to)
        assert not (tmp_path / to).exists()
    if cls in (sf.GatedSAE, sf.ReluSAE):
        with pytest.raises(ValueError, match="want one without to train"):
            sae.loss(batch(), 1.0)
        with pytest.raises(ValueError, match="want one without to train"):
            sf.Trainer(sae, l1_coefficient=1.0)


@pytest.mark.parametrize(
    "value, said",
    [
        ("layer_norm", "normalize: got 'layer_norm', want one of ConstantNorm, LayerNorm, Scale, or None"),
        ({"name": "Whitening"}, "normalize: got .*Whitening.*, want one of"),
        ({"name": ["LayerNorm"]}, "normalize: got .*, want one of"),
        ({"name": "LayerNorm", "eps": 0}, "normalize: eps: got 0, want a positive number"),
        ({"name": "LayerNorm", "epsilon": 1}, "normalize: .*epsilon"),
        ({"name": "Scale", "by": float("inf")}, "normalize: by: got inf, want a positive number"),
        ({"name": "Scale", "out": 0}, "normalize: out: got 0, want a positive number"),
        ({"name": "ConstantNorm", "undo": 1}, "normalize: undo: got 1, want True or False"),
    ],
)
def test_what_is_none_is_named(value, said):
    with pytest.raises(ValueError, match=said):
        sf.ReluSAE(D, F, normalize=value)


def test_a_description_is_json_and_makes_it_again():
    for how in MAPS:
        assert normalize.made(json.loads(json.dumps(normalize.describe(how)))) == how
    with pytest.raises(ValueError, match="normalize: got LayerNorm with d_in = 1, want at least 2"):
        sf.ReluSAE(1, F, normalize=LayerNorm())


def test_a_scale_of_the_activations_beside_it_is_refused(tmp_path):
    sf.save(make(sf.ReluSAE, LayerNorm()), tmp_path / "own")
    with pytest.raises(ValueError, match=r"ReluSAE with normalize = LayerNorm.*, want one without to scale it"):
        sf.load(tmp_path / "own", activation_scale=2.0)
