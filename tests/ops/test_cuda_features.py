"""outer and weight_step in CUDA C++: on a GPU, or over the tests' shim (tests/cuda_shim)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_same_bits, code_of, randn, same_bits
from problems.weight_step import ADAM, State

pytest.importorskip("triton")

from problems.device_runner import assert_within_the_spread, batches, fields, make
from problems.gapped import Gapped
from problems.triton_features import (
    DEVICE,
    F,
    a_step,
    arguments,
    csc_of,
    gradient_of,
    judge_rows,
    judge_state,
    stepped,
    there,
)

import sae_fast as sf
from sae_fast import ops, use_backend
from sae_fast.code import RowGradient, Rows, Shadow
from sae_fast.kernels import _config, native
from sae_fast.kernels import round as round_kernels
from sae_fast.kernels import weight_step as step_kernels

SHIM = DEVICE == "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [1, 3, 4, 63, 100, 128, 512, 769, 2304]
# Feature 0 has 68 entries: two warps' worth of 32 and four more, or fourteen runs of 5.
RUN = 5

pytestmark = pytest.mark.usefixtures("cuda_calls")


@pytest.fixture
def short_runs(monkeypatch):
    for generation in _config.SHIPPED.values():
        monkeypatch.setitem(generation, "outer", {**generation["outer"], "run": RUN})


def sizes(d: int) -> dict[str, int]:
    """Of a problem: few features of wide rows."""
    return dict(rows=70, features=F) if d <= 128 else dict(rows=9, features=6)


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The same, contiguous, but not at a multiple of 16 bytes."""
    wide = t.new_empty(t.numel() + 1)
    wide[1:] = t.flatten()
    return wide[1:].view(t.shape)


def every_schedule(run):
    """What ``run`` gives, which is the same to the last bit however the threads take turns."""
    first = run()
    for schedule in range(1, native.module.schedules if SHIM else 1):
        native.module.set_schedule(schedule)
        assert_same_bits(first, run())
    return first


# ---- weight_step -----------------------------------------------------------------------------------------------------


@pytest.mark.slow(but=6)
@pytest.mark.parametrize("d, unit_rows", [(d, unit) for d in WIDTHS for unit in (False, True) if d > 1 or not unit])
def test_weight_step_is_as_near_to_float64_as_torchs(d, unit_rows, cuda_calls, short_runs):
    for S in (1, 2, 3):
        step = a_step(S, d, unit_rows, own=S > 1, **sizes(d))
        after = stepped(step, unit_rows, grad_scale=there(torch.tensor(0.7)))
        judge_state(after, step, unit_rows, 0.7)
        idle = ~step.touched()
        assert idle.sum() >= 2
        assert_same_bits([t[idle] for t in after.tensors()], [t[idle] for t in step.state.tensors()])
    assert cuda_calls == ["partials", "weight_step"] * 2 + ["partials", "outer"] * 2


@pytest.mark.parametrize("unit_rows", [False, True])
def test_weight_step_without_runs_and_from_anywhere_in_memory(unit_rows):
    step = a_step(2, 132, unit_rows)
    judge_state(stepped(step, unit_rows), step, unit_rows)
    aligned = stepped(step, unit_rows)
    state, gradient = State(*map(misaligned, there(*step.state.tensors()))), gradient_of(step)
    ops.weight_step(*state.tensors(), gradient, unit_rows=unit_rows, **ADAM)
    assert_same_bits(aligned.tensors(), [t.cpu() for t in state.tensors()])


@pytest.mark.parametrize("d, body", [(2051, "cuda"), (4100, "cuda"), (8192, "cuda"), (4101, "triton"), (8196, "triton")])
def test_long_unit_rows(d, body, cuda_calls):
    step = a_step(1, d, True, rows=4, features=5)
    judge_state(stepped(step, True), step, True)
    assert cuda_calls == ["weight_step"] * (body == "cuda")


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.9999])
def test_weight_step_at_any_beta2(beta2):
    adam = ADAM | dict(beta2=beta2, eps=1.0)
    step = a_step(1, 20)
    judge_state(stepped(step, False, adam), step, False, adam=adam)


