"""The screen of encode: its bound, its candidates, and that every route to the support has the same bits.

A member is what the fixed-order fp32 dots say (the route "dots").  Random data cannot show that the bound is needed: every
term has a case of its own, whose members go missing when that term alone is taken away.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import ways
from helpers import Judge, assert_is_code, assert_same_bits, dense, grid, make_inputs, randn, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from problems.screen import LAYERS
from torch import Tensor
from ways import BOUNDED, TERMS, WAYS, forced, product_in_order

import sae_fast as sf
from sae_fast import ops
from sae_fast.ops import dispatch
from sae_fast.ops.dispatch import _C
from sae_fast.ops.encode import bound, cpu, screen


def encode(x: Tensor, W: Tensor, bias: Tensor, cut: Tensor | None = None, **options):
    kind = dict(activation="relu") if cut is None else dict(activation="jumprelu", threshold=cut)
    return ops.encode(x, W, bias, **kind, **options)


def assert_screened_as_dotted(x: Tensor, W: Tensor, bias: Tensor, cut: Tensor | None = None):
    """The screen misses nothing and verification drops all that is false: bitwise the code of dots for every entry."""
    with forced("dots"):
        truth = encode(x, W, bias, cut)
    for way in BOUNDED:
        with forced(way):
            assert_same_bits(truth, encode(x, W, bias, cut))
    return truth


def assert_float64s_support(code, x: Tensor, W: Tensor, bias: Tensor, cut: Tensor | None = None, clear: float = 0.99):
    """Wherever |π − cut| exceeds 1e-5 ‖x‖‖w‖, which is almost everywhere."""
    assert_is_code(code)
    excess = x.double() @ W.double().T + bias.double() - (0 if cut is None else cut.double().clamp(min=0))
    decided = excess.abs() > 1e-5 * x.double().norm(dim=1)[:, None] * W.double().norm(dim=1)
    assert decided.double().mean() >= clear
    member = dense(code, torch.ones(code.nnz)) > 0
    assert torch.equal(member[decided], (excess > 0)[decided])


# ---- The bound: a case for each of its terms --------------------------------------------------------------------------

HALF_ULP = 2.0**-8 * (1 - 2.0**-10)  # of 1 in bfloat16, or nearly: 1 + HALF_ULP is rounded to 1


@dataclass(frozen=True)
class Edge:
    """One pre-activation just above 0, which ``term`` alone keeps a candidate: with no more of it than ``factors`` it is
    lost.  ``without``: terms that would cover for it."""

    term: str
    x: Tensor
    w: Tensor
    bias: float
    factors: tuple[float, ...] = (0.0,)
    without: tuple[str, ...] = ()

    def members(self, way: str, without: dict[str, float]) -> int:
        """Of 64 rows and 32 features alike, so that the product takes its usual way."""
        with forced(way, without=without):
            return encode(self.x.repeat(64, 1), self.w.repeat(32, 1), torch.full((32,), self.bias)).nnz

    def kept_by_the_product(self) -> bool:
        x, w = self.x.repeat(64, 1).bfloat16(), self.w.repeat(32, 1).bfloat16()
        with forced("screen"):
            return bool((screen.product(x, w, x.new_empty(64, 32)) + self.bias > 0).all())


def ones(d: int, n: int | None = None) -> Tensor:
    """[d], the first n of them 1."""
    return (torch.arange(d) < (d if n is None else n)).float()


def residual_edge(term: str, d: int, part: float, factors: tuple[float, ...]) -> Edge:
    """Rounding takes HALF_ULP from every element of one operand, always against the sum, and the bias all but ``part``."""
    off = ones(d) * (1 + HALF_ULP)
    x, w = (off, ones(d)) if term == "x_residual" else (ones(d), off)
    return Edge(term, x, w, -d * (1 + part * 2.0**-8), factors)


def outlier_edge() -> Edge:
    """Only outlier columns are not 0; rounding takes HALF_ULP from each of their weights."""
    x, w = ones(64, 4) * (1 + 2.0**-9), ones(64, 4) * (1 + HALF_ULP)
    return Edge("w_outliers", x, w, -4 * (1 + 2.0**-9) * (1 + 0.95 * HALF_ULP), (0.0, 0.5, 0.9))


def low_edge() -> Edge:
    """The high part takes 2^-9, the low part misses all but 2^-17, as much as it can: less than what the sums may lose."""
    x = ones(64, 4) * (1 + 2.0**-9 + 2.0**-17 - 2.0**-23)
    return Edge(
        "low_residual", x, ones(64, 4), -4 * (1 + 2.0**-9 + 0.9 * 2.0**-17), (0.0, 0.5, 0.9), ("accumulation", "bias")
    )


def cancelling_edge(d: int) -> Edge:
    """The product adds small terms to 2^13, which swallows them, and takes 2^13 away in the end.  The dots keep the two in
    a lane of their own."""
    x = ones(d) * 2.0**-18
    x[::16] = 0
    x[0], x[-16] = 2.0**13, -(2.0**13)
    return Edge("accumulation", x, ones(d), -float(x.sum(dtype=torch.float64)) / 2)


def flushed_edge(term: str) -> Edge:
    """All that is not 0 against 0 is subnormal: rounding takes all of it."""
    big, small = ones(64, 1), (ones(64) - ones(64, 1)) * 2.0**-130
    other = (ones(64) - ones(64, 1)) * 2.0**30
    x, w = (big + small, other) if term == "x_residual" else (other, big + small)
    return Edge(term, x, w, 0.0, without=("accumulation", "least"))


EDGES = {
    "x residuals": residual_edge("x_residual", 768, 0.985, (0.0, 0.5, 0.9)),
    "x residuals, narrow": residual_edge("x_residual", 8, 0.985, (0.0, 0.5, 0.9)),
    "x residuals, far inside": residual_edge("x_residual", 768, 0.5, (0.0,)),
    "w residuals": residual_edge("w_residual", 768, 0.985, (0.0, 0.5, 0.9)),
    "w residuals, narrow": residual_edge("w_residual", 8, 0.985, (0.0, 0.5, 0.9)),
    "flushed x": flushed_edge("x_residual"),
    "flushed w": flushed_edge("w_residual"),
    "outlier columns of w": outlier_edge(),
    "low parts": low_edge(),
    "cancelling sums": cancelling_edge(64),
    "cancelling sums, wide": cancelling_edge(768),
    "a bias of no piece": Edge("bias", 0 * ones(64), ones(64), 2.0**-130, without=("least",)),
    "a row outside the range": Edge("least", 2.0**-50 * ones(64), ones(64), 0.0),
}


@pytest.mark.parametrize("name", EDGES)
def test_each_term_of_the_bound_alone_keeps_its_members(name, monkeypatch):
    edge = EDGES[name]
    if edge.term == "accumulation" and edge.kept_by_the_product():  # by the order in which it adds
        assert edge.members("screen", {}) == 64 * 32
        monkeypatch.setattr(screen, "product", product_in_order)
        assert not edge.kept_by_the_product()
    assert float(edge.x.double() @ edge.w.double()) + edge.bias > 0, "a member"
    assert edge.members("dots", {}) == 64 * 32, "by the dots that define it, too"
    assert edge.members("screen", {}) == 64 * 32
    uncovered = dict.fromkeys(edge.without, 0.0)
    assert edge.members("screen", uncovered) == 64 * 32, f"{edge.term} alone keeps it"
    for factor in edge.factors:
        assert edge.members("screen", uncovered | {edge.term: factor}) == 0, f"{factor} of {edge.term} loses it"


def test_every_term_has_a_case():
    assert {edge.term for edge in EDGES.values()} == set(TERMS)
    assert screen.TERMS.tolist() == [1.0] * len(TERMS)


@pytest.mark.parametrize("term", ["x_residual", "w_residual"])
def test_a_tight_bound_survives_its_own_rounding(term):
    """Margins are bfloat16 columns: rounded down, they would lose members at some of these widths."""
    for d in range(1, 140):
        edge = residual_edge(term, d, 1 - 2.0**-8, ())
        assert edge.members("screen", {}) == 64 * 32, d


@pytest.mark.parametrize("term", ["x_residual", "w_residual"])
def test_margins_are_rounded_up_not_to_nearest(term):
    """Both factors of this margin are just less than half-way from a bfloat16 to the next, 0.7 % together, which is more
    than the other margins add."""
    taken = 2.0**-8 * 2 * (1 + 0.98 * 2.0**-8) / 5**0.5
    off, exact = ones(5) * (1 + taken), ones(5) * 237 / 128
    x, w = (off, exact) if term == "x_residual" else (exact, off)
    edge = Edge(term, x, w, -5 * 237 / 128 * (1 + 0.9985 * taken))
    assert edge.members("dots", {}) == edge.members("screen", {}) == 64 * 32


@pytest.mark.parametrize("bias", [2.0**-149, 2.0**-127, 2.0**-126, 2.0**-61, 1e-10, 3e38])
def test_a_bound_just_above_zero_survives_the_output_in_bfloat16(bias):
    """Of a row of zeros the bound is the bias and next to nothing."""
    for x in (torch.zeros(64, 8), grid(64, 8, step=1.0, reach=1, seed=0)):
        W = randn(40, 8) if x.any() else torch.zeros(40, 8)
        b = torch.full((40,), bias)
        b[::2] = -bias
        code = assert_screened_as_dotted(x, W, b)
        assert x.any() or code.nnz == 64 * 20


def test_what_is_flushed_or_rounded_is_in_the_residual_norm(isa):
    """Element for element: w̃ is the nearest bfloat16 or, for a subnormal, 0; the norms are of w and of w − w̃."""
    A = torch.cat(
        [randn(5, 67), randn(5, 67) * 2.0**-128, randn(5, 67) * 2.0**-140, randn(2, 67) * 1e37, torch.zeros(1, 67)]
    )
    A[0, :4] = torch.tensor(
        [1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-126, -(2.0**-126) * (1 - 2.0**-20)]
    )  # ties, and rounded up
    rounded = A.bfloat16()
    rounded[rounded.abs() < 2.0**-126] = 0
    shadow = ops.make_shadow(A)
    assert torch.equal(shadow.rows, rounded)
    want = torch.stack([A.double().norm(dim=1), (A.double() - rounded.double()).norm(dim=1)], 1)
    torch.testing.assert_close(shadow.norms, want, rtol=1e-12, atol=0)
    assert bool((shadow.norms[10:15, 1] == shadow.norms[10:15, 0]).all()) and bool((shadow.norms[10:15] > 0).all())
    assert shadow.norms[17].tolist() == [0, 0]


# ---- Any finite input -------------------------------------------------------------------------------------------------


def student_t(B: int, d: int) -> Tensor:
    """Heavy tails, and three dimensions a thousand times larger."""
    x = randn(B, d) / randn(2, B, d, seed=1).square().mean(0).sqrt()
    x[:, [1, d // 2, d - 1]] *= 1000
    return x


def offset(B: int, d: int) -> Tensor:
    """Two dimensions offset by 300 σ."""
    x = randn(B, d)
    x[:, [3, d // 2]] += 300
    return x


DATA = {
    "random": randn,
    "student t": student_t,
    "constant": lambda B, d: torch.full((B, d), 1 / 3),
    "sparse": lambda B, d: randn(B, d) * (randn(B, d, seed=1) > 1.6),
    "offset": offset,
}


def biases(x: Tensor, W: Tensor, l0: float) -> Tensor:
    """[F]: about l0 entries a row."""
    u = x @ W.T
    k = max(1, round(l0 * x.shape[0] / W.shape[0]))
    top = u.topk(k + 1, dim=0).values
    return -(top[-2] + top[-1]) / 2


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layers_support_is_float64s(layer, data):
    x, sae = DATA[data](300, 96), layer(96, 700, seed=0)
    cut = None
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * randn(96, seed=2))
        if layer is sf.JumpReluSAE:
            cut = sae.threshold.copy_(0.1 * randn(700, seed=4)).clone()
        x_c, (bias, *_) = x - sae.b_dec, sae.per_feature
        bias = getattr(sae, bias).copy_(biases(x_c, sae.W_enc, 20) + (0 if cut is None else cut.clamp(min=0)))
        bias += 1e-2 * x_c.norm(dim=1).mean() * randn(700, seed=5)  # of rows all alike, some are in and some are not
        with forced("dots"):
            code = sae.encode_sparse(x)
        for way in BOUNDED:
            with forced(way):
                assert_same_bits(code, sae.encode_sparse(x))
    assert 0 < code.nnz < 0.7 * 300 * 700
    assert_float64s_support(code, x_c, sae.W_enc.detach(), bias, cut)


@pytest.mark.parametrize("cut", [False, True], ids=["no cut", "cut"])
@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-130, 2.0**-70, 2.0**-41, 2.0**-39, 2.0**39, 2.0**41, 2.0**100, 3e38])
def test_norms_at_the_ends_of_fp32s_range_lose_nothing(scale, cut):
    """In some rows of x, in some features, in the bias, and in all of them; overflow to an infinity or NaN is kept."""
    x, W, bias = randn(70, 33).clamp(-1, 1), randn(90, 33, seed=1).clamp(-1, 1), randn(90, seed=2).clamp(-1, 1)
    x[::3], W[::3], bias[::3] = x[::3] * scale, W[::3] * scale, bias[::3] * scale
    bias[::5] = 0
    threshold = bias.roll(1).abs() if cut else None
    code = assert_screened_as_dotted(x, W, bias, threshold)
    assert 0 < code.nnz < 70 * 90


def test_rows_that_round_to_infinity_are_decided_by_the_dots():
    """±3.4e38 has no finite neighbour in bfloat16."""
    x, W, bias = randn(64, 40), randn(50, 40, seed=1), randn(50, seed=2)
    x[::2] *= (randn(32, 40, seed=3) > 1.5) * 1e-40
    x[::2, 7] = torch.finfo(torch.float32).max
    W[::2] *= (randn(25, 40, seed=4) > 1.5) * 1e-40
    W[::2, 7] = -torch.finfo(torch.float32).max
    assert bool(x.bfloat16().isinf().any()) and bool(W.bfloat16().isinf().any())
    code = assert_screened_as_dotted(x, W, bias)
    assert 0 < code.nnz < 64 * 50


@pytest.mark.parametrize("value", [3e38, -3e38, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["bias", "cut", "both"])
def test_any_bias_and_threshold(where, value):
    x, W, bias, cut = randn(64, 40), randn(50, 40, seed=1), randn(50, seed=2), randn(50, seed=3)
    if where != "cut":
        bias[::2] = value
    if where != "bias":
        cut[::3] = value
    code = assert_screened_as_dotted(x, W, bias, cut)
    assert 0 < code.nnz < 64 * 50
    counts = torch.bincount(code.indices.long(), minlength=50)
    if where == "bias" and value < 0:
        assert not counts[::2].any()
    elif where == "bias":
        assert bool((counts[::2] == 64).all()), "NaN and the largest are kept"
    elif value != value:
        assert bool((counts[::3] == 64).all()), "NaN is kept"


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
@pytest.mark.parametrize("where", ["x", "W"])
def test_a_nan_of_any_kind_is_kept(where, bits):
    x, W, bias = randn(64, 40), randn(50, 40, seed=1), torch.full((50,), -100.0)
    (x if where == "x" else W)[11, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    code = assert_screened_as_dotted(x, W, bias)
    assert code.nnz == (50 if where == "x" else 64) and bool(code.u.isnan().all())


def extremes(g: torch.Generator, *shape: int) -> Tensor:
    """Ordinary numbers; in places zeros, subnormals, ties, ±3e38; rows of any magnitude."""
    A = torch.randn(*shape, generator=g)
    special = torch.tensor(
        [0.0, -0.0, 2.0**-149, -(2.0**-127), 2.0**-126, 1 + 2.0**-8, 1 + HALF_ULP, -3e38, 3.4e38, 2.0**20]
    )
    chosen = special[torch.randint(len(special), shape, generator=g)]
    A = torch.where(torch.rand(*shape, generator=g) < torch.rand((), generator=g) ** 3, chosen, A)
    exponents = torch.randint(-150, 128, shape[:1], generator=g) * (torch.rand(shape[:1], generator=g) < 0.3)
    return (A.double() * 2.0 ** exponents.double().view(-1, *[1] * (len(shape) - 1))).clamp(-3.4e38, 3.4e38).float()


@settings(max_examples=150)
@given(
    B=st.integers(1, 70), d=st.integers(1, 90), F=st.integers(1, 70), seed=st.integers(0, 2**31), cut=st.booleans(),
    kept=st.booleans(), edge=st.booleans(), dense_above=st.sampled_from([0.0, 0.2, 2.0]), rows=st.sampled_from([16, 2048]),
)  # fmt: skip
def test_any_finite_input_has_the_support_of_the_dots(B, d, F, seed, cut, dense_above, rows, kept, edge):
    g = torch.Generator().manual_seed(seed)
    x, W, bias, threshold = extremes(g, B, d), extremes(g, F, d), extremes(g, F), extremes(g, F) if cut else None
    with forced("dots"):
        if edge:  # biases that put some entry of each feature within rounding of its threshold
            every = encode(x, W, torch.full((F,), float("inf")))
            u = every.u.view(B, F).gather(0, torch.randint(B, (1, F), generator=g))[0]
            bias = (0 if threshold is None else threshold.clamp(min=0)) - u
            bias = torch.where(torch.rand(F, generator=g) < 0.5, bias, bias.nextafter(torch.tensor(3e38)))
        truth = encode(x, W, bias, threshold)
    for way in BOUNDED:
        with forced(way, dense_above, ROWS=rows):
            assert_same_bits(truth, encode(x, W, bias, threshold, shadow=ops.make_shadow(W) if kept else None))


def test_a_bound_by_torchs_product_without_its_margin_loses_members():
    """Entries that the dots find just above their threshold, and the product just below it."""
    x, W = randn(64, 768), randn(300, 768, seed=1)
    with forced("dots"):
        u = encode(x, W, torch.full((300,), torch.inf)).u.view(64, 300)
    row = (u - x @ W.T).argmax(0)
    bias = -u.gather(0, row[None])[0].nextafter(torch.tensor(-torch.inf))  # one of each feature's entries is just a member
    with forced("dots"):
        truth = encode(x, W, bias)
    with forced("bound"):
        assert_same_bits(truth, encode(x, W, bias))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bound, "MARGIN", 0.0)
            assert encode(x, W, bias).nnz < truth.nnz


def test_matmul_precision_by_its_newer_names_is_no_bound_and_no_error(monkeypatch):
    def raises():
        raise RuntimeError("mixed names")

    kwargs = problem("relu")
    with forced("dots"):
        truth = ops.encode(**kwargs)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", raises)
    ways.take_product(monkeypatch, "bound")
    assert "newer names" in str(bound.unavailable())
    assert_same_bits(truth, ops.encode(**kwargs))


def test_of_a_dense_batch_the_product_is_taken_of_one_tile_only(monkeypatch):
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or mm(*a, **k))
    x, W = randn(100, 20), randn(2000, 20, seed=1)
    with forced("dots"):
        truth = encode(x, W, torch.zeros(2000))
    with forced("bound", 0.2, TILE=1):
        assert_same_bits(truth, encode(x, W, torch.zeros(2000)))
        assert len(products) == 1
        encode(x, W, torch.full((2000,), -10.0))
    assert len(products) == 1 + 8, "of a sparse one it is taken of each"


# ---- Candidates -------------------------------------------------------------------------------------------------------


class Recorder:
    """The engine, with its compactors at hand."""

    def __init__(self):
        self.compactors = []

    def __getattr__(self, name: str):
        return getattr(_C, name)

    def Compactor(self, **of):
        self.compactors.append(_C.Compactor(**of))
        return self.compactors[-1]

    def candidates(self) -> int:
        return sum(c.candidates() for c in self.compactors)


@pytest.mark.parametrize("data", ["random", "student t", "offset"])
def test_at_most_two_candidates_an_entry(data, monkeypatch):
    x, W = DATA[data](512, 384), torch.nn.functional.normalize(randn(3000, 384, seed=1), dim=1)
    engine, bias = Recorder(), biases(x, W, 6)
    monkeypatch.setattr(cpu, "_C", engine)
    with forced("screen"):
        code = encode(x, W, bias)
    assert 5 < code.nnz / 512 < 7
    assert code.nnz < engine.candidates() <= 2 * code.nnz, "some were false, and verification dropped them"
    assert_float64s_support(code, x, W, bias)
    if data == "offset":
        one_norm = Recorder()
        monkeypatch.setattr(cpu, "_C", one_norm)
        monkeypatch.setattr(screen, "FAR_MORE", float("inf"))
        with forced("screen"):
            assert_same_bits(code, encode(x, W, bias))
        assert one_norm.candidates() > 20 * code.nnz, "without outlier columns of their own"


@pytest.mark.parametrize("shift", [0, 5])
def test_the_sign_test_keeps_what_is_not_at_most_zero(shift, isa):
    """Of every bfloat16 there is, in whole vectors and in what is left of them; −0 is out, a NaN of either sign is in."""
    tile = torch.arange(shift - 2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[None]
    width = tile.shape[1]
    operand = torch.zeros(width)
    compactor = _C.Compactor(rows=1, parts=1)
    layer = _C.Layer(x=operand, W=operand, d=1, bias=operand, cut=None)
    compactor.add_rounded_tile(layer=layer, tile=tile, width=width, first=0, threads=1)
    nnz = compactor.nnz()
    indptr, indices, u = torch.empty(2, dtype=torch.int64), torch.empty(nnz, dtype=torch.int32), torch.empty(nnz)
    compactor.finish(indptr=indptr, indices=indices, u=u, threads=1)
    want = ~(tile[0].float() <= 0)
    assert torch.equal(indices.long(), want.nonzero()[:, 0])
    assert torch.equal(u.nan_to_num(nan=-1.0), tile[0].float()[want].nan_to_num(nan=-1.0))


@pytest.mark.parametrize("ways", [*((w, above) for w in BOUNDED for above in (2.0, 0.2, 0.0)), ("dots", 2.0)], ids=str)
def test_no_buffer_overflows(ways, isa):
    """Tiles of few entries, then of all: the lists of candidates, of entries and the block of dots all have to grow."""
    x, W = randn(257, 20), randn(2000, 20, seed=1)
    bias = torch.full((2000,), -5.0)
    bias[600:1500] = 1000
    bias[1900:] = -1000
    with forced("dots"):
        truth = encode(x, W, bias)
    with forced(*ways, TILE=1, ROWS=100):
        code = encode(x, W, bias)
    assert_same_bits(truth, code)
    assert_float64s_support(code, x, W, bias)
    assert code.nnz > 257 * 900


# ---- The same bits by every way ---------------------------------------------------------------------------------------


def problem(activation: str) -> dict:
    """Sparse in most features, dense in some, so that all ways of deciding a block are taken."""
    p = make_inputs(300, 100, 1100)
    bias = p.b_gate.clone()
    bias[500:800] += 3
    kwargs = dict(x=p.x_c, W_enc=p.W_enc, bias=bias, activation=activation)
    if activation == "gated":
        kwargs |= dict(r_mag=p.r_mag, b_mag=p.b_mag)
    if activation == "jumprelu":
        kwargs |= dict(threshold=0.1 * randn(1100, seed=3))
    return kwargs


@pytest.mark.parametrize("slack", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["gated", "relu", "jumprelu"])
def test_routes_chunks_threads_and_shadows_change_no_bit(activation, slack):
    kwargs = problem(activation) | dict(slack=slack)
    with forced("dots"):
        truth = ops.encode(**kwargs)
    shadow = ops.make_shadow(kwargs["W_enc"])
    chunks = [  # ROWS, TILE; a shadow or none; threads
        (2048, 2**21, None, 1), (2048, 2**21, shadow, 3), (100, 1, shadow, 2), (64, 2**15, None, 2), (1, 1, None, 3),
    ]  # fmt: skip
    ways = [(way, above, *chunk) for way in BOUNDED for above in (0.0, 0.2, 2.0) for chunk in chunks]
    ways += [("dots", 0.2, 70, 2**13, None, 1), ("dots", 0.2, 70, 2**13, shadow, 3)]
    for way, dense_above, rows, tile, kept, threads in ways:
        torch.set_num_threads(threads)
        with forced(way, dense_above, ROWS=rows, TILE=tile):
            code = ops.encode(**kwargs, shadow=kept)
        assert_same_bits(truth, code)
    torch.set_num_threads(2)
    assert_same_bits(truth, ops.encode(**kwargs))  # by whatever way it takes by itself


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("B", [1, 3, 4, 5, 63, 64, 65])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(B, way):
    kwargs = problem("relu")
    with forced(way):
        whole = ops.encode(**kwargs)
        part = ops.encode(**kwargs | dict(x=kwargs["x"][100 : 100 + B]))
    a, b = int(whole.indptr[100]), int(whole.indptr[100 + B])
    assert_same_bits([whole.indices[a:b], whole.u[a:b], whole.values[:, a:b]], [part.indices, part.u, part.values])


@pytest.mark.parametrize("rows, matmul", [(300, "highest"), (47, "highest"), (300, "high")])
def test_without_a_bfloat16_product_torchs_is_the_bound_or_every_entry_is_dotted(rows, matmul, monkeypatch, caplog):
    kwargs = problem("gated")
    kwargs["x"], shadow = kwargs["x"][:rows], ops.make_shadow(kwargs["W_enc"])
    with forced("dots"):
        expected = ops.encode(**kwargs)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    ways.take_product(monkeypatch, "bound")
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level("DEBUG", logger="sae_fast"):
        for precision in ("exact", "bf16"):
            assert_same_bits(expected, ops.encode(**kwargs, precision=precision, shadow=shadow))
    assert [r.message for r in caplog.records if "this is a test" in r.message] == [
        "encode: not screened: this is a test; "
        + {
            (300, "highest"): "torch's fp32 product is the bound",
            (47, "highest"): "fp32 dots of every entry: fewer than 48 rows",
            (300, "high"): "fp32 dots of every entry: torch's matmul precision is not 'highest'",
        }[rows, matmul]
    ]
    assert ops.KeptShadow().of(kwargs["W_enc"]) is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(257, 100, 300), (64, 769, 70), (65, 1, 33), (70, 15, 31)], ids=str)
def test_instruction_sets_with_the_same_lanes_have_the_same_bits_and_the_plain_one_up_to_rounding(shape, way):
    p = make_inputs(*shape)
    codes = {}
    for isa in _C.supported_isas():
        _C.set_isa(isa)
        with forced(way):
            codes[isa] = ops.encode(p.x_c, p.W_enc, p.b_gate, activation="gated", r_mag=p.r_mag, b_mag=p.b_mag)
    if {"avx512", "avx2"} <= set(codes):
        assert_same_bits(codes["avx512"], codes["avx2"])
    own, plain = p.x_c @ p.W_enc.T, codes["plain"]
    exact, trials = p.x_c.double() @ p.W_enc.double().T, Judge()
    for code in codes.values():
        assert_same_bits([code.indptr, code.indices], [plain.indptr, plain.indices])
        member = dense(code, torch.ones(code.nnz)) > 0
        trials.add("u", dense(code, code.u), own * member, exact * member)
    trials.verdict()


# ---- Precision --------------------------------------------------------------------------------------------------------


def test_in_fp32_torchs_product_decides(isa):
    kwargs = problem("relu")
    u = kwargs["x"] @ kwargs["W_enc"].T
    member = u + kwargs["bias"] > 0
    for shadow in (None, ops.make_shadow(kwargs["W_enc"])):
        code = ops.encode(**kwargs, precision="fp32", shadow=shadow)
        assert torch.equal(dense(code, torch.ones(code.nnz)) > 0, member) and same_bits(code.u, u[member])
    assert not same_bits(code.u, ops.encode(**kwargs).u), "the dots' order is another"


@pytest.mark.parametrize("activation", ["gated", "relu", "jumprelu"])
def test_in_bf16_the_product_decides_and_only_near_the_threshold_is_it_wrong(activation, isa):
    kwargs = problem(activation)
    exact = ops.encode(**kwargs)
    cut = kwargs["threshold"].clamp(min=0) if activation == "jumprelu" else 0
    u = kwargs["x"].double() @ kwargs["W_enc"].double().T
    excess = u + kwargs["bias"] - cut
    size = kwargs["x"].norm(dim=1)[:, None] * kwargs["W_enc"].norm(dim=1)
    codes = []
    for shadow in (None, ops.make_shadow(kwargs["W_enc"])):
        with forced("screen", TILE=2**15):
            code = ops.encode(**kwargs, precision="bf16", shadow=shadow)
        assert_is_code(code)
        member = dense(code, torch.ones(code.nnz)) > 0
        clear = excess.abs() > 2.0**-6 * size
        assert clear.double().mean() > 0.9 and torch.equal(member[clear], (excess > 0)[clear])
        error = (dense(code, code.u).double() - u * member).abs()
        assert bool((error <= 2.0**-7 * size + 2.0**-8 * excess.abs()).all())
        assert not torch.equal(member, dense(exact, torch.ones(exact.nnz)) > 0), "some come and go"
        codes.append(code)
    assert_same_bits(*codes)


def test_in_bf16_a_feature_that_is_switched_off_stays_off():
    """By a bias of −∞; and one of +∞ is on."""
    x, W, bias = randn(64, 40), randn(50, 40, seed=1), randn(50, seed=2)
    bias[::2], bias[1::4] = -float("inf"), float("inf")
    for precision in ("exact", "fp32", "bf16"):
        with forced("screen"):
            counts = torch.bincount(encode(x, W, bias, precision=precision).indices.long(), minlength=50)
        assert not counts[::2].any() and bool((counts[1::4] == 64).all()), precision


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_in_bf16_a_nan_of_any_kind_is_kept(bits):
    x, W, bias = randn(64, 40), randn(50, 40, seed=1), torch.full((50,), -100.0)
    x[11, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    with forced("screen"):
        code = encode(x, W, bias, precision="bf16")
    assert code.nnz == 50 and bool(code.u.isnan().all())


@pytest.mark.parametrize("bad", ["bfloat16", "", None, 32])
@pytest.mark.parametrize("layer", LAYERS)
def test_an_unknown_precision_is_a_value_error_that_names_it(layer, bad):
    with pytest.raises(ValueError, match=r"precision: got .*, want one of \('exact', 'fp32', 'tf32', 'bf16'\)"):
        layer(4, 8, precision=bad)
    sae = layer(4, 8)
    with pytest.raises(ValueError, match="precision: got"):
        sae.precision = bad
    assert sae.precision == "exact" and "precision" not in repr(sae)
    if isinstance(bad, str):
        with pytest.raises(ValueError, match=f"precision: got {bad!r}"):
            encode(randn(3, 4), randn(8, 4), randn(8), precision=bad)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layers_precision_is_that_of_its_product(layer):
    x = randn(300, 40)
    codes = {}
    for precision in cpu.PRECISIONS:
        sae = layer(40, 500, seed=0, precision=precision)
        sae.calibrate_(x, 20)
        with forced("screen"):
            codes[precision] = sae.encode_sparse(x)
            if layer is not sf.JumpReluSAE:  # the loss's code is that of encode_sparse
                loss = sae.loss(x, 1.0).sparsity
                expected = codes[precision].gates.double().sum() / 300
                torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        assert ("precision" in repr(sae)) == (precision != "exact")
    for a, b in (("exact", "fp32"), ("exact", "bf16"), ("fp32", "bf16")):
        assert not same_bits(codes[a].u, codes[b].u)
