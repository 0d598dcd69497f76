"""decode_loss in CUDA C++: on a GPU, or over the tests' shim (tests/cuda_shim)."""

from __future__ import annotations

import pytest
import torch
from helpers import Judge, assert_same_bits, both, randn, same_bits
from problems.decode_loss import judge_one, plain
from torch import Tensor

pytest.importorskip("triton")

from problems.cuda_decode_loss import DTYPES, STORAGE, B, D, F, problem, run
from problems.triton_rows import DEVICE, run_losses

from sae_fast.activations import named
from sae_fast.kernels import native

SHIM = DEVICE == "cpu"


pytestmark = pytest.mark.usefixtures("cuda_calls")


def judge_run(judge: Judge, code, arguments: list[Tensor], normaliser: float = 1.7, losses: bool = True) -> None:
    """``losses``: by the 2× rule too, for which three numbers of one small trial are too few."""
    residuals, rows, grads = run(code, arguments, normaliser)
    sums = (rows.sum(0, dtype=torch.float64) / normaliser).to(grads.dtype)
    out = sums, residuals[0], residuals[1:].reshape(-1, residuals.shape[-1]), grads
    torchs, exact = both(plain(code, normaliser), code.values, *(t.to(grads.dtype) for t in arguments))
    if losses:
        return judge_one(judge, out, torchs, exact)
    assert torch.allclose(sums.double(), exact[0], rtol=64 * torch.finfo(grads.dtype).eps)
    for name, *results in zip(("residual", "residual_aux", "grads"), out[1:], torchs[1:], exact[1:], strict=True):
        judge.add(name, *results)


@pytest.mark.parametrize("storage", STORAGE[3:], ids=str)
@pytest.mark.parametrize("V", [1, 2])
def test_a_target_may_be_stored_otherwise_than_the_weights(V, storage):
    judge = Judge()
    for seed in range(3):
        code, arguments = problem(V, seed, storage)
        judge_run(judge, code, arguments)
    judge.verdict()


@pytest.mark.parametrize("d", [1, 3, 63, 100, 128, 769])
def test_every_width(d):
    judge = Judge()
    for seed in range(2 if d > 3 else 12):  # of few numbers luck decides whose rounding is smaller
        code, arguments = problem(2, seed, shape=(3 if d > 3 else 9, d, 33))
        judge_run(judge, code, arguments, losses=False)
    judge.verdict()


@pytest.mark.parametrize("entries", [95, 96, 97, 193])
@pytest.mark.parametrize("storage", [STORAGE[0], STORAGE[2]], ids=str)
def test_rows_as_long_as_a_staging_and_longer(entries, storage):
    code, arguments = problem(2, 0, storage, shape=(3, 136, entries))
    assert code.indptr.diff().tolist()[1:] == [0, entries]
    judge = Judge()
    judge_run(judge, code, arguments, losses=False)
    judge.verdict()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "V"), [("relu", 1), ("gated", 2)])
def test_what_a_training_step_needs(activation, V, dtype):
    judge, normaliser = Judge(), 4.0
    code, arguments = problem(V, 1, (dtype, dtype))
    scale = (randn(F, seed=8) * 0.3).exp().to(dtype) if V == 2 else None

    def formula(values, u, scale, *arguments):
        grads = plain(code, normaliser)(values, *arguments)[3]
        along = (values * grads).sum(0) - values[-1] * arguments[3][code.indices.long()] / normaliser
        vectors = () if scale is None else (scale, scale)
        parts = named(activation).pullback(u, list(grads), code.indices.long(), vectors)
        return [*parts, *[torch.zeros_like(u)] * (4 - len(parts))], values[0] * (2 / normaliser), along

    given = (code.values, code.u, scale, *arguments)
    torchs, exact = formula(*given), formula(*(None if t is None else t.double() for t in given))
    _, _, grads, delta, entries, decoder, along = run(code, arguments, normaliser, u=code.u, scale=scale, step=True)
    assert_same_bits(grads, run(code, arguments, normaliser)[2])
    assert_same_bits(delta, entries[0])
    judge.add("decoder", decoder, torchs[1], exact[1])
    judge.add("along", along, torchs[2], exact[2])
    for name, *results in zip(("delta", "bias", "r_mag", "b_mag"), entries, torchs[0], exact[0], strict=True):
        judge.add(name, *results)
    judge.verdict()


@pytest.mark.skipif(not SHIM, reason="a GPU has its own schedule")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_schedule_gives_the_same_bits(dtype):
    code, arguments = problem(2, 3, (dtype, dtype), shape=(4, D, 120))
    step = dict(u=code.u, scale=arguments[3], step=True)
    results = []
    for schedule in range(native.module.schedules):
        native.module.set_schedule(schedule)
        results.append(run(code, arguments, **step))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_repeats_and_alignment_does_not_matter(dtype):
    code, arguments = problem(2, 0, (dtype, dtype), shape=(4, 136, 120))
    shifted = [torch.empty(t.numel() + 1, dtype=dtype)[1:].view_as(t).copy_(t) for t in arguments]
    assert shifted[0].data_ptr() % 16 != 0
    # By way of the op, whose tensors keep their offset on any device.
    first = run_losses(code, *arguments, normaliser=3)
    assert_same_bits(run_losses(code, *arguments, normaliser=3), first)
    assert_same_bits(run_losses(code, *shifted, normaliser=3) if SHIM else first, first)


def test_a_row_does_not_hang_on_its_neighbours():
    code, arguments = problem(2, 0)
    residuals, losses, _ = run(code, arguments)
    W, b_dec, target, weight = arguments
    for b in range(B):
        alone = slice(int(code.indptr[b]), int(code.indptr[b + 1]))
        one = type(code)((1, F), torch.tensor([0, alone.stop - alone.start]), code.indices[alone], code.u[alone],
                         code.values[:, alone].contiguous())  # fmt: skip
        own = run(one, [W, b_dec, target[b : b + 1], weight])
        assert same_bits(own[0][:, 0], residuals[:, b]) and same_bits(own[1][0], losses[b])
