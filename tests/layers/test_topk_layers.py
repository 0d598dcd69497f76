"""TopKSAE and BatchTopKSAE: what they compute, their groups and threshold, and what a layer promises besides numbers."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from helpers import assert_close_2x, assert_is_code, assert_repeats, assert_same_bits, randn, same_bits, strided
from torch import Tensor

import sae_fast as sf

CLASSES = [sf.TopKSAE, sf.BatchTopKSAE]
classes = pytest.mark.parametrize("cls", CLASSES)
SIZES = [10, 30, 90]


def make(cls, k: int = 7, dtype: torch.dtype = torch.float32, **options):
    """A layer d 19, F 130 with random parameters, and an input [33, 19]."""
    sae = cls(19, 130, k, dtype=dtype, seed=0, **options)
    with torch.no_grad():
        for i, p in enumerate([sae.W_enc, sae.W_dec]):
            p.mul_(0.5 + randn(130, 1, seed=i).abs())
        sae.b_enc.copy_(0.2 * randn(130, seed=2))
        sae.b_dec.copy_(0.1 * randn(19, seed=3))
    return sae, randn(33, 19, seed=4)


def plain(sae, x: Tensor, dtype: torch.dtype) -> Tensor:
    """f [B, F], from the formulas."""
    W, b_enc, b_dec = (p.detach().to(dtype) for p in (sae.W_enc, sae.b_enc, sae.b_dec))
    x = x.to(dtype)
    pi = torch.relu((x - b_dec if sae.apply_b_dec_to_input else x) @ W.T + b_enc)
    if isinstance(sae, sf.BatchTopKSAE) and sae.threshold >= 0:
        f = pi * (pi > sae.threshold)
    else:
        flat = pi if isinstance(sae, sf.TopKSAE) else pi.reshape(1, -1)
        top = flat.topk(sae.k if isinstance(sae, sf.TopKSAE) else int(sae.k * x.shape[0]), dim=1)
        f = torch.zeros_like(flat).scatter_(1, top.indices, top.values).view_as(pi)
    f[:, sum((sae.group_sizes or [sae.d_sae])[: sae.active_groups]) :] = 0
    return f


def decoded(sae, f: Tensor) -> Tensor:
    return f @ sae.W_dec.detach().to(f.dtype) + sae.b_dec.detach().to(f.dtype)


# ---- Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, threshold", [(sf.TopKSAE, None), (sf.BatchTopKSAE, None), (sf.BatchTopKSAE, 0.0), (sf.BatchTopKSAE, 0.7)]
)
@pytest.mark.parametrize("active", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_encode_decode_and_forward_are_the_formulas_within_twice_torchs_own_error(cls, threshold, active, dtype):
    sae, x = make(cls, group_sizes=SIZES)
    sae.active_groups = active
    if threshold is not None:
        sae.threshold.fill_(threshold)
    x = x.to(dtype)
    f32, f64 = (plain(sae, x, t) for t in (torch.float32, torch.float64))
    f, code = sae.encode(x), sae.encode_sparse(x)
    assert_is_code(code)
    assert f.dtype == torch.float32 and torch.equal(f != 0, f64 != 0) and f.any()
    assert_close_2x(f, f32, f64, "encode")
    assert torch.equal(code.to_dense(), f) and torch.equal(code.l0(), (f64 != 0).sum(1))
    x32, x64 = decoded(sae, f32), decoded(sae, f64)
    assert_close_2x(sae.decode(code), x32, x64, "decode")
    assert sae(x).dtype == dtype
    assert_close_2x(sae(x), x32.to(dtype), x64, "forward")


@classes
def test_without_b_dec_at_the_input(cls):
    sae, x = make(cls, apply_b_dec_to_input=False)
    assert_close_2x(sae.encode(x), plain(sae, x, torch.float32), plain(sae, x, torch.float64))


@classes
@pytest.mark.parametrize("k", [1, 130])
def test_the_least_and_the_largest_k(cls, k):
    sae, x = make(cls, k)
    assert_close_2x(sae.encode(x), plain(sae, x, torch.float32), plain(sae, x, torch.float64))
    if k == 1 and cls is sf.TopKSAE:
        assert torch.equal(sae.encode_sparse(x).l0(), torch.ones(33, dtype=torch.int64))


def test_a_batch_of_batch_topk_holds_k_an_example_on_average_and_shares_them_as_they_fall():
    sae, x = make(sf.BatchTopKSAE)
    l0 = sae.encode_sparse(x).l0()
    assert l0.sum() == 7 * 33 and l0.min() < 7 < l0.max()


def test_by_the_threshold_an_example_does_not_depend_on_the_others():
    sae, x = make(sf.BatchTopKSAE)
    largest = sae.encode(x)
    assert not torch.equal(sae.encode(x[:5]), largest[:5]), "the largest of five are others"
    sae.threshold.fill_(0.6)
    whole = sae.encode(x)
    assert same_bits(sae.encode(x[:5]), whole[:5])
    assert_same_bits(sae.encode_sparse(x, use_threshold=True), sae.encode_sparse(x))
    assert same_bits(sae.encode(x, use_threshold=False), largest)
    sae.threshold.fill_(-1)
    assert same_bits(sae.encode(x), largest)
    with pytest.raises(ValueError, match="use_threshold: got True, want a threshold"):
        sae.encode(x, use_threshold=True)


def test_a_threshold_of_minus_one_times_anything_is_unset_and_zero_is_a_threshold():
    sae, x = make(sf.BatchTopKSAE)
    assert sae.threshold.shape == () and float(sae.threshold) == -1 and not sae.has_threshold()
    sae.threshold.zero_()
    assert sae.has_threshold() and sae.encode_sparse(x).nnz == int((plain(sae, x, torch.float32) > 0).sum()) > 7 * 33


# ---- Groups -----------------------------------------------------------------------------------------------------------


@classes
@pytest.mark.parametrize("sizes", [None, [130], SIZES, [1] * 130])
def test_prefixes_decode_the_first_groups(cls, sizes):
    sae, x = make(cls, group_sizes=sizes)
    x = x.reshape(3, 11, 19)
    code = sae.encode_sparse(x)
    f = code.to_dense()
    got = sae.decode_prefixes(code)
    groups = 1 if sizes is None else len(sizes)
    assert sae.active_groups == groups and got.shape == (groups, 3, 11, 19)
    ends = torch.tensor(sizes or [130]).cumsum(0).tolist()
    masked = torch.stack([f * (torch.arange(130) < end) for end in ends])
    x32, x64 = decoded(sae, masked), decoded(sae, masked.double())
    assert_close_2x(got, x32, x64, "of a code")
    assert_close_2x(sae.decode_prefixes(f), x32, x64, "of a dense f")
    assert_close_2x(got[-1], x32[-1], decoded(sae, f.double()))


@classes
def test_groups_that_are_off_take_part_in_the_choice(cls):
    sae, x = make(cls, group_sizes=SIZES)
    with torch.no_grad():
        sae.b_enc[[39, 40]] += 5  # the last that is on, and the first that is off
    every = sae.encode_sparse(x)
    sae.active_groups = 2
    some = sae.encode_sparse(x)
    assert_same_bits([every.indices, every.u], [some.indices, some.u])
    off = some.indices >= 40
    assert off.any() and not some.values[:, off].any() and same_bits(some.values[:, ~off], every.values[:, ~off])
    some.magnitudes.sum().backward()
    assert not sae.b_enc.grad[40:].any() and sae.b_enc.grad[:40].any()


@classes
@pytest.mark.parametrize("bad", [0, 4, -1, 1.0, True, None])
def test_an_impossible_number_of_active_groups(cls, bad):
    sae, _ = make(cls, group_sizes=SIZES)
    with pytest.raises(ValueError, match=r"active_groups: got .*, want an int from 1 to the number of groups, 3"):
        sae.active_groups = bad
    assert sae.active_groups == 3


@classes
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(k=0), "k: got 0, want an? (int|number) with .* k ≤ d_sae = 130"),
        (dict(k=131), "k: got 131"),
        (dict(k=True), "k: got True"),
        (dict(k=float("nan")), "k: got nan"),
        (dict(k="7"), "k: got '7'"),
        (dict(k=np.array([7])), "k: got array"),
        (dict(d_sae=True), "d_sae: got True, want a positive int"),
        (dict(d_in=np.float64(19)), "d_in: got np.float64"),
        (dict(seed="3"), "seed: got '3', want an int"),
        (dict(seed=2**64), "seed: got 18446744073709551616"),
        (dict(apply_b_dec_to_input="no"), "apply_b_dec_to_input: got 'no', want True or False"),
        (dict(dtype="float32"), "dtype: got 'float32', want a floating-point dtype"),
        (dict(dtype=torch.int8), "dtype: got torch.int8"),
        (dict(group_sizes=[]), r"group_sizes: got \[\], want positive ints whose sum is d_sae = 130"),
        (dict(group_sizes=[130, 0]), "group_sizes: got"),
        (dict(group_sizes=[100, 29]), "group_sizes: got"),
        (dict(group_sizes=[65.0, 65.0]), "group_sizes: got"),
        (dict(group_sizes=[140, -10]), "group_sizes: got"),
        (dict(group_sizes=["40", 90]), "group_sizes: got"),
        (dict(group_sizes="130"), "group_sizes: got '130'"),
        (dict(group_sizes=np.array(130)), r"group_sizes: got array\(130\)"),
        (dict(group_sizes=np.array([[40, 90]])), "group_sizes: got array"),
        (dict(group_sizes=[True, 129]), "group_sizes: got"),
        (dict(group_sizes=[40, 90], active_groups=3), "active_groups: got 3, want an int from 1 to .* 2"),
    ],
)
def test_impossible_arguments(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**{"d_in": 19, "d_sae": 130, "k": 7, **arguments})


@classes
def test_numpys_numbers_are_numbers_and_come_out_as_pythons(cls):
    sizes = np.array(SIZES)
    sae = cls(np.int64(19), np.int32(130), np.uint8(7), seed=np.int64(0), group_sizes=sizes, active_groups=np.int8(2))
    plain = cls(19, 130, 7, seed=0, group_sizes=SIZES, active_groups=2)
    assert json.dumps(sae.options()) == json.dumps(plain.options()) and sae.active_groups == 2
    assert type(sae.d_in) is type(sae.d_sae) is int and same_bits(sae.W_enc, plain.W_enc)
    sae.active_groups = np.int64(3)
    assert sae.options() == {"k": 7, "group_sizes": SIZES}


def test_k_is_whole_but_for_a_batch():
    with pytest.raises(ValueError, match=r"k: got 2\.0, want an int"):
        sf.TopKSAE(19, 130, 2.0)
    assert sf.BatchTopKSAE(19, 130, np.float32(2)).options() == {"k": 2}
    sae, x = make(sf.BatchTopKSAE, 1.5)
    assert sae.encode_sparse(x).nnz == 49  # ⌊1.5 · 33⌋
    assert_close_2x(sae.encode(x), plain(sae, x, torch.float32), plain(sae, x, torch.float64))
    sae.threshold.fill_(0.7)
    assert_close_2x(sae.encode(x), plain(sae, x, torch.float32), plain(sae, x, torch.float64))


@classes
def test_on_meta_nothing_is_drawn_or_held(cls):
    sae = cls(10**6, 10**8, 7, device="meta")
    assert sae.W_enc.shape == (10**8, 10**6) and all(t.is_meta for t in sae.state_dict().values())


@classes
def test_a_foreign_code_has_no_prefixes(cls):
    sae, _ = make(cls)
    for f in (sf.ReluSAE(19, 7).encode_sparse(randn(2, 19)), randn(3, 7), None):
        with pytest.raises(ValueError, match="f: got"):
            sae.decode_prefixes(f)


# ---- What a layer promises --------------------------------------------------------------------------------------------


@classes
@pytest.mark.parametrize("threshold", [-1.0, 0.4])
def test_leading_dimensions_and_strides_do_not_matter(cls, threshold):
    sae, x = make(cls)
    if cls is sf.BatchTopKSAE:
        sae.threshold.fill_(threshold)
    code = sae.encode_sparse(x.reshape(3, 1, 11, 19))
    assert code.shape == (3, 1, 11, 130)
    assert same_bits(code.to_dense().reshape(33, 130), sae.encode(x))
    assert same_bits(sae(x.reshape(3, 1, 11, 19)).reshape(33, 19), sae(x))
    assert same_bits(sae(strided(x)), sae(x))
    assert sae.encode_sparse(x[:0]).nnz == 0 and sae(x[:0]).shape == (0, 19) and sae(x[0]).shape == (19,)


@classes
def test_repeats_and_frozen_change_no_bit(cls):
    sae, x = make(cls)
    assert_repeats(lambda: sae.encode_sparse(x))
    outside = sae.encode_sparse(x)
    with sae.frozen():
        for _ in range(2):
            assert_same_bits(outside, sae.encode_sparse(x))


@classes
@pytest.mark.parametrize("x", [torch.zeros(3, 18), torch.zeros(3, 19, dtype=torch.int64), torch.full((3, 19), torch.nan)])
def test_bad_input_is_a_value_error(cls, x):
    with pytest.raises(ValueError, match="x: got"):
        make(cls)[0](x)


@classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [None, SIZES])
def test_a_saved_layer_comes_back_bit_for_bit(cls, dtype, sizes, tmp_path):
    sae, x = make(cls, 5, dtype, group_sizes=sizes, apply_b_dec_to_input=False)
    sae.active_groups = 1 if sizes is None else 2
    if cls is sf.BatchTopKSAE:
        sae.threshold.fill_(0.3)
    sf.save(sae, tmp_path)
    again = sf.load(tmp_path)
    assert type(again) is cls and again.options() == sae.options() and again.options()["k"] == 5
    assert again.group_sizes == (None if sizes is None else tuple(sizes)) and not again.apply_b_dec_to_input
    assert_same_bits(list(sae.state_dict().values()), list(again.state_dict().values()))
    assert same_bits(again(x.to(dtype)), sae(x.to(dtype)))
    assert "k=5" in repr(again) and ("group_sizes=[10, 30, 90]" in repr(again)) == (sizes is not None)


@classes
def test_a_copy_computes_the_same(cls):
    sae, x = make(cls, group_sizes=SIZES)
    sae.active_groups = 2
    again = copy.deepcopy(sae)
    assert again.active_groups == 2 and same_bits(again(x), sae(x))


def test_the_threshold_stays_float32_and_exact():
    sae, x = make(sf.BatchTopKSAE)
    sae.threshold.fill_(0.3)
    before = sae.threshold.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        sae.to(dtype)
        assert sae.W_enc.dtype == dtype and same_bits(sae.threshold, before)
        assert sae(x.to(dtype)).dtype == dtype
    meta = sf.BatchTopKSAE(19, 130, 7, device="meta")
    assert meta.to_empty(device="cpu").threshold.dtype == torch.float32
    sae.load_state_dict(make(sf.BatchTopKSAE)[0].state_dict())
    assert not sae.has_threshold()


@classes
def test_they_train_with_their_groups_as_prefixes(cls):
    sae, x = make(cls, group_sizes=SIZES)
    trainer = sf.Trainer(sae, unit_start=False)
    assert trainer.state.objective.prefixes.group_sizes == tuple(SIZES)
    x_hat = sae.decode_prefixes(sae.encode(x, use_threshold=False) if cls is sf.BatchTopKSAE else sae.encode(x))
    wanted = (x_hat - x).pow(2).sum(-1).mean()
    assert trainer.step(x).reconstruction == pytest.approx(wanted.item(), rel=1e-5)


@classes
@pytest.mark.parametrize("threshold", [-1.0, 0.4])
@pytest.mark.parametrize("active", [1, 3])
def test_forward_compiles_as_one_graph(cls, threshold, active):
    sae, x = make(cls, group_sizes=SIZES)
    sae.active_groups = active
    if cls is sf.BatchTopKSAE:
        sae.threshold.fill_(threshold)
    torch._dynamo.reset()
    assert same_bits(torch.compile(sae, backend="aot_eager", fullgraph=True)(x), sae(x))


@classes
def test_gradients_reach_every_parameter(cls):
    sae, x = make(cls)
    sae(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in sae.parameters())


# ---- The largest of any sign, and in magnitude --------------------------------------------------------------------------


def signed(sae, x: Tensor, dtype: torch.dtype) -> Tensor:
    """f [B, F] of TopKSAE(largest="any" | "abs"), from the formulas."""
    pi = (x.to(dtype) - sae.b_dec.detach().to(dtype)) @ sae.W_enc.detach().to(dtype).T + sae.b_enc.detach().to(dtype)
    top = (pi.abs() if sae.largest == "abs" else pi).topk(sae.k, dim=1).indices
    return torch.zeros_like(pi).scatter_(1, top, pi.gather(1, top))


@pytest.mark.parametrize("largest", ["any", "abs"])
@pytest.mark.parametrize("shift", [0.0, -3.0, -9.0], ids=["many positive", "few positive", "none positive"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_negative_ones_are_kept(backend, shift, largest):
    sae, x = make(sf.TopKSAE, largest=largest)
    with torch.no_grad():
        sae.b_enc += shift
    f32, f64 = (signed(sae, x, dtype) for dtype in (torch.float32, torch.float64))
    assert bool((f64 < 0).any()) or (largest == "any" and shift == 0)
    with sf.use_backend(backend):
        f, code, x_hat = sae.encode(x), sae.encode_sparse(x), sae(x)
    assert torch.equal(f != 0, f64 != 0) and torch.equal(code.l0(), torch.full((33,), 7))
    assert_close_2x(f, f32, f64, "encode")
    assert_close_2x(x_hat, decoded(sae, f32), decoded(sae, f64), "forward")


@pytest.mark.parametrize("largest", ["any", "abs"])
def test_such_a_layer_is_saved_and_does_not_train_yet(largest, tmp_path):
    sae, x = make(sf.TopKSAE, largest=largest, group_sizes=SIZES)
    sf.save(sae, tmp_path / "own")
    again = sf.load(tmp_path / "own")
    assert again.largest == largest and repr(again) == repr(sae) and same_bits(again(x), sae(x))
    said = f"TopKSAE with largest = '{largest}', want one without to"
    with pytest.raises(ValueError, match=f"{said} train"):
        sf.Trainer(sae, objective=sf.objectives.TopK())
    for format in ("dictionary_learning", "saelens", "sparsify"):
        with pytest.raises(ValueError, match=f"{said} save it as {format}"):
            sf.interop.save(sae, tmp_path / format, format)
    with pytest.raises(ValueError, match="largest: got 'all', want one of positive, any, abs"):
        make(sf.TopKSAE, largest="all")


def test_a_batch_topk_of_a_fractional_k_trains():
    sae, _ = make(sf.BatchTopKSAE, 2.5)
    trainer = sf.Trainer(sae, objective=sf.objectives.TopK())
    for step in range(3):
        log = trainer.step(randn(33, 19, seed=step))
        assert log.l0 == pytest.approx(82 / 33)
