"""The CUDA kernel of verify; without a GPU over the shim, which makes every thread a fiber."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import Judge, assert_same_bits
from problems.encode import ACTIVATIONS, double, exact_problem, plain
from torch import Tensor

pytest.importorskip("triton")

from problems.cuda_verify import DEVICE, INF, NAN, Verified, problem, rows_like, verified
from problems.triton_encode import SMALL, on, set_tiles

from sae_fast.kernels import native
from sae_fast.kernels import round as rounding

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEPTHS = [1, 3, 63, 100, 256, 769, 2304]
WIDE = [11265, 11272]  # x does not fit shared memory; aligned or not


@pytest.fixture(autouse=True)
def small_tiles(cuda_calls, monkeypatch):
    set_tiles(monkeypatch, SMALL)


def under_every_schedule(run):
    """What ``run`` gives, the same bits whichever thread goes first; on a GPU, again and again."""
    results = []
    for schedule in range(getattr(native.module, "schedules", 3)):
        if hasattr(native.module, "set_schedule"):
            native.module.set_schedule(schedule)
        try:
            results.append(run())
        finally:
            if hasattr(native.module, "set_schedule"):
                native.module.set_schedule(0)
        assert_same_bits(results[0], results[-1])
    return results[0]


# ---- verify -----------------------------------------------------------------------------------------------------------


def clear_of_ties(kwargs: dict) -> Tensor:
    """[B, F]: which pre-activations no rounding of a sum takes across the cut."""
    k = double(kwargs)
    cut = k["threshold"].clamp(min=0) if "threshold" in k else 0
    return (k["x"] @ k["W_enc"].T + k["bias"] - cut).abs() > 1e-5 * k["x"].norm(dim=1)[:, None] + 1e-5


def judge_listed(found: Verified, kwargs: dict, listed: Tensor, trials: Judge) -> None:
    """The members are float64's among the candidates; u and values go into ``trials``."""
    code = found.code(listed.shape[1])
    (member, u64, values64), (_, u, values) = plain(**double(kwargs)), plain(**kwargs)
    member &= listed
    assert torch.equal(code.indices.long(), member.nonzero()[:, 1]) and torch.equal(code.indptr.diff(), member.sum(1))
    trials.add("u", code.u, u[member], u64[member])
    trials.add("values", code.values, values[:, member], values64[:, member])