def test_a_step_after_the_last_decays_by_exactly_beta2():
    step = a_step(1, 20)
    still = replace(step, values=step.values * 0)
    still = replace(still, state=replace(step.state, last_step=torch.full((F,), ADAM["step"] - 1)))
    after, touched = stepped(still, False), step.touched()
    assert_same_bits(after.W, step.state.W)
    assert_same_bits(after.v[touched], step.state.v[touched] * torch.tensor(ADAM["beta2"], dtype=torch.float32))


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("first", [0, 8])
def test_ranges_of_features_step_as_the_whole(first, unit_rows, short_runs):
    step = a_step(2, 20, unit_rows, own=True)
    whole, parts, gradient = stepped(step, unit_rows), State(*there(*step.state.tensors())), gradient_of(step)
    for a, b in ((0, first), (first, F)):
        own = replace(gradient, self_coefficient=gradient.self_coefficient[a:b])
        part = (t[a:b] for t in parts.tensors())
        ops.weight_step(*part, own, first_feature=a, unit_rows=unit_rows, **ADAM)
    assert_same_bits(whole.tensors(), [t.cpu() for t in parts.tensors()])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.int32, torch.int64], ids=str)
def test_skip_is_read_on_the_device(dtype):
    step = a_step(1, 20)
    set_ = torch.tensor(1 if dtype == torch.bool else 256).to(dtype)
    assert_same_bits(stepped(step, False, skip=there(set_)), step.state)
    taken = stepped(step, False)
    assert_same_bits(stepped(step, False, skip=there(torch.zeros_like(set_))), taken)
    assert not same_bits(taken.W, step.state.W)


def launched(step, csc, values, A, unit_rows, shadow=None) -> State:
    """The state after the launcher itself, on the device."""
    state, adam = State(*there(*step.state.tensors())), step_kernels.new_adam(DEVICE)
    step_kernels.set_adam(adam, **ADAM)
    step_kernels.weight_step(
        Rows(*state.tensors(), shadow), RowGradient(csc, values, A), step_kernels.Update(adam, unit_rows)
    )
    return state


