"""The largest of a code in Triton: what a floor lets through, and the choice among what was found.

The truth is a stable sort of π as the float32 dots give it for every entry.  A floor may hide nothing that reaches it; each
part of that argument has a case that loses an entry without it.
"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_is_code, assert_same_bits, dense, grid, randn
from problems import bodies
from problems.bodies import Body
from torch import Tensor

pytest.importorskip("triton")

from problems.triton_encode import DEVICE, SMALL, on, set_tiles

from sae_fast import activations, ops
from sae_fast.code import Layer, Shadow, SparseCode
from sae_fast.kernels import _mask, compact, round
from sae_fast.kernels import encode as pipeline
from sae_fast.kernels import flag as flag_bits
from sae_fast.kernels.compact import Gapped
from sae_fast.kernels.largest import Largest, largest
from sae_fast.ops.encode import gpu

INF, NAN = float("inf"), float("nan")
whole_or_not = pytest.mark.parametrize("whole", [False, True], ids=["rows", "batch"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    set_tiles(monkeypatch, SMALL)


def sorted_choice(pi: Tensor, support: str, k: int) -> Tensor:
    """[B, F]: the largest positive entries, a NaN before all, and of equal ones the first, by a stable sort of it all."""
    rank = pi.double().masked_fill(pi == INF, 1e300).masked_fill(pi.isnan(), INF)
    flat, n = (rank, k) if support == "topk" else (rank.reshape(1, -1), k * pi.shape[0])
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True).view_as(pi) & ~(pi <= 0)


def flag(value: int = 0) -> Tensor:
    return on(torch.full((), value, dtype=torch.int32))


# ---- The choice -------------------------------------------------------------------------------------------------------


def found(pi: Tensor, listed: Tensor) -> Gapped:
    """A code of those entries of pi [B, F], all in u, with rubbish in its gaps but for the values."""
    counts = listed.sum(1)
    end = (counts + 2).cumsum(0)
    C = int(end[-1]) + 3
    indices, u, values = torch.full((C,), 2**30, dtype=torch.int32), torch.full((C,), NAN), torch.zeros(1, C)
    for b, last in enumerate(end.tolist()):
        at, own = slice(last - int(counts[b]), last), listed[b].nonzero()[:, 0]
        indices[at], u[at], values[0, at] = own.int(), pi[b, own], torch.relu(pi[b, own])
    return Gapped(*map(on, (end - counts, end, indices, u, values)))


def kept(code: Gapped, features: int) -> Tensor:
    """[B, F] bool; each row in ascending order, nothing in the gaps' values."""
    begin, end, indices, values = (t.cpu() for t in (code.begin, code.end, code.indices, code.values))
    chosen, gaps = torch.zeros(len(begin), features, dtype=torch.bool), torch.ones(len(indices), dtype=torch.bool)
    for b, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        own, gaps[first:last] = indices[first:last].long(), False
        assert bool((own.diff() > 0).all())
        chosen[b, own] = True
    assert not values[:, gaps].any()
    return chosen


def relu_layer(features: int) -> Layer:
    return Layer.of(torch.zeros(features, 1, device=DEVICE), torch.zeros(features, device=DEVICE), "relu", {})


def some_pi(kind: str) -> Tensor:
    """[9, 60]: spread over the range of float32; with many ties; with NaNs and infinities."""
    pi = randn(9, 60)
    if kind == "range":
        return pi * 2.0 ** torch.linspace(-149, 126, 540).round()[torch.randperm(540)].view(9, 60)
    pi = (2 * pi).round() / 2
    if kind == "not finite":
        pi[2, 7:40:3], pi[4, 3], pi[6, 1] = NAN, NAN, INF
    return pi


