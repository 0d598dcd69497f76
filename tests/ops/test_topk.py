"""The supports ``topk``, ``batch_topk``, ``topk_any`` and ``topk_abs`` of ops.encode.

The truth is a full sort of the pre-activations that the fixed-order dots give for every entry: the engine's code has to be
that bit for bit by any way to it.  Where a screen's bound decides what is looked at, every part of the argument has a case
that loses an entry when that part is taken away.
"""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Judge,
    assert_is_code,
    assert_repeats,
    assert_same_bits,
    dense,
    grid,
    randn,
    strided,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from ways import WAYS, forced

from sae_fast import ops, use_backend
from sae_fast.code import SparseCode
from sae_fast.ops.dispatch import _C
from sae_fast.ops.encode import bound, largest, screen

SUPPORTS = ("topk", "batch_topk", "topk_any", "topk_abs")
SIGNED = ("topk_any", "topk_abs")
supports = pytest.mark.parametrize("support", SUPPORTS)
every_way = pytest.mark.parametrize("way", WAYS)


def encode(x: Tensor, W: Tensor, bias: Tensor, support: str, k: int, **options) -> SparseCode:
    return ops.encode(x, W, bias, activation="relu", support=support, k=k, **options)


def every_dot(x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """u [B, F] by the dots that define it."""
    with forced("dots"):
        return ops.encode(x, W, torch.full_like(bias, torch.inf), activation="relu").u.view(x.shape[0], W.shape[0])


def sorted_choice(pi: Tensor, support: str, k: int) -> Tensor:
    """[B, F]: the largest entries of those that may be chosen, a NaN before all, and of equal ones the first, by a stable
    sort of it all."""
    size = sized(pi, support)
    rank = size.double()
    rank[size.isnan()] = torch.inf
    rank[size == torch.inf] = 1e300
    flat, k = (rank.reshape(1, -1), int(k * pi.shape[0])) if support == "batch_topk" else (rank, k)
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True).view_as(pi)
    return chosen if support == "topk_any" else chosen & ~(size <= 0)


def sized(pi: Tensor, support: str) -> Tensor:
    return pi.abs() if support == "topk_abs" else pi


def values_of(pi: Tensor, support: str) -> Tensor:
    return pi if support in SIGNED else torch.relu(pi)


def assert_is_the_sorted_choice(code: SparseCode, u: Tensor, bias: Tensor, support: str, k: int) -> None:
    assert_is_code(code)
    member = sorted_choice(u + bias, support, k)
    assert torch.equal(dense(code, torch.ones(code.nnz)) > 0, member)
    assert_same_bits([code.u, code.values], [u[member], values_of(u + bias, support)[member][None]])


def layer(B: int, d: int, F: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """About half of the pre-activations are positive."""
    return randn(B, d, seed=seed), randn(F, d, seed=seed + 1) / d**0.5, 0.3 * randn(F, seed=seed + 2)


# ---- Values and choice ------------------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1, 1), (1, 63, 33, 4), (3, 100, 4099, 64), (257, 1, 100, 3), (257, 63, 100, 100), (57, 769, 400, 1),
    (300, 40, 1500, 10), (5, 20, 31, 31),
]  # fmt: skip


@supports
@every_way
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_are_chosen_whatever_the_way(shape, way, support, isa):
    *sizes, k = shape
    x, W, bias = layer(*sizes)
    u = every_dot(x, W, bias)
    with forced(way):
        code = encode(x, W, bias, support, k)
    assert_is_the_sorted_choice(code, u, bias, support, k)