@pytest.mark.slow(but=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_verify_is_as_near_to_float64_as_torchs(activation, dtype, cuda_calls):
    for d in DEPTHS:
        trials, kwargs = Judge(), problem(d, activation, dtype)
        listed = rows_like(5, 150) & clear_of_ties(kwargs)
        assert not listed[1].any() and listed[2].sum() > 128, "more than a chunk"
        judge_listed(verified(kwargs, listed), kwargs, listed, trials)
        trials.verdict()
    assert set(cuda_calls) == {"verify"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_verify_of_rows_wider_than_shared_memory(dtype):
    for d in WIDE:
        trials, kwargs = Judge(), problem(d, "gated", dtype, 3, 20)
        listed = rows_like(3, 20) & clear_of_ties(kwargs)
        judge_listed(verified(kwargs, listed), kwargs, listed, trials)
        trials.verdict()


@pytest.mark.parametrize("slack", [None, 0.75])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_verify_drops_ties_and_keeps_a_slacks_window(activation, slack):
    kwargs = exact_problem(7, 63, 140, activation) | ({} if slack is None else dict(slack=slack))
    listed = rows_like(7, 140, seed=1)
    code = verified(kwargs, listed).code(140)
    member, u, values = plain(**double(kwargs))
    pi = u + kwargs["bias"]
    assert (pi == kwargs.get("threshold", torch.zeros(140)).clamp(min=0))[listed].any()
    member &= listed
    assert 0 < int(member.sum()) < int(listed.sum())
    assert torch.equal(code.indptr.diff(), member.sum(1)) and torch.equal(code.indices.long(), member.nonzero()[:, 1])
    assert torch.equal(code.u.double(), u[member]) and torch.equal(code.values.double(), values[:, member])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_verify_keeps_what_is_not_finite(activation):
    kwargs = exact_problem(5, 9, 40, activation)
    kwargs["W_enc"][:20], kwargs["W_enc"][20:] = 1, -1
    kwargs["x"][0, 3], kwargs["x"][3, 8] = NAN, INF
    code = verified(kwargs, torch.ones(5, 40, dtype=torch.bool)).code(40)
    nan, inf = (slice(int(code.indptr[b]), int(code.indptr[b + 1])) for b in (0, 3))
    assert code.indices[nan].tolist() == list(range(40)) and code.indices[inf].tolist() == list(range(20))
    assert bool(code.u[nan].isnan().all()) and bool(code.values[:, nan].isnan().all())
    assert bool((code.values[:, inf] == INF).all())
    member, u, _ = plain(**double(kwargs))
    assert torch.equal(code.u[nan.stop : inf.start].double(), u[1:3][member[1:3]])


def test_verify_leaves_rows_that_do_not_fit_empty():
    """The last candidate is one too many: of the last row nothing is read or written."""
    kwargs, listed = exact_problem(5, 63, 140, "gated"), rows_like(5, 140, seed=2)
    whole = verified(kwargs, listed)
    for lost in (3, 4, 3 + int(listed[4].sum()), 7 + int(listed[4].sum()), 10**9):
        lost = min(lost, len(whole.indices))
        found = verified(kwargs, listed, lost=lost)
        C = len(whole.indices) - lost
        fits = whole.begin + listed.sum(1) <= C
        assert bool(fits.all()) == (lost == 3)
        assert torch.equal(found.end, torch.where(fits, whole.end, whole.begin))
        for b in fits.nonzero()[:, 0].tolist():
            at = slice(int(whole.begin[b]), int(whole.end[b]))
            assert_same_bits(
                [t[..., at] for t in (whole.indices, whole.u, whole.values)],
                [t[..., at] for t in (found.indices, found.u, found.values)],
            )
        inside = replace(found, begin=found.begin.clamp(max=C), end=found.end.clamp(max=C))
        inside.code(140)


def scaled_copy(A: Tensor) -> tuple[Tensor, Tensor]:
    """As round_rows', whose sums of squares verify does not read."""
    scale = torch.exp2(13.0 - torch.frexp(A.float().abs().amax(1, keepdim=True)).exponent)
    rows = torch.zeros(len(A), rounding.padded(A.shape[1]), dtype=torch.float16)
    rows[:, : A.shape[1]] = A.float() * scale
    return rows, torch.cat([scale, torch.full((len(A), rounding.norm_columns(A.shape[1]) - 1), NAN)], dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_copies_keep_every_candidate(dtype):
    """With u at the true scale, whatever the cut and the bias."""
    for d in (1, 63, 600):
        trials, kwargs, listed = Judge(), problem(d, "jumprelu", dtype, 5, 140), rows_like(5, 140)
        copies = [scaled_copy(kwargs[name]) for name in ("x", "W_enc")]
        scaled = kwargs | dict(x=copies[0][0], W_enc=copies[1][0])
        found = verified(scaled, listed, norms=(on(copies[0][1]), on(copies[1][1])))
        code = found.code(140)
        assert torch.equal(code.indptr.diff(), listed.sum(1)) and torch.equal(code.indices.long(), listed.nonzero()[:, 1])
        true = kwargs | {
            name: rows[:, :d].double() / norms[:, :1].double()
            for name, (rows, norms) in zip(("x", "W_enc"), copies, strict=True)
        }
        (_, u64, values64), (_, u, values) = plain(**double(true)), plain(**kwargs)
        if dtype == torch.float32:  # beside torch's own of the same copies
            _, u, values = plain(**true | {n: true[n].float() for n in ("x", "W_enc")})
        trials.add("u", code.u, u[listed], u64[listed])
        trials.add("values", code.values, values[:, listed], values64[:, listed])
        trials.verdict()


def misaligned(t: Tensor) -> Tensor:
    memory = torch.full((t.numel() + 1,), NAN, dtype=t.dtype, device=DEVICE)
    memory[1:] = on(t).flatten()
    return memory[1:].view_as(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [3, 256, 11272])
def test_u_hangs_neither_on_a_candidates_place_nor_on_alignment(d, dtype):
    kwargs = problem(d, "relu", dtype, 3, 40) | dict(bias=torch.full((40,), 1e4, dtype=dtype))
    every = torch.ones(3, 40, dtype=torch.bool)
    u = verified(kwargs, every).code(40).u.view(3, 40)
    assert u.unique().numel() > 40
    for seed in range(3):
        listed = torch.rand(3, 40, generator=torch.Generator().manual_seed(seed)) < (seed + 1) / 4
        assert_same_bits(u[listed], verified(kwargs, listed).code(40).u)
    for names in (["W_enc"], ["x"], ["x", "W_enc"]):
        shifted = kwargs | {n: misaligned(kwargs[n]) for n in names}
        assert shifted[names[0]].data_ptr() % 16
        assert_same_bits(u, verified(shifted, every, gap=2).code(40).u.view(3, 40))


@pytest.mark.parametrize("d, dtype", [(100, torch.float32), (63, torch.float16), (11265, torch.float32)], ids=str)
def test_verify_is_the_same_whichever_thread_goes_first(d, dtype):
    kwargs, listed = problem(d, "gated", dtype, 3, 140), rows_like(3, 140)
    if d > 1000:
        listed[:, 20:] = False
    under_every_schedule(lambda: verified(kwargs, listed))


def test_what_verify_cannot_take_says_why():
    kwargs = problem(8, "relu", torch.float32, 3, 40)
    with pytest.raises(ValueError, match="verify: outputs in another dtype"):
        verified(kwargs | dict(x=kwargs["x"].bfloat16(), W_enc=kwargs["W_enc"].bfloat16()), rows_like(3, 40))