@pytest.mark.parametrize("unit_rows", [False, True])
def test_weight_step_does_not_depend_on_gaps_capacity_or_schedule(unit_rows, short_runs):
    step = a_step(2, 260, unit=True)  # three warps
    gapped = Gapped(replace(step.code, values=step.values), torch.float32)
    expected = every_schedule(lambda: stepped(step, unit_rows))
    found = launched(step, gapped.transposed(), list(gapped.values), there(list(step.A)), unit_rows)
    assert_same_bits(expected.tensors(), [t.cpu() for t in found.tensors()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit_rows", [False, True])
def test_rows_in_16_bits_are_read_as_they_are(unit_rows, dtype, cuda_calls, short_runs):
    step = a_step(2, 260, unit_rows)
    csc, values, A = csc_of(step.code), there(list(step.values)), there(list(step.A.to(dtype)))
    found = launched(step, csc, values, A, unit_rows)
    assert_same_bits(found.tensors(), launched(step, csc, values, [a.float() for a in A], unit_rows).tensors())
    assert cuda_calls == ["partials", "weight_step"] * 2


@pytest.mark.parametrize("d", [20, 514, 1100])
def test_a_shadow_follows_the_rows_that_change(d):
    step = a_step(1, d, rows=9, features=6)
    before = Shadow(*round_kernels.rounded(there(step.state.W)))

    def run():
        shadow = Shadow(*(t.clone() for t in before))
        return launched(step, *arguments(step, torch.float32), False, shadow), shadow

    state, shadow = every_schedule(run)
    judge_state(State(*(t.cpu() for t in state.tensors())), step, False)
    scaled = state.W * shadow.norms[:, :1]
    rows = torch.nn.functional.pad(scaled.half(), (0, shadow.rows.shape[1] - d))
    assert_same_bits(shadow.rows, rows)
    assert_same_bits(shadow.norms[:, 0], before.norms[:, 0])
    lost = scaled - rows[:, :d]
    for s in range(-(-d // 512)):
        at = slice(512 * s, 512 * s + 512)
        for column, part in ((1, scaled), (2, lost)):
            want = part[:, at].double().square().sum(1)
            torch.testing.assert_close(shadow.norms[:, column + 2 * s].double(), want, rtol=1e-5, atol=0)
    idle = there(~step.touched())
    assert_same_bits([t[idle] for t in shadow], [t[idle] for t in before])
    assert not same_bits(shadow.norms, before.norms)


def test_a_shadow_of_unit_rows_is_made_anew():
    step = a_step(1, 20, unit=True)
    state = State(*there(*step.state.tensors()))
    shadow = ops.make_shadow(state.W)
    ops.weight_step(*state.tensors(), gradient_of(step), unit_rows=True, shadow=shadow, **ADAM)
    assert not same_bits(state.W.cpu(), step.state.W)
    assert_same_bits(list(shadow), list(ops.make_shadow(state.W)))
    csc, values, A = arguments(step, torch.float32)
    with pytest.raises(NotImplementedError, match="unit_rows"):
        launched(step, csc, values, A, True, shadow)


@pytest.mark.parametrize("d", [5, 20, 100, 516])
def test_the_last_row_of_the_last_feature(d):
    """For the sanitizer: nothing beyond it is anybody's."""
    whole = code_of(torch.ones(2, 2, dtype=torch.bool), 1, torch.Generator().manual_seed(0))
    for unit_rows in (False, True):
        step = replace(a_step(1, d, unit_rows, rows=2, features=2), code=whole, values=randn(1, 4, seed=7) + 2)
        judge_state(stepped(step, unit_rows), step, unit_rows)
        for dtype in DTYPES:
            judge_rows(ops.outer(*arguments(step, dtype)), step, dtype)


# ---- What is refused, and who uses them ------------------------------------------------------------------------------


def test_what_the_kernels_cannot_take_says_why(monkeypatch):
    step = a_step(1, 20)
    state = State(*there(*step.state.tensors()))
    with pytest.raises(ValueError, match="row_step cannot run there: it has the bodies"):
        ops.row_step(*state.tensors(), state.W, **ADAM)
    half = there(step.state.W.half())
    with pytest.raises(ValueError, match="float32 weights"):
        gradient = replace(gradient_of(step), values=there([step.values[0].half()]), A=there([step.A[0].half()]))
        ops.weight_step(half, half.clone(), state.last_step, gradient, **ADAM)
    monkeypatch.setattr(native, "module", None)
    for run in (lambda: stepped(step, False), lambda: ops.outer(*arguments(step, torch.float32))):
        with pytest.raises(ValueError, match="is not built"):
            run()


@pytest.mark.parametrize("dialect", ["paper", "saelens"])
def test_whole_steps_of_the_trainer(dialect, cuda_calls):
    """As test_device_runner.py does for the Triton kernels; clipped, which takes grad_sqnorm's Triton kernel."""
    torch.set_num_threads(1)
    settings = dict(lr=3e-2, l1_coefficient=0.4, betas=(0.0, 0.999), eps=1e-2, dialect=dialect, grad_clip=0.5)
    data, start = batches(3), make(device="cpu")
    with use_backend("cpu"):
        twin = sf.Trainer(make(device="cpu"), **settings)
        wanted = [twin.step(x.cpu()) for x in data]
    trainer = sf.Trainer(make(), **settings)
    logs = [trainer.step(x) for x in data]
    assert trainer._device.graphs is not None and {"outer", "weight_step"} <= set(cuda_calls)
    for got, want in zip(fields(logs), fields(wanted), strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-7)
    assert max(assert_within_the_spread(trainer.sae, data, start, logs, **settings)) > 0.5


def test_a_trainer_follows_the_forced_backend(cuda_calls, monkeypatch):
    """A captured graph holds the kernels of one backend; and what is forced but not built does not run as another."""
    torch.set_num_threads(1)
    data, trainer = batches(3), sf.Trainer(make(), lr=3e-2, l1_coefficient=0.4)
    trainer.step(data[0])
    first = trainer._device.graphs.step
    assert cuda_calls
    cuda_calls.clear()
    with use_backend("triton"):
        trainer.step(data[1])
        trainer.wait()
    assert trainer._device.graphs.step is not first and not cuda_calls
    trainer.step(data[2])
    trainer.wait()
    assert cuda_calls
    monkeypatch.setattr(native, "module", None)
    with pytest.raises(ValueError, match="_C_cuda is not built"):
        trainer.step(data[0])