@whole_or_not
@pytest.mark.parametrize("kind", ["range", "ties", "not finite"])
@pytest.mark.parametrize("block", [4, 64])
def test_the_choice_is_that_of_a_stable_sort(block, kind, whole, monkeypatch):
    """Of rows that have fewer than k, more, or none; in several blocks or one."""
    set_tiles(monkeypatch, {"largest": {"counted": 16, "block": block, "warps": 1}})
    pi = some_pi(kind)
    listed = (torch.rand(9, 60, generator=torch.Generator().manual_seed(1)) < 0.7) & ~(pi <= 0)
    listed[5] = False
    code = found(pi, listed)
    for k in (1, 7, 40):
        set_flag = flag()
        out = largest(code, relu_layer(60), Largest(k, whole), set_flag)
        want = sorted_choice(torch.where(listed, pi, -1.0), "batch_topk" if whole else "topk", k)
        assert torch.equal(kept(out, 60), want) and int(set_flag) == 0
        again = largest(code, relu_layer(60), Largest(k, whole), set_flag)
        assert_same_bits([kept(out, 60), out.values], [kept(again, 60), again.values])
        u = torch.cat([out.u[a:b] for a, b in zip(out.begin.tolist(), out.end.tolist(), strict=True)]).cpu()
        assert_same_bits(u, pi[want])


def test_of_ties_in_a_batch_the_lower_rows_win_whatever_run_they_are_in(monkeypatch):
    set_tiles(monkeypatch, {"largest": {"counted": 8, "block": 4, "warps": 1}})
    pi = torch.ones(30, 11)
    pi[3] = 2
    code = found(pi, torch.ones(30, 11, dtype=torch.bool))
    for k in (1, 2, 7):
        out = largest(code, relu_layer(11), Largest(k, True), flag())
        assert torch.equal(kept(out, 11), sorted_choice(pi, "batch_topk", k))


@whole_or_not
def test_a_floor_that_hid_some_of_the_largest_is_noticed(whole):
    """Rows of 1 .. 60: the 5 largest reach 56; a floor at 56 hides none, one above it one."""
    pi = torch.arange(1.0, 61).repeat(4, 1)
    least = 56.0
    for floor, short in ((least, False), (57.0, True), (0.0, False), (-INF, False), (NAN, False), (INF, True)):
        floors = on(torch.tensor([0.0, floor, 0.0, -1.0]))
        set_flag = flag(1 << 7)
        out = largest(found(pi, torch.ones(4, 60, dtype=torch.bool)), relu_layer(60), Largest(5, whole, floors), set_flag)
        assert int(set_flag) == (1 << 7 | (flag_bits.SHORT if short else 0)), floor
        want = sorted_choice(pi, "topk", 5)
        want[1] &= not short
        assert torch.equal(kept(out, 60), want)
    few = found(pi, torch.arange(60).expand(4, 60) < 3)
    which = Largest(5, whole, on(torch.full((4,), 1.0)))
    out = largest(few, relu_layer(60), which, set_flag := flag())
    assert int(set_flag) == flag_bits.SHORT and not kept(out, 60).any(), "of fewer than k there may be others below"
    largest(few, relu_layer(60), which, set_flag := flag(flag_bits.OVERFLOW))
    assert int(set_flag) == flag_bits.OVERFLOW, "what did not fit is no fault of the floor"


# ---- The floor --------------------------------------------------------------------------------------------------------


def screened(x: Tensor, W: Tensor, bias: Tensor, floor: Tensor, exact: bool = True) -> tuple[Tensor, Tensor]:
    """(candidates, π of all entries by the dots that decide), [B, F]."""
    B, F = x.shape[0], W.shape[0]
    layer = Layer.of(on(W), on(bias), "relu", {}, shadow=Shadow(*round.rounded(on(W))))
    found = pipeline.candidates(on(x), layer, exact, floor=on(floor))
    word, bit = _mask.places(torch.arange(F))
    passed = (found.mask.cpu()[:, word] >> bit) & 1 == 1
    begin = on(torch.arange(B) * F)
    every = on(torch.arange(F, dtype=torch.int32).repeat(B))
    u, values = torch.empty(B * F, device=DEVICE), torch.empty(1, B * F, device=DEVICE)
    code = Gapped(begin, torch.empty_like(begin), torch.empty_like(every), u, values)
    open_layer = layer._replace(bias=on(torch.full((F,), INF)))
    compact.verify(*((on(x), open_layer) if exact else (found.x, open_layer)), begin + F, every, code,
                   *(() if exact else (found.norms,)))  # fmt: skip
    return passed, u.view(B, F).cpu() + bias


