"""ops.decode_loss: the losses of equation (8) on a code, the residuals, and the gradients of the code's values."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from helpers import (
    Judge,
    assert_repeats,
    assert_same_bits,
    both,
    corrupt_codes,
    grid,
    make_inputs,
    opcheck,
    raises_and_changes_nothing,
    randn,
    random_code,
    rows_of,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import bodies
from problems.bodies import moved
from problems.decode_loss import PREFIXES, inputs, judge_one, plain

from sae_fast import ops, use_backend
from sae_fast.ops import crossovers


@cache
def trials_of(shape: tuple, V: int, normaliser: float, dtype: torch.dtype, kind: str, zeros: bool) -> list:
    """(code, arguments, options, torch's results, float64's).  A trial gives three losses only, so there are several: by
    seed, or by blocks of rows of a large batch."""
    trials, (B, d, F) = [], shape
    prefixes = PREFIXES[kind](F)
    weights = prefixes and randn(len(prefixes), seed=7).abs().to(dtype)
    options = dict(prefixes=prefixes, prefix_weights=weights, zeros=zeros)
    for seed in range(64 if B * d * F < 10_000 else 12) if B <= 3 else range(3) if B < 32 else [0]:
        code, *arguments = moved(list(inputs(B, d, F, V, seed)), "cpu", dtype)
        for first, last in [(0, B)] + ([] if B < 256 else [(k, k + 32) for k in range(0, 256, 32)]):
            block, scale = rows_of(code, first, last), normaliser * (last - first) / B
            W_dec, b_dec, target, weight = arguments
            given_ = (W_dec, b_dec, target[first:last], weight)
            results = both(plain(block, scale, **options), block.values, *given_)
            trials.append((block, (*given_, scale), options, *results))
    return trials


def judge_body(body: bodies.Body, shapes, V: int, normaliser_of, monkeypatch, kind="none", zeros=False) -> None:
    for shape, dtype in product(shapes, body.dtypes):
        B, _, F = shape
        monkeypatch.setattr(crossovers, "CHUNK", F * max(3, B // 4))
        judge = Judge()
        for code, arguments, options, torchs, exact in trials_of(shape, V, normaliser_of(B), dtype, kind, zeros):
            out = body.run(ops.decode_loss, code, *arguments, **options)
            assert all(t.dtype == dtype for t in out) and (zeros or not out.grads[code.values == 0].any())
            judge_one(judge, out, torchs, exact)
        judge.verdict()


@bodies.every
def test_as_near_to_float64_as_torchs(body, monkeypatch):
    judge_body(body, body.shapes, 2, float, monkeypatch)


@pytest.mark.slow(but=1, of_gpu=True)
@bodies.every
@pytest.mark.parametrize("V", [2, 1])
def test_by_any_positive_number_and_with_one_value_set(V, body, monkeypatch):
    """The loss of a micro-batch is divided by the whole batch's size; one value set pays its own sparsity and has no
    auxiliary loss."""
    judge_body(body, body.few_shapes, V, lambda B: 1.75, monkeypatch)


# ---- Prefixes, and values that are 0 ---------------------------------------------------------------------------------


@pytest.mark.slow(but=1, of_gpu=True)
@bodies.every
@pytest.mark.parametrize("V", [2, 1])
def test_gradients_where_values_are_0_are_as_near_to_float64_as_torchs(V, body, monkeypatch):
    judge_body(body, body.few_shapes, V, lambda B: 1.75, monkeypatch, zeros=True)


@pytest.mark.slow(but=2, of_gpu=True)
@bodies.but_cuda
@pytest.mark.parametrize("kind, V, zeros", [("fractions", 2, False), ("single features", 1, True)])
def test_prefixes_and_zeros_are_as_near_to_float64_as_torchs(kind, V, zeros, body, monkeypatch):
    judge_body(body, body.few_shapes, V, lambda B: 1.75, monkeypatch, kind, zeros)


@pytest.mark.slow(but=0, of_gpu=True)
@bodies.but_cuda
@pytest.mark.parametrize("V", [1, 2])
def test_every_feature_may_end_a_prefix(V, body, monkeypatch):
    shapes = [shape for shape in body.few_shapes if shape[2] < 50]
    judge_body(body, shapes, V, float, monkeypatch, "each", zeros=V == 2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("weights", [None, torch.ones(1)])
@pytest.mark.parametrize("V", [1, 2])
def test_one_prefix_is_as_none_bit_for_bit(V, weights, backend, route, isa):
    code, *arguments = inputs(57, 63, 100, V)
    with use_backend(backend):
        without = ops.decode_loss(code, *arguments, 57)
        out = ops.decode_loss(code, *arguments, 57, prefixes=(100,), prefix_weights=weights)
    assert out.residual.shape == (1, 57, 63) and out.residual_aux.shape == (V - 1, 57, 63)
    assert_same_bits([out.losses, out.residual[0], out.grads], [without.losses, without.residual, without.grads])
    assert_same_bits(out.residual_aux.flatten(0, 1), without.residual_aux)


@pytest.mark.parametrize("kind", ["fractions", "each"])
def test_prefixes_weigh_1_by_default(kind, route):
    code, *arguments = inputs(9, 43, 33, 2)
    prefixes = PREFIXES[kind](33)
    weights = torch.ones(len(prefixes))
    ones = ops.decode_loss(code, *arguments, 9, prefixes=prefixes, prefix_weights=weights)
    assert_same_bits(ones, ops.decode_loss(code, *arguments, 9, prefixes=prefixes))


@pytest.mark.parametrize("kind", ["all", "fractions"])
@pytest.mark.parametrize("batch", [0, 9])
@bodies.but_cuda
def test_prefixes_without_an_entry_leave_b_dec_minus_the_target(batch, kind, body):
    code, W, b_dec, target, weight = inputs(batch, 19, 33, 2)
    empty = replace(code, indptr=code.indptr * 0, indices=code.indices[:0], u=code.u[:0], values=code.values[:, :0])
    prefixes = PREFIXES[kind](33)
    G = len(prefixes)
    out = body.run(ops.decode_loss, empty, W, b_dec, target, weight, 9, prefixes=prefixes)
    R = torch.stack([k * (b_dec - target) for k in range(G, 0, -1)])
    torch.testing.assert_close([out.residual, out.residual_aux], [R, R], rtol=1e-6, atol=0)
    assert out.losses[1] == 0 and out.losses[0] == out.losses[2] and out.grads.shape == (2, 0)


@bodies.but_cuda
def test_prefixes_repeat_bit_for_bit_at_every_thread_count(body):
    code, *arguments = inputs(*body.size(257, 100, 1000), 2)
    prefixes = PREFIXES["fractions"](code.d_sae)
    options = dict(prefixes=prefixes, prefix_weights=torch.arange(1.0, len(prefixes) + 1), zeros=True)
    assert_repeats(lambda: body.run(ops.decode_loss, code, *arguments, 257, **options), body.threads)


def test_a_gpus_own_kernel_has_no_prefixes_yet():
    code, *arguments = inputs(9, 5, 33, 2)
    with use_backend("cuda"), pytest.raises(ValueError, match="no kernel of prefixes"):
        ops.decode_loss(code, *arguments, 9, prefixes=[1, 33])


def test_prefixes_of_any_batch_compile_once():
    """Forward and backward, in one graph."""
    graphs = []

    def of(code, *arguments):
        losses = ops.decode_loss(code, *arguments, arguments[2].shape[0], prefixes=[1, 20, 33], zeros=True).losses
        return losses @ torch.tensor([1.0, 0.5, 2.0])

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(of, fullgraph=True, dynamic=True, backend=count)
    for batch in (9, 12):
        code, *arguments = inputs(batch, 5, 33, 2)
        results = []
        for f in (of, compiled):
            leaves = [t.clone().requires_grad_() for t in (code.values, *arguments)]
            loss = f(code.with_values(leaves[0]), *leaves[1:])
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        assert_same_bits(*results)
    assert len(graphs) == 1


# ---- Values at the kinks ---------------------------------------------------------------------------------------------


def test_an_entry_with_an_open_gate_and_magnitude_zero_carries_the_gate_gradient_only(route):
    """S \\ S′ of MATH.md §2."""
    p = make_inputs(257, 63, 100)
    code = ops.encode(p.x_c, p.W_enc, p.b_gate, activation="gated", r_mag=p.r_mag, b_mag=p.b_mag)
    outside = code.magnitudes == 0
    assert outside.sum() > 100
    grads = ops.decode_loss(code, p.W_dec, p.b_dec, p.x, torch.ones(100), 257).grads
    assert not grads[0, outside].any() and bool((grads[1, outside] != 0).all())
    assert bool((grads[0, ~outside] != 0).all())


def test_entries_in_a_slack_window_cost_nothing(route):
    """With the gates at 0 neither loss nor gradient: the window is for estimators that are built outside."""
    p = make_inputs(57, 63, 33)
    kwargs = dict(activation="gated", r_mag=p.r_mag, b_mag=p.b_mag)
    tight = ops.encode(p.x_c, p.W_enc, p.b_gate, **kwargs)
    loose = ops.encode(p.x_c, p.W_enc, p.b_gate, **kwargs, slack=0.5)
    window = loose.gates == 0
    assert window.any()
    arguments = (p.W_dec, p.b_dec, p.x, torch.ones(33), 57)
    a, b = ops.decode_loss(tight, *arguments), ops.decode_loss(loose, *arguments)
    assert not b.grads[:, window].any()
    judge = Judge()
    judge_one(judge, a, *both(plain(tight, 57), tight.values, *arguments[:4]))
    judge_one(judge, b, *both(plain(loose, 57), loose.values, *arguments[:4]))
    judge.verdict()


@bodies.every
@pytest.mark.parametrize("V", [1, 2])
def test_no_rows_cost_nothing(V, body):
    code, *arguments = inputs(0, 5, 33, V)
    out = body.run(ops.decode_loss, code, *arguments, 1)
    assert_same_bits(out.losses, torch.zeros(3))
    assert out.residual.shape == (0, 5) and out.grads.shape == (V, 0)


@bodies.every
def test_an_empty_code_leaves_b_dec_minus_the_target(body):
    code, W, b_dec, target, weight = inputs(9, 19, 33, 2)
    empty = replace(code, indptr=code.indptr * 0, indices=code.indices[:0], u=code.u[:0], values=code.values[:, :0])
    out = body.run(ops.decode_loss, empty, W, b_dec, target, weight, 9)
    assert_same_bits([out.residual, out.residual_aux], [b_dec - target, b_dec - target])
    assert out.losses[1] == 0 and out.losses[0] == out.losses[2] > 0


@bodies.every
def test_a_nan_reaches_the_losses_and_its_own_row_only(body):
    code, W, b_dec, target, weight = inputs(9, 19, 33, 2)
    target[4, 3] = float("nan")
    out = body.run(ops.decode_loss, code, W, b_dec, target, weight, 9)
    assert out.losses.isnan().tolist() == [True, False, True]
    if body.route != "dense":  # where a product spreads it over its row
        assert int(out.residual.isnan().sum()) == 1
    assert not (out.grads[:, : code.indptr[4]].isnan().any() or out.grads[:, code.indptr[5] :].isnan().any())


def of_size(body: bodies.Body, V: int, B: int, d: int, F: int) -> tuple:
    return inputs(*(bodies.NINE if body.of_gpu else (B, d, F)), V)


@pytest.mark.slow(but=1, of_gpu=True)
@bodies.every
@pytest.mark.parametrize("V", [2, 1])
def test_strides_do_not_matter(V, body):
    code, *arguments = of_size(body, V, 57, 63, 100)
    apart = replace(code, indptr=strided(code.indptr), indices=strided(code.indices), values=strided(code.values))
    expected = body.run(ops.decode_loss, code, *arguments, 57)
    assert_same_bits(expected, body.run(ops.decode_loss, apart, *map(strided, arguments), 57))
    code_of_columns = replace(code, values=code.values.T.contiguous().T)
    assert_same_bits(expected, body.run(ops.decode_loss, code_of_columns, *arguments, 57))


@bodies.every
def test_repeats_bit_for_bit_at_every_thread_count(body):
    code, *arguments = of_size(body, 2, 257, 100, 1000)
    assert_repeats(lambda: body.run(ops.decode_loss, code, *arguments, 257), body.threads)


@given(
    B=st.integers(0, 20), d=st.integers(1, 40), F=st.integers(1, 70), V=st.integers(1, 2), seed=st.integers(0, 1000),
    apart=st.booleans(), crossover=st.sampled_from([-1.0, 2.0]), normaliser=st.sampled_from([0.25, 1.0, 4096.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]), kind=st.sampled_from(["none", "fractions", "each"]),
    zeros=st.booleans(),
)  # fmt: skip
def test_any_shape_stride_and_dtype_on_a_grid_is_exact(B, d, F, V, seed, apart, crossover, normaliser, dtype, kind, zeros):
    code = random_code(B, F, V, seed=seed)
    code = replace(code, values=(code.values > 0.5).to(dtype))
    sizes = {"W_dec": (F, d), "b_dec": (d,), "target": (B, d), "weight": (F,)}
    arguments = [grid(*size, step=1, reach=1, seed=seed + k).to(dtype) for k, size in enumerate(sizes.values())]
    prefixes = PREFIXES[kind](F)
    weights = prefixes and strided(torch.arange(len(prefixes), dtype=dtype) % 3)
    options = dict(prefixes=prefixes, prefix_weights=weights, zeros=zeros)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(crossovers.CROSSOVER, "decode_loss", crossover)
        given_ = [strided(t) if apart else t for t in arguments]
        out = ops.decode_loss(replace(code, values=strided(code.values)), *given_, normaliser, **options)
    exact = plain(code, normaliser, **options)(code.values.double(), *(t.double() for t in arguments))
    for result, ref64 in zip(out, exact, strict=True):
        assert result.dtype == dtype and torch.equal(result.double(), ref64)


CODE, *ARGUMENTS = inputs(9, 5, 33, 2)
SOUND = dict(zip(("W_dec", "b_dec", "target", "sparsity_weight"), ARGUMENTS, strict=True)) | dict(normaliser=9.0)
BAD = {
    "weights of one dimension": (dict(W_dec=torch.zeros(33)), "W_dec: got shape"),
    "weights with fewer features": (
        dict(W_dec=torch.zeros(99, 5)[:32], sparsity_weight=torch.zeros(32)), "W_dec: got shape"),
    "integer weights": (dict(W_dec=torch.zeros(33, 5, dtype=torch.int64)), "got torch"),
    "b_dec too long": (dict(b_dec=torch.zeros(6)), r"b_dec: got shape \(6,\), want \[5\]"),
    "b_dec of another dtype": (dict(b_dec=torch.zeros(5, dtype=torch.float64)), "b_dec: got torch.float64"),
    "too few targets": (dict(target=torch.zeros(8, 5)), "target: got shape"),
    "target of another width": (dict(target=torch.zeros(9, 4)), "target: got shape"),
    "integer target": (dict(target=torch.zeros(9, 5, dtype=torch.int32)), "target: got torch.int32"),
    "a scalar sparsity weight": (dict(sparsity_weight=torch.tensor(1.0)), "sparsity_weight: got shape"),
    "sparsity weight too short": (dict(sparsity_weight=torch.zeros(32)), "sparsity_weight: got shape"),
    "normaliser 0": (dict(normaliser=0.0), "normaliser: got 0"),
    "negative normaliser": (dict(normaliser=-1.0), "normaliser: got -1"),
    "normaliser that is not a number": (dict(normaliser=float("nan")), "normaliser: got nan"),
    "no prefix": (dict(prefixes=[]), r"prefixes: got \[\], want ends that ascend from at least 1 to F = 33"),
    "a prefix of nothing": (dict(prefixes=[0, 33]), r"prefixes: got \[0, 33\]"),
    "a prefix twice": (dict(prefixes=[5, 5, 33]), "prefixes: got"),
    "prefixes that descend": (dict(prefixes=[9, 5, 33]), "prefixes: got"),
    "prefixes short of F": (dict(prefixes=[5, 32]), "prefixes: got"),
    "prefixes beyond F": (dict(prefixes=[5, 34]), "prefixes: got"),
    "prefix weights alone": (dict(prefix_weights=torch.ones(2)), r"prefix_weights: got \(2,\) without prefixes"),
    "too few prefix weights": (
        dict(prefixes=[5, 33], prefix_weights=torch.ones(1)), r"prefix_weights: got shape \(1,\), want \[2\]"),
    "prefix weights of another dtype": (
        dict(prefixes=[5, 33], prefix_weights=torch.ones(2).double()), "prefix_weights: got torch.float64"),
    "a negative prefix weight": (
        dict(prefixes=[5, 33], prefix_weights=torch.tensor([1.0, -1.0])), r"prefix_weights: got \[1.0, -1.0\]"),
    "a prefix weight that is not a number": (
        dict(prefixes=[33], prefix_weights=torch.tensor([torch.nan])), r"prefix_weights: got \[nan\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_value_error_that_names_it(case):
    change, message = BAD[case]
    kwargs = SOUND | change
    with use_backend("reference"), raises_and_changes_nothing(message, CODE, *kwargs.values()):
        ops.decode_loss(CODE, **kwargs)


@pytest.mark.parametrize(
    "values, message",
    [
        (torch.zeros(3, CODE.nnz), "values: got 3 value sets"),
        (torch.zeros(0, CODE.nnz), "values: got 0 value sets"),
        (torch.zeros(2, CODE.nnz - 1), "values: got shape"),
        (torch.zeros(CODE.nnz), "values: got shape"),
        (torch.zeros(2, CODE.nnz, dtype=torch.float64), "values: got torch.float64"),
    ],
)
def test_bad_values_are_a_value_error(values, message):
    code = replace(CODE, values=values)
    with raises_and_changes_nothing(message, code, list(SOUND.values())):
        ops.decode_loss(code, **SOUND)


@pytest.mark.parametrize("name, code", corrupt_codes(9, 33))
def test_a_corrupt_code_is_a_value_error(name, code):
    with use_backend("reference"), raises_and_changes_nothing("indptr|indices", code, list(SOUND.values())):
        ops.decode_loss(code, **SOUND)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("prefixes, zeros", [(None, False), ([1, 20, 33], True)])
@pytest.mark.parametrize("V, stop_auxiliary", [(1, True), (2, True), (2, False)])
def test_opcheck(V, stop_auxiliary, prefixes, zeros, gradients):
    code, *arguments = inputs(9, 5, 33, V)
    leaves = [t.clone().requires_grad_(gradients) for t in (code.values, *arguments)]
    weights = prefixes and torch.rand(len(prefixes))
    options = (9.0, stop_auxiliary, prefixes, weights, zeros)
    opcheck(torch.ops.sae_fast.decode_loss.default, (code.indptr, code.indices, *leaves, *options))