@pytest.mark.parametrize(
    "support, activation",
    [(s, a) for s in ("topk", "batch_topk") for a in ("gated", "relu", "jumprelu")] + [(s, "relu") for s in SIGNED],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_values_are_as_near_to_float64_as_torchs_and_the_choice_is_float64s(backend, activation, support):
    """Where the k-th and the next are further apart than rounding."""
    trials, judged = Judge(), 0
    for seed in range(8):
        x, W, bias = layer(57, 96, 700, seed=10 * seed)
        more = {
            "gated": dict(r_mag=0.2 * randn(700), b_mag=bias),
            "jumprelu": dict(threshold=torch.full((700,), 0.5)),
            "relu": {},
        }
        with use_backend(backend):
            code = ops.encode(x, W, bias, activation=activation, support=support, k=9, **more[activation])
        assert_is_code(code)
        us = {dtype: x.to(dtype) @ W.to(dtype).T for dtype in (torch.float32, torch.float64)}
        pi = us[torch.float64] + bias.double()
        size = sized(pi, support)
        flat, n = (size.reshape(1, -1), 9 * 57) if support == "batch_topk" else (size, 9)
        top = flat.topk(n + 1, dim=1).values
        clear = (top[:, -2] - top[:, -1] > 1e-5).expand(57)
        judged += int(clear.sum())
        member = dense(code, torch.ones(code.nnz)) > 0
        assert torch.equal(member[clear], sorted_choice(pi, support, 9)[clear])
        f = {}
        for dtype, u in us.items():
            pre = u + bias.to(dtype)
            if activation == "gated":
                m, b = (more["gated"][name].to(dtype) for name in ("r_mag", "b_mag"))
                f[dtype] = torch.relu(torch.exp(m) * u + b) * (pre > 0)
            else:
                f[dtype] = values_of(pre, support) * ((pre > 0.5) | (activation == "relu"))
        trials.add("u", dense(code, code.u), us[torch.float32] * member, us[torch.float64] * member)
        trials.add("f", dense(code, code.magnitudes), f[torch.float32] * member, f[torch.float64] * member)
    assert judged >= 3 * 57
    trials.verdict()


@supports
@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_of_equal_ones_the_first_are_chosen(backend, k, support, isa):
    """Pre-activations on a coarse grid, which every product computes exactly; the last rows are all alike."""
    x, W, bias = (
        grid(90, 5, step=1.0, reach=1, seed=0),
        grid(40, 5, step=1.0, reach=1, seed=1),
        grid(40, step=1.0, reach=1, seed=2),
    )
    x[80:] = x[80]
    x[85:] = 0
    bias[20:] = 1
    pi = x @ W.T + bias
    with use_backend(backend):
        code = encode(x, W, bias, support, k)
    if k == 3:
        size, whole = sized(pi, support), support == "batch_topk"
        last = (size.reshape(1, -1) if whole else size).topk(90 * k if whole else k, dim=1).values[:, -1:]
        assert bool(((size == last).sum(1) > 1).any()), "ties matter"
    assert_is_the_sorted_choice(code, x @ W.T, bias, support, k)


@supports
@every_way
@pytest.mark.parametrize("room", [0, 10**6], ids=["a floor after each tile", "one floor"])
def test_ties_across_tiles_and_row_blocks(room, way, support):
    """Every entry ties with hundreds of others: what waits at the floor must neither win too early nor be lost."""
    x, W = grid(70, 4, step=1.0, reach=1, seed=0), grid(2000, 4, step=1.0, reach=1, seed=1)
    bias = torch.full((2000,), 0.5)
    u = every_dot(x, W, bias)
    for rows, tile in ((2048, 1), (16, 2**21)):
        with forced(way, ROOM=room, ROWS=rows, TILE=tile):
            assert_is_the_sorted_choice(encode(x, W, bias, support, 25), u, bias, support, 25)


@supports
@every_way
def test_fewer_positive_than_k(way, support):
    x, W, bias = layer(70, 20, 300)
    bias -= 1.7
    bias[::2] = -torch.inf
    u = every_dot(x, W, bias)
    counts = (u + bias > 0).sum(1)
    assert counts.min() == 0 and counts.max() > 10
    for k in (10, 300):
        with forced(way, ROOM=0):
            assert_is_the_sorted_choice(encode(x, W, bias, support, k), u, bias, support, k)


@supports
@every_way
@pytest.mark.parametrize("B", [0, 1])
def test_no_row_and_one_row(B, way, support):
    x, W, bias = layer(B, 20, 300)
    with forced(way):
        code = encode(x, W, bias, support, 7)
    assert code.shape == (B, 300) and code.nnz == 7 * B
    if B:
        assert_is_the_sorted_choice(code, every_dot(x, W, bias), bias, support, 7)


@every_way
@pytest.mark.parametrize("k", [0.004, 0.5, 1.5, 40.25])
def test_k_of_a_batch_need_not_be_whole(k, way, isa):
    x, W, bias = layer(130, 20, 300)
    u = every_dot(x, W, bias)
    with forced(way, ROOM=0):
        assert_is_the_sorted_choice(encode(x, W, bias, "batch_topk", k), u, bias, "batch_topk", k)
    with use_backend("reference"):
        assert encode(x, W, bias, "batch_topk", k).nnz == int(k * 130)


@pytest.mark.parametrize("precision", ["exact", "fp32", "bf16"])
def test_rows_with_few_positive_ones_are_filled_up_and_the_others_stay(precision, monkeypatch):
    from sae_fast.ops import crossovers

    x, W, bias = layer(130, 20, 300)
    x[::3] = 0
    bias.abs_().neg_()
    code, positive = (encode(x, W, bias, support, 10, precision=precision) for support in ("topk_any", "topk"))
    assert torch.equal(code.indptr, torch.arange(0, 1301, 10)) and positive.nnz == 10 * 86
    if precision == "exact":
        assert_is_the_sorted_choice(code, every_dot(x, W, bias), bias, "topk_any", 10)
    whole = (code.row_ids() % 3 != 0).nonzero()[:, 0]
    assert_same_bits([code.indices[whole], code.values[:, whole]], [positive.indices, positive.values])
    monkeypatch.setattr(crossovers, "CHUNK", 7 * 300)
    assert_same_bits(encode(x, W, bias, "topk_any", 10, precision=precision), code)


@pytest.mark.parametrize(
    "support, k, activation, said",
    [
        ("topk_any", 1.5, "relu", "k: got 1.5, want a whole number with 1 ≤ k ≤ F = 300"),
        ("topk_abs", 301, "relu", "k: got 301, want a whole number with 1 ≤ k ≤ F = 300"),
        ("topk", 0, "relu", "k: got 0, want a whole number with 1 ≤ k ≤ F = 300"),
        ("batch_topk", 0, "relu", "k: got 0, want 0 < k ≤ F = 300"),
        ("topk_abs", 3, "jumprelu", "activation: got 'jumprelu' with support 'topk_abs', want 'relu'"),
    ],
)
def test_what_does_not_go_together_is_named(support, k, activation, said):
    x, W, bias = layer(5, 20, 300)
    more = {"threshold": bias} if activation == "jumprelu" else {}
    with pytest.raises(ValueError, match=f"^{said}"):
        ops.encode(x, W, bias, activation=activation, support=support, k=k, **more)


# ---- The same bits by every way ---------------------------------------------------------------------------------------


@supports
def test_routes_chunks_floors_threads_and_shadows_change_no_bit(support, isa):
    x, W, bias = layer(150, 48, 1100)
    u, shadow = every_dot(x, W, bias), ops.make_shadow(W)
    chunks = [  # rows, tile, room; a shadow or none; threads
        (2048, 2**21, 512, None, 1), (64, 1, 0, shadow, 3), (50, 2**14, 0, None, 2), (1, 1, 30, shadow, 2),
    ]  # fmt: skip
    for way in WAYS:
        for dense_above in (0.0, 0.2, 2.0):
            for rows, tile, room, kept, threads in chunks:
                torch.set_num_threads(threads)
                with forced(way, dense_above=dense_above, ROWS=rows, TILE=tile, ROOM=room):
                    code = encode(x, W, bias, support, 12, shadow=kept)
                assert_is_the_sorted_choice(code, u, bias, support, 12)
    torch.set_num_threads(2)
    assert_is_the_sorted_choice(encode(x, W, bias, support, 12), u, bias, support, 12)  # by the way it takes by itself


@supports
@every_way
@pytest.mark.parametrize("times", [0.0, 0.97, 1.0001, torch.inf, torch.nan, "mixed", "a few too high"], ids=str)
def test_a_guess_changes_no_bit(times, way, support):
    x, W, bias = layer(130, 40, 1500)
    k = 10
    with forced(way):
        code = encode(x, W, bias, support, k)
        reached = sized(code.magnitudes, support)
        least = torch.segment_reduce(reached, "min", offsets=code.indptr, initial=torch.inf)
        guess = reached.amin().expand(130) if support == "batch_topk" else least
        if times == "mixed":
            guess = guess * (0.5 + torch.arange(130) % 3)
        elif times == "a few too high":
            guess = torch.where(torch.arange(130) % 60 == 0, 2 * guess, 0.9 * guess)
        else:
            guess = guess * times
        assert_same_bits(code, encode(x, W, bias, support, k, guess=guess))
        with pytest.raises(ValueError, match=r"^guess: got shape \(129,\)"):
            encode(x, W, bias, support, k, guess=guess[1:])
        with pytest.raises(ValueError, match=r"^guess: got a tensor with support 'threshold'"):
            encode(x, W, bias, "threshold", 0, guess=guess)


@supports
@every_way
def test_repeats_bit_for_bit_at_every_number_of_threads(way, support, isa):
    x, W, bias = layer(257, 63, 1000)
    with forced(way, ROOM=0, ROWS=100, TILE=2**15):
        assert_repeats(lambda: encode(x, W, bias, support, 20), threads=(1, 2, 3, 7))


@supports
@every_way
def test_instruction_sets_with_the_same_lanes_have_the_same_bits(way, support):
    codes = {}
    for name in _C.supported_isas():
        _C.set_isa(name)
        with forced(way):
            codes[name] = encode(*layer(100, 100, 600), support, 11)
    if {"avx512", "avx2"} <= set(codes):
        assert_same_bits(codes["avx512"], codes["avx2"])
    for code in codes.values():
        assert_same_bits([code.indptr, code.indices], [codes["plain"].indptr, codes["plain"].indices])


@supports
def test_strides_do_not_matter(support):
    x, W, bias = layer(57, 63, 300)
    apart = [strided(t) for t in (x, W, bias)]
    assert not any(t.is_contiguous() for t in apart)
    assert_same_bits(encode(x, W, bias, support, 9), encode(*apart, support, 9))


@supports
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_in_fp32_torchs_product_decides(precision, support):
    x, W, bias = layer(300, 64, 900)
    code = encode(x, W, bias, support, 10, precision=precision)
    assert_is_the_sorted_choice(code, x @ W.T, bias, support, 10)


@supports
def test_in_bf16_the_product_decides_and_only_near_the_last_is_it_wrong(support):
    x, W, bias = layer(300, 64, 900)
    pi = x.double() @ W.double().T + bias.double()
    exact = sorted_choice(pi, support, 10)
    of_size = sized(pi, support)
    last = of_size[exact].min() if support == "batch_topk" else of_size.masked_fill(~exact, torch.inf).amin(1, keepdim=True)
    with forced("screen", TILE=2**15, ROOM=0):
        code = encode(x, W, bias, support, 10, precision="bf16")
    assert_is_code(code)
    member = dense(code, torch.ones(code.nnz)) > 0
    size = x.norm(dim=1)[:, None] * W.norm(dim=1)
    clear = (of_size - last).abs() > 2.0**-6 * (size + pi.abs())
    assert clear.double().mean() > 0.9 and torch.equal(member[clear], exact[clear])
    assert not torch.equal(member, exact), "some come and go"
    assert bool(((dense(code, code.u) - (x @ W.T) * member).abs() <= 2.0**-7 * (size + pi.abs())).all())
    assert code.nnz == int(exact.sum())


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_the_reference(dtype, support):
    x, W, bias = (grid(*shape, step=1.0, reach=1, seed=i).to(dtype) for i, shape in enumerate([(20, 5), (33, 5), (33,)]))
    code = encode(x, W, bias, support, 4)
    member = sorted_choice((x @ W.T + bias).float(), support, 4)
    assert code.values.dtype == dtype and torch.equal(dense(code, torch.ones(code.nnz)) > 0, member)


@pytest.mark.parametrize("support", ["topk", *SIGNED])
def test_the_reference_takes_those_of_each_row_in_chunks_of_rows(support, monkeypatch):
    from sae_fast.ops import crossovers

    x, W, bias = layer(57, 20, 300)
    with use_backend("reference"):
        whole = encode(x, W, bias, support, 9)
        monkeypatch.setattr(crossovers, "CHUNK", 10 * 300)
        parts = encode(x, W, bias, support, 9)
    assert_same_bits([whole.indptr, whole.indices], [parts.indptr, parts.indices])
    torch.testing.assert_close(whole.values, parts.values)


# ---- Any input --------------------------------------------------------------------------------------------------------


def offset(B: int, d: int) -> Tensor:
    """Two dimensions offset by 300 σ."""
    x = randn(B, d)
    x[:, [3, d // 2]] += 300
    return x


@supports
@every_way
@pytest.mark.parametrize("room", [0, 512])
def test_massive_activations(room, way, support):
    x, W, bias = offset(100, 48), *layer(1, 48, 1500)[1:]
    u = every_dot(x, W, bias)
    with forced(way, ROOM=room, TILE=2**15):
        assert_is_the_sorted_choice(encode(x, W, bias, support, 16), u, bias, support, 16)


@supports
@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-130, 2.0**-70, 2.0**-41, 2.0**41, 2.0**70, 2.0**100])
@pytest.mark.parametrize("where", ["x", "W", "bias", "all"])
def test_norms_at_the_ends_of_fp32s_range(where, scale, support):
    x, W, bias = (t.clamp(-1, 1) for t in layer(70, 33, 500))
    for name, t in (("x", x), ("W", W), ("bias", bias)):
        if where in (name, "all"):
            t[::3] *= scale
    u = every_dot(x, W, bias)
    for way, dense_above in (("screen", 0.2), ("screen", 2.0), ("bound", 2.0)):
        with forced(way, dense_above=dense_above, ROOM=0, TILE=2**14):
            assert_is_the_sorted_choice(encode(x, W, bias, support, 9), u, bias, support, 9)


@supports
@every_way
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38, -3e38])
@pytest.mark.parametrize("where", ["bias", "x", "W"])
def test_infinities_and_nans(where, value, way, support, isa):
    """Of 20 features, or of all of a row; k is below, and above, how many there are."""
    x, W, bias = layer(60, 20, 300)
    {"bias": bias[100:120], "x": x[7, 3:4], "W": W[100:120, 2]}[where].fill_(value)
    u = every_dot(x, W, bias)
    if value != value:
        assert (u + bias).isnan().any()
    for k in (6, 30):
        with forced(way, ROOM=0, TILE=1):
            code = encode(x, W, bias, support, k)
        assert_is_code(code)
        member = sorted_choice(u + bias, support, k)
        assert torch.equal(dense(code, torch.ones(code.nnz)) > 0, member)
        torch.testing.assert_close(code.u, u[member], rtol=0, atol=0, equal_nan=True)