def powers(n: int, reach: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (2.0 ** torch.linspace(-reach, reach, n).round())[torch.randperm(n, generator=g)][:, None]


def offset(x: Tensor, W: Tensor, bias: Tensor):
    x[:, [3, 40]] += 300
    return x, W, bias


def zeros(x: Tensor, W: Tensor, bias: Tensor):
    x[::3], W[::4] = 0, 0
    return x, W, bias


DATA = {
    "random": lambda x, W, bias: (x, W, bias),
    "offset": offset,
    "zeros": zeros,
    "zeros, biases of any size": lambda x, W, bias: zeros(x, W, bias * powers(80, 140, 3)[:, 0]),
    "norms to 2^38": lambda x, W, bias: (x * powers(20, 36, 5), W * powers(80, 36, 6), bias),
    "norms to 2^60": lambda x, W, bias: (x * powers(20, 60, 5), W * powers(80, 60, 6), bias),
    "all biases": lambda x, W, bias: (x, W, bias * powers(80, 60, 7)[:, 0]),
    "large biases": lambda x, W, bias: (x * powers(20, 36, 5), W, bias.abs() * powers(80, 126, 7)[:, 0]),
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", DATA)
def test_whatever_reaches_the_floor_is_a_candidate(name, exact):
    """The floor is one of the row's own π, the 1st to the 20th largest: that of the dots, to the last bit."""
    x, W, bias = DATA[name](randn(20, 70), randn(80, 70, seed=1) / 70**0.5, 0.3 * randn(80, seed=2))
    _, pi = screened(x, W, bias, torch.zeros(20), exact)
    floor = torch.relu(pi).nan_to_num(posinf=3e38).sort(dim=1, descending=True).values[torch.arange(20), torch.arange(20)]
    passed, again = screened(x, W, bias, floor, exact)
    assert_same_bits(pi, again)
    member = ~(pi < floor[:, None]) & ~(pi <= 0)
    assert member.any() and not (member & ~passed).any()
    if name == "random":
        assert passed.sum() < member.sum() + 20, "and little else is"


@pytest.mark.parametrize("floor", [0.0, -1.0, -INF, NAN])
def test_what_is_no_floor_leaves_all_above_0(floor):
    x, W, bias = randn(20, 70), randn(80, 70, seed=1) / 70**0.5, 0.3 * randn(80, seed=2)
    plain, _ = screened(x, W, bias, torch.zeros(20))
    passed, pi = screened(x, W, bias, torch.full((20,), floor))
    assert torch.equal(passed, plain) and not ((pi > 0) & ~passed).any()


@pytest.mark.parametrize("floor", [2.0**60, 2.0**85, 3e38, INF])
def test_a_floor_of_any_size_hides_nothing_that_reaches_it(floor):
    """Where its product with a row's scale would overflow, and that of a bias above it with both scales would not."""
    x, W = randn(20, 70) * 2.0**-36, randn(80, 70, seed=1) * 2.0**36
    x[::5], W[::7] = 0, 0
    bias = torch.full((80,), 2.0).pow(torch.linspace(0, 127.9, 80))
    passed, pi = screened(x, W, bias, torch.full((20,), floor))
    assert not ((pi >= floor) & ~passed).any()


def test_a_floor_is_lowered_for_what_its_sum_with_the_bias_loses(monkeypatch):
    """In a row of zeros nothing else makes room: at π = floor the sum is 0 without it."""
    x, W, bias = torch.zeros(3, 70), randn(80, 70, seed=1), torch.full((80,), 1.5)
    passed, _ = screened(x, W, bias, torch.tensor([1.5, 1.5 * (1 + 2.0**-12), 1.0]))
    assert passed[0].all() and not passed[1].any() and passed[2].all()


def test_in_bf16_the_margins_are_those_of_the_sums_alone():
    """π is of the 16-bit copies there: rounding took nothing from it."""
    x, W, bias = randn(20, 700), randn(80, 700, seed=1) / 700**0.5, 0.3 * randn(80, seed=2)
    norms = [round.rounded(on(rows))[1] for rows in (x, W)]
    exact, _ = round.bound_terms(*norms, on(bias), None, 704)
    of_rows, of_features = round.bound_terms(*norms, on(bias), None, 704, lost=False)
    assert bool((of_rows[:, 3] < exact[:, 3]).all()) and bool((of_rows[:, 3] > 0).all())
    assert not of_features[:, 4].any()


# ---- Both -------------------------------------------------------------------------------------------------------------


@whole_or_not
@pytest.mark.parametrize("exact", [True, False])
def test_members_gives_the_largest_of_what_passed(exact, whole):
    """As the host's wait-free steps use it: floors a little below what the last of each row reaches, and then above."""
    x, W, bias, k = randn(9, 70), randn(80, 70, seed=1) / 70**0.5, 0.3 * randn(80, seed=2), 6
    layer = Layer.of(on(W), on(bias), "relu", {}, shadow=Shadow(*round.rounded(on(W))))
    _, pi = screened(x, W, bias, torch.zeros(9), exact)
    want = sorted_choice(pi, "batch_topk" if whole else "topk", k)
    least = pi.masked_fill(~want, INF).amin(1)
    least = least.amin().expand(9).clone() if whole else least
    for times, short in ((0.9, False), (1.0, False), (1.0001, True)):
        which, set_flag = Largest(k, whole, on(least * times)), flag()
        found = pipeline.candidates(on(x), layer, exact, floor=which.floor)
        code = pipeline.members(on(x), layer, found, 9 * 80, set_flag, exact, which)
        assert bool(int(set_flag)) == short
        if not short:
            assert torch.equal(kept(code, 80), want)
            listed = [code.values[0, a:b] for a, b in zip(code.begin.tolist(), code.end.tolist(), strict=True)]
            assert_same_bits(torch.cat(listed).cpu(), pi[want])


def test_ties_and_the_screen_together():
    """On a grid, where all is exact and every entry ties with many."""
    x, W = grid(30, 5, step=1.0, reach=1, seed=0), grid(80, 5, step=1.0, reach=1, seed=1)
    bias = grid(80, step=1.0, reach=1, seed=2)
    layer = Layer.of(on(W), on(bias), "relu", {}, shadow=Shadow(*round.rounded(on(W))))
    pi = x @ W.T + bias
    for whole in (False, True):
        want = sorted_choice(pi, "batch_topk" if whole else "topk", 6)
        least = pi.masked_fill(~want, INF).amin(1)
        which = Largest(6, whole, on(least.amin().expand(30).clone() if whole else least))
        found = pipeline.candidates(on(x), layer, True, floor=which.floor)
        assert torch.equal(kept(pipeline.members(on(x), layer, found, 30 * 80, flag(), True, which), 80), want)


# ---- ops.encode ---------------------------------------------------------------------------------------------------------


def problem(B: int, d: int, F: int, activation: str = "relu", dtype: torch.dtype = torch.float32) -> dict:
    x, W, bias = randn(B, d), randn(F, d, seed=1) / d**0.5, 0.3 * randn(F, seed=2)
    more = {"gated": dict(r_mag=0.2 * randn(F, seed=3), b_mag=randn(F, seed=4)), "jumprelu": dict(threshold=0.5 + 0 * bias)}
    kwargs = dict(x=x, W_enc=W, bias=bias, **more.get(activation, {}))
    return {name: t.to(dtype) for name, t in kwargs.items()} | dict(activation=activation)


def every_entry(body: bodies.Body, kwargs: dict, **options) -> tuple[Tensor, Tensor]:
    """(u, π) [B, F] float32, of the body's own dots: a row has every feature where biases are infinite."""
    bias = torch.full_like(kwargs["bias"], INF)
    arrays = {name: kwargs[name] for name in ("x", "W_enc")}
    code = body.run(
        ops.encode, **{n: t.float() for n, t in arrays.items()}, bias=bias.float(), activation="relu", **options
    )
    u = code.u.view(len(kwargs["x"]), len(bias))
    return u, u + kwargs["bias"].float()


def assert_largest(code: SparseCode, kwargs: dict, u: Tensor, pi: Tensor, support: str, k: int) -> None:
    assert_is_code(code)
    want = sorted_choice(pi, support, k)
    assert torch.equal(dense(code, torch.ones(code.nnz)) > 0, want)
    assert_same_bits(code.u, u[want].to(code.u.dtype))
    parameters = {n: t.float() for n, t in kwargs.items() if n in ("r_mag", "b_mag", "threshold")}
    kind = activations.named(kwargs["activation"])
    values = kind.values(u, pi, tuple(v.expand(u.shape) for v in kind.vectors(parameters)))[:, want]
    torch.testing.assert_close(code.values.float(), values, rtol=1e-6 if code.u.dtype == torch.float32 else 2e-3, atol=1e-6)


gpu_bodies = pytest.mark.parametrize("body", [Body("triton"), Body("cuda")], ids=str, indirect=True)
supports = pytest.mark.parametrize("support", ["topk", "batch_topk"])


@pytest.mark.slow(but=2, of_gpu=True)
@gpu_bodies
@supports
@pytest.mark.parametrize("activation", ["relu", "gated", "jumprelu"])
@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_the_op_gives_the_largest_whatever_the_guess(precision, activation, support, body):
    """By no guess, by good ones, by such as are too low to be of use, and by such as some rows do not reach."""
    kwargs, k = problem(9, 40, 100, activation), 5
    u, pi = every_entry(body, kwargs, precision=precision)
    want = sorted_choice(pi, support, k)
    least = pi.masked_fill(~want, INF).amin(1)
    least = least.amin().expand(9).clone() if support == "batch_topk" else least
    mixed = least * (0.5 + torch.arange(9) % 3)
    first = body.run(ops.encode, **kwargs, support=support, k=k, precision=precision)
    assert_largest(first, kwargs, u, pi, support, k)
    for guess in (0.97 * least, mixed, least * INF):
        code = body.run(ops.encode, **kwargs, support=support, k=k, precision=precision, guess=guess)
        assert_same_bits(first, code)


@pytest.mark.slow(but=1, of_gpu=True)
@gpu_bodies
@supports
@pytest.mark.parametrize("route", ["product", "none", "blocks"])
def test_every_floor_gives_the_same_bits(route, support, body, monkeypatch):
    kwargs = problem(9, 20, 150)
    u, pi = every_entry(body, kwargs)
    too_high = {"product": ["floor_of_sample"], "none": ["floor_of_sample", "sure_floor"], "blocks": []}[route]
    for name in too_high:
        monkeypatch.setattr(gpu, name, lambda x, *_: torch.full((len(x),), INF))
    if route == "blocks":
        monkeypatch.setattr(gpu, "MASK", 4 * 150)
    for k in (1, 4):
        assert_largest(body.run(ops.encode, **kwargs, support=support, k=k), kwargs, u, pi, support, k)


@pytest.mark.slow(but=1, of_gpu=True)
@gpu_bodies
@supports
def test_of_16_bit_storage_the_choice_is_by_what_is_not_rounded(support, body):
    kwargs = problem(9, 40, 100, "relu", torch.float16)
    u, pi = every_entry(Body("triton"), kwargs)
    code = body.run(ops.encode, **kwargs, support=support, k=6)
    assert code.u.dtype == torch.float16
    assert_largest(code, kwargs, u, pi, support, 6)


@pytest.mark.slow(but=1, of_gpu=True)
@gpu_bodies
@supports
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_chosen_first(bad, support, body):
    kwargs = problem(9, 40, 100)
    kwargs["x"][3, 7], kwargs["W_enc"][11, 2] = bad, bad
    kwargs["x"][5:7] = 0
    u, pi = every_entry(body, kwargs)
    code = body.run(ops.encode, **kwargs, support=support, k=6)
    member = sorted_choice(pi, support, 6)
    assert torch.equal(dense(code, torch.ones(code.nnz)) > 0, member)
    assert torch.equal(code.u.isnan(), u[member].isnan())


def test_a_sample_s_floor_is_seldom_too_high_and_lets_few_too_many_through():
    """Of a batch it is by an eighth of the rows too, so there are many."""
    x, W, bias = randn(512, 40), randn(8192, 40, seed=1) / 40**0.5, 0.1 * randn(8192, seed=2)
    layer, pi = Layer.of(W, bias, "relu", {}), x @ W.T + bias
    floor = gpu.floor_of_sample(x[:64], layer, 64, False)
    counts = (pi[:64] >= floor[:, None]).sum(1)
    assert (counts < 64).sum() <= 1 and counts.float().mean() < 3.5 * 64
    floor = gpu.floor_of_sample(x, layer, 64, True)
    assert 512 * 64 <= int((pi >= floor[:, None]).sum()) < 1.5 * 512 * 64
    assert not gpu.floor_of_sample(x[:, :40], layer, 8000, False).any(), "of a sample with too few there is none"
