"""calibrate_: encoder biases from a batch, so that a chosen number of features fires."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same_bits, raises_and_changes_nothing, randn, same_bits

import sae_fast as sf

CLASSES = [sf.GatedSAE, sf.ReluSAE, sf.JumpReluSAE]
classes = pytest.mark.parametrize("cls", CLASSES)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # these problems are small: threads would only wait for each other


def bias_of(sae):
    return sae.b_gate if isinstance(sae, sf.GatedSAE) else sae.b_enc


def measured(sae, x) -> float:
    return float(sae.encode_sparse(x).l0().double().mean())


def make(cls, d=16, F=256, seed=0, **kwargs):
    """A layer whose features differ in scale and whose b_dec is not zero: quantiles, not a rule of thumb, are needed."""
    sae = cls(d, F, seed=seed, **kwargs)
    with torch.no_grad():
        sae.W_enc.mul_(torch.logspace(-1, 1, F)[:, None])
        sae.b_dec.copy_(randn(d, seed=1))
    return sae


def batch(B=512, d=16, seed=0):
    return randn(B, d, seed=seed) * torch.linspace(0.2, 3, d) + 1.5


@classes
@pytest.mark.parametrize("l0", [0.5, 1, 3, 7.5, 32, 100.25, 250, 256])
def test_the_measured_l0_is_the_requested_one(cls, l0):
    sae, x = make(cls), batch()
    sae.calibrate_(x, l0)
    assert measured(sae, x) == pytest.approx(l0, rel=0.05)


@classes
@pytest.mark.parametrize("B", [2, 5, 16, 63])
@pytest.mark.parametrize("l0", [1.5, 4])
def test_a_batch_smaller_than_one_firing_per_feature_works_too(cls, B, l0):
    assert l0 * B < 256
    sae, x = make(cls), batch(B)
    sae.calibrate_(x, l0)
    assert measured(sae, x) == pytest.approx(l0, rel=0.05, abs=1 / B)


def test_the_firings_are_spread_evenly_over_the_features():
    for l0, B in ((7.5, 512), (3, 100), (1, 64)):
        sae, x = make(sf.GatedSAE), batch(B)
        sae.calibrate_(x, l0)
        share = l0 * B / sae.d_sae
        counts = (sae.encode(x) > 0).sum(0)
        assert int(counts.min()) >= int(share) and int(counts.max()) <= int(share) + 1, (l0, B)


def test_features_beyond_one_block_are_calibrated_like_the_first():
    sae, x = make(sf.ReluSAE, F=2500), batch(200)
    sae.calibrate_(x, 50)
    assert measured(sae, x) == pytest.approx(50, rel=0.05)
    for part in (slice(0, 1024), slice(1024, 2048), slice(2048, 2500)):
        assert (sae.encode(x)[:, part] > 0).float().mean() == pytest.approx(50 / 2500, rel=0.05)


def test_the_two_biases_of_a_gated_layer_become_equal_and_nothing_else_changes():
    sae = make(sf.GatedSAE)
    before = copy.deepcopy(sae)
    sae.calibrate_(batch(), 8)
    assert same_bits(sae.b_mag, sae.b_gate)
    assert sae.b_mag.data_ptr() != sae.b_gate.data_ptr()
    assert not torch.equal(sae.b_gate, before.b_gate)
    for name in ("W_enc", "W_dec", "b_dec", "r_mag"):
        assert same_bits(sae.get_parameter(name), before.get_parameter(name)), name


@classes
def test_the_former_biases_do_not_matter_and_the_answer_repeats(cls):
    sae, x = make(cls), batch()
    other = copy.deepcopy(sae)
    with torch.no_grad():
        bias_of(other).fill_(3.0)
    sae.calibrate_(x, 8)
    other.calibrate_(x, 8)
    assert_same_bits(bias_of(sae), bias_of(other))


@classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_leading_dimensions_strides_and_dtype_calibrate_like_the_rows(cls, dtype):
    sae, x = make(cls), batch().to(dtype)
    twin = copy.deepcopy(sae)
    sae.calibrate_(x.float(), 8)
    twin.calibrate_(x.reshape(4, 128, 16).transpose(0, 1).contiguous().transpose(0, 1), 8)
    assert_same_bits(bias_of(sae), bias_of(twin))
    assert measured(twin, x) == pytest.approx(8, rel=0.05)


@classes
def test_a_float64_layer_is_calibrated_in_float64(cls):
    sae, x = make(cls, dtype=torch.float64), batch().double()
    sae.calibrate_(x, 8)
    assert bias_of(sae).dtype == torch.float64 and measured(sae, x) == pytest.approx(8, rel=0.05)


def test_a_jumprelu_layer_with_thresholds_fires_as_often_as_asked():
    sae, x = make(sf.JumpReluSAE), batch()
    with torch.no_grad():
        sae.threshold.copy_(torch.linspace(-0.5, 2, 256))
    sae.calibrate_(x, 8)
    assert measured(sae, x) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("scale", [0.5, 2.0], ids=["r_mag < 0", "r_mag > 0"])
def test_calibration_opens_the_requested_number_of_gates_whatever_the_magnitude_scale(scale):
    sae, x = make(sf.GatedSAE), batch()
    with torch.no_grad():
        sae.r_mag.fill_(scale).log_()
    sae.calibrate_(x, 8)
    assert sae.encode_sparse(x).nnz / len(x) == pytest.approx(8, rel=0.05)


def test_calibration_works_within_autograd_and_leaves_no_graph():
    sae = make(sf.GatedSAE)
    sae.calibrate_(batch().requires_grad_(), 8)
    assert sae.b_gate.is_leaf and sae.b_gate.requires_grad and sae.b_gate.grad is None
    sae.loss(batch(), 1.0).total.backward()
    assert sae.b_gate.grad is not None


@classes
@pytest.mark.parametrize("l0", [0, -1, 256.5, float("nan"), float("inf")])
def test_an_l0_out_of_range_is_refused_and_changes_nothing(cls, l0):
    sae, x = make(cls), batch()
    with raises_and_changes_nothing(r"^l0: got .*0 < l0 ≤ d_sae = 256", list(sae.parameters())):
        sae.calibrate_(x, l0)


@classes
def test_a_single_example_has_no_quantiles_and_is_refused(cls):
    sae, x = make(cls), batch()
    for too_few in (x[:1], x[0], x[:0]):
        with raises_and_changes_nothing(r"^x: got [01] examples, want at least 2", list(sae.parameters())):
            sae.calibrate_(too_few, 8)