def extremes(g: torch.Generator, *shape: int) -> Tensor:
    """Ordinary numbers; in places zeros, subnormals, ties, ±3e38; rows of any magnitude."""
    A = torch.randn(*shape, generator=g)
    special = torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-127), 2.0**-126, 1 + 2.0**-8, -3e38, 3.4e38, 1.0, 2.0**20])
    chosen = special[torch.randint(len(special), shape, generator=g)]
    A = torch.where(torch.rand(*shape, generator=g) < torch.rand((), generator=g) ** 3, chosen, A)
    exponents = torch.randint(-150, 128, shape[:1], generator=g) * (torch.rand(shape[:1], generator=g) < 0.2)
    return (A.double() * 2.0 ** exponents.double().view(-1, *[1] * (len(shape) - 1))).clamp(-3.4e38, 3.4e38).float()


@settings(max_examples=150)
@given(
    B=st.integers(1, 70), d=st.integers(1, 60), F=st.integers(1, 600), seed=st.integers(0, 2**31), share=st.integers(1, 40),
    support=st.sampled_from(SUPPORTS), dense_above=st.sampled_from([0.0, 0.2, 2.0]), rows=st.sampled_from([16, 2048]),
    room=st.sampled_from([0, 20, 512]), ordinary=st.booleans(), way=st.sampled_from(["screen", "bound"]),
)  # fmt: skip
def test_any_finite_input_has_the_choice_of_the_dots(B, d, F, seed, share, support, dense_above, rows, room, ordinary, way):
    g = torch.Generator().manual_seed(seed)
    make = (lambda g, *shape: torch.randn(*shape, generator=g)) if ordinary else extremes
    x, W, bias = make(g, B, d), make(g, F, d), make(g, F)
    k = max(1, F // share)
    u = every_dot(x, W, bias)
    with forced(way, dense_above=dense_above, ROWS=rows, TILE=1, ROOM=room):
        code = encode(x, W, bias, support, k)
    member = sorted_choice(u + bias, support, k)
    assert torch.equal(dense(code, torch.ones(code.nnz)) > 0, member)
    torch.testing.assert_close(code.u, u[member], rtol=0, atol=0, equal_nan=True)


# ---- The floor: a case for each part of the argument -------------------------------------------------------------------

HALF_ULP = 2.0**-8 * (1 - 2.0**-10)  # of 1 in bfloat16, or nearly: 1 + HALF_ULP is rounded to 1


def chosen_with_rivals(x: Tensor, w: Tensor, bias: float, rival: float, **how) -> int:
    """How often a feature with this row and bias is the one chosen, of 64 rows alike: its rivals, the 300 features before
    it, have weights of 0 and the bias ``rival``."""
    W, biases = torch.zeros(301, x.shape[0]), torch.full((301,), rival)
    W[300], biases[300] = w, bias
    X = x.repeat(64, 1)
    with forced("screen", TILE=1, ROOM=0, **how):
        code = encode(X, W, biases, "topk", 1)
    return int((code.indices == 300).sum())


@pytest.mark.parametrize("term", ["x_residual", "w_residual"])
def test_a_bound_without_its_margin_loses_the_best(term):
    d = 768
    off = torch.full((d,), 1 + HALF_ULP)
    x, w = (off, torch.ones(d)) if term == "x_residual" else (torch.ones(d), off)
    pi = d * HALF_ULP  # after the bias took d
    assert chosen_with_rivals(x, w, -float(d), 0.9 * pi) == 64
    for factor in (0.0, 0.5):
        assert chosen_with_rivals(x, w, -float(d), 0.9 * pi, without={term: factor}) == 0, factor


def test_the_floor_is_truncated_not_rounded_and_one_step_higher_would_lose(monkeypatch):
    """The best is just above its rivals, and its bound hardly above itself: all in one step of bfloat16."""
    zeros, rival = torch.zeros(64), 1 + 2.0**-7 * 0.75
    best = 1 + 2.0**-7 * 0.8
    assert chosen_with_rivals(zeros, zeros, best, rival) == 64
    monkeypatch.setattr(largest, "RAISE", 3)
    assert chosen_with_rivals(zeros, zeros, best, rival) == 0


@pytest.mark.parametrize("where", ["x", "w"])
def test_what_is_out_of_range_passes_any_floor(where, monkeypatch):
    """As 1, which passes the test of a sign, it would be below a floor of 100."""
    x, w = torch.full((8,), 2.0**45 if where == "x" else 1.0), torch.full((8,), 2.0**45 if where == "w" else 1.0)
    assert chosen_with_rivals(x, w, 0.0, 100.0) == 64
    monkeypatch.setitem(screen.OPEN, "floor", 1.0)
    assert chosen_with_rivals(x, w, 0.0, 100.0) == 0


@pytest.mark.parametrize("factor", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("support", ["topk", "batch_topk"])
def test_a_floor_from_bounds_alone_needs_twice_their_margins(support, factor, monkeypatch):
    """A rival's bound is above it by nearly twice its margins; the best, of a later tile, has next to none."""
    d = 768
    x = torch.full((64, d), 1 - HALF_ULP / 2)  # rounded to 1: the product is above x·w by half the margin, and the margin
    W, bias = torch.zeros(600, d), torch.full((600,), 1e-3)
    W[:256], bias[:256] = 1.0, 2 - d * (1 - HALF_ULP / 2)  # π = 2
    bias[300] = 2.5
    u = every_dot(x, W, bias)
    assert bool((u[:, :256] + bias[:256] < 2.4).all())
    with forced("screen", TILE=1, ROOM=0):
        assert_is_the_sorted_choice(encode(x, W, bias, support, 1), u, bias, support, 1)
        monkeypatch.setattr(screen, "EXCESS", factor)
        assert not bool((encode(x, W, bias, support, 1).indices == 300).any()), "the best is lost"


@pytest.mark.parametrize("factor", [0.0, 1.0, 1.5])
def test_a_magnitude_is_bounded_from_below_by_twice_the_margins(factor, monkeypatch):
    """The best is negative, with a bound that is above it by nearly twice its margins; its rivals, before it, are positive
    and have next to none."""
    d = 768
    x = torch.full((64, d), 1 - HALF_ULP / 2)  # rounded to 1
    W, bias = torch.zeros(600, d), torch.full((600,), 1e-3)
    W[300], bias[300] = 1.0, -2 - d * (1 - HALF_ULP / 2)  # π = −2
    bias[:256] = 1.9
    u = every_dot(x, W, bias)
    with forced("screen", TILE=1, ROOM=0):
        assert_is_the_sorted_choice(encode(x, W, bias, "topk_abs", 1), u, bias, "topk_abs", 1)
        assert bool((encode(x, W, bias, "topk_abs", 1).indices == 300).all())
        monkeypatch.setattr(screen, "EXCESS", factor)
        assert not bool((encode(x, W, bias, "topk_abs", 1).indices == 300).any()), "the best is lost"


def test_a_float_product_without_its_margin_loses_the_best():
    """The best is what the dots round up and the product rounds down, by more than the lead over its rivals."""
    x = randn(1, 768).repeat(64, 1)
    several = randn(400, 768, seed=1)
    lead = every_dot(x, several, torch.zeros(400)) - x @ several.T
    W, bias = torch.zeros(600, 768), torch.zeros(600)
    W[300:] = several[int(lead[0].argmax())]
    best = float(every_dot(x, W, bias)[0, 300])
    worst = float((x @ W.T)[:, 300:].max())
    bias[300:] = 1 - best  # so that the lead is not lost in the size of u
    bias[:300] = float(torch.tensor(1 + 0.3 * (worst - best)))
    assert best - worst > 4 * 2.0**-23
    with forced("bound", TILE=1, ROOM=0):
        assert bool((encode(x, W, bias, "topk", 1).indices == 300).all())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bound, "MARGIN", 0.0)
            assert not bool((encode(x, W, bias, "topk", 1).indices == 300).any())


@pytest.mark.parametrize("way", ["screen", "bound"])
def test_few_candidates_are_verified(way):
    """Of 30 000 entries a row, half of them positive, hardly more than the k."""
    x, W = randn(128, 256), torch.nn.functional.normalize(randn(6000, 256, seed=1), dim=1)
    seen = []

    class Engine:
        def __getattr__(self, name):
            return getattr(_C, name)

        def Largest(self, **of):
            seen.append(_C.Largest(**of))
            return seen[-1]

    with pytest.MonkeyPatch.context() as patch, forced(way, TILE=2**17):
        patch.setattr(largest, "_C", Engine())
        for support in SUPPORTS:
            code = encode(x, W, torch.zeros(6000), support, 32)
            assert code.nnz == 128 * 32 <= seen[-1].candidates() < 2 * code.nnz, support


# ---- torch.library -----------------------------------------------------------------------------------------------------


@supports
@every_way
def test_gradients_reach_the_chosen_alone(way, support):
    x, W, bias = (t.requires_grad_() for t in layer(60, 20, 300))
    with forced(way):
        code = encode(x, W, bias, support, 5)
    weights = randn(code.nnz)
    got = torch.autograd.grad((code.magnitudes * weights).sum() + code.u.sum(), (x, W, bias))
    a, b, c = (t.detach().double().requires_grad_() for t in (x, W, bias))
    u64 = (a @ b.T)[code.row_ids(), code.indices.long()]
    pi = u64 + c[code.indices.long()]
    want = torch.autograd.grad((values_of(pi, support) * weights).sum() + u64.sum(), (a, b, c))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)


@supports
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # torch 2.8 does not take it from fullgraph
def test_compiles_as_one_graph(support):
    x, W, bias = layer(60, 20, 300)

    def f(x):
        return ops.decode(encode(x, W, bias, support, 5), W)

    assert_same_bits(torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x))
