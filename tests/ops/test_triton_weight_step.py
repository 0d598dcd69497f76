"""What the kernels of weight_step, row_step and outer on a GPU have beyond the ops' contracts: memory with gaps, shadows at
an old scale, long rows, and whole steps of a Trainer in CUDA C++."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import Judge, assert_close_2x, assert_same_bits, both, code_of, randn, same_bits
from problems import bodies
from problems.bodies import every_schedule, misaligned, moved
from problems.outer import plain as plain_rows
from problems.weight_step import ADAM, State, Step, add_state, make_step, stepped

pytest.importorskip("triton")

from problems.device_runner import assert_within_the_spread, batches, fields, make
from problems.gapped import DEVICE, Gapped

import sae_fast as sf
from sae_fast import ops, use_backend
from sae_fast.code import RowGradient, Rows, Shadow
from sae_fast.kernels import _config, _launch, native
from sae_fast.kernels import round as round_kernels
from sae_fast.kernels import weight_step as step_kernels

TRITON, CUDA = bodies.Body("triton"), bodies.Body("cuda")


def judge_state(after: State, step: Step, unit_rows: bool, beta1: float = 0.0) -> None:
    judge = Judge()
    add_state(judge, after, step, unit_rows, adam=ADAM | dict(beta1=beta1))
    judge.verdict()


def a_step(d: int, unit: bool = False, B: int = 12, F: int = 9, S: int = 1) -> Step:
    return make_step(B, d, F, S, unit=unit, long=True)


def there(*given):
    """On the device, and not the same tensors."""
    copies = [t.to(DEVICE, copy=True) for t in given]
    return copies if len(copies) > 1 else copies[0]


def update(unit_rows: bool = False, beta1: float = 0.0) -> step_kernels.Update:
    adam = step_kernels.new_adam(DEVICE)
    step_kernels.set_adam(adam, **ADAM, beta1=beta1)
    return step_kernels.Update(adam, unit_rows)


def launched(step: Step, gradient: RowGradient, unit_rows: bool, shadow: Shadow | None = None, beta1: float = 0.0) -> State:
    """The state after the launcher itself, on the device."""
    state = moved(step.state.clone(), DEVICE)
    step_kernels.weight_step(Rows(*state.tensors(), shadow, state.m), gradient, update(unit_rows, beta1))
    return state


@bodies.of_gpu
@pytest.mark.parametrize("unit_rows", [False, True])
def test_neither_gaps_nor_room_nor_a_schedule_change_a_bit(unit_rows, body):
    step = a_step(260 if body.backend == "cuda" else 20, unit=True, S=2)  # of CUDA's three warps
    gapped = Gapped(replace(step.code, values=step.values), torch.float32)
    expected = every_schedule(body, lambda: stepped(body, step, unit_rows))
    found = launched(step, RowGradient(gapped.transposed(), list(gapped.values), moved(list(step.A), DEVICE)), unit_rows)
    assert_same_bits(expected, moved(found, "cpu"))


@bodies.of_gpu
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("d, whole", [(20, False), (514, False), (1100, False), (1100, True)])
def test_a_shadow_follows_the_rows_that_change(d, whole, momentum, body):
    """At the scale that it had; by runs of 512 columns.  ``whole``: row_step's kernel."""
    step, beta1 = make_step(9, d, 6, long=True, momentum=momentum), 0.9 * momentum
    before, gradient = Shadow(*round_kernels.rounded(there(step.state.W))), moved(step.gradient(), DEVICE)

    def run():
        shadow = Shadow(*(t.clone() for t in before))
        if not whole:
            return launched(step, gradient, False, shadow, beta1), shadow
        state, grad = moved(step.state.clone(), DEVICE), there(step.dense_gradient(torch.float32))
        rows = Rows(*state.tensors(), shadow, state.m)
        step_kernels.row_step(rows, grad, update(False, beta1), colptr=gradient.csc.colptr)
        return state, shadow

    state, shadow = every_schedule(body, run)
    judge_state(moved(state, "cpu"), step, False, beta1)
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
    idle = there(~step.moving())
    assert_same_bits([t[idle] for t in shadow], [t[idle] for t in before])
    assert not same_bits(shadow.norms, before.norms)


def known_along(step: Step) -> RowGradient:
    """Its gradient on the device, with each entry's part along its row."""
    with use_backend("reference"):
        dots = (ops.sampled_dots(step.code, a, step.state.W) for a in step.A)
        along = torch.stack([values * dot for values, dot in zip(step.values, dots, strict=True)]).sum(0)
        return moved(replace(step.gradient(), along=along), DEVICE)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("d, slices", [(16, []), (17, [4]), (43, [8])])
def test_wide_unit_rows_go_by_slices_where_the_gradient_along_them_is_known(d, slices, momentum, monkeypatch):
    for generation in _config.SHIPPED.values():
        for op in ("outer", "weight_step"):
            monkeypatch.setitem(generation, op, bodies.TILES[op])
    step, beta1 = make_step(40, d, 9, S=2, unit=True, own=True, long=True, momentum=momentum), 0.9 * momentum
    gradient = known_along(step)
    with _launch.recording() as launches:
        launched(step, gradient, True, beta1=beta1)
    assert [it.options["SLICES"] for it in launches if it.kernel is step_kernels._normalise] == slices
    found = [moved(launched(step, gradient, True, beta1=beta1), "cpu") for _ in range(2)]
    judge_state(found[0], step, True, beta1)
    assert_same_bits(*found)
    coasts = step.moving() & ~step.touched()
    assert bool(coasts.any()) == momentum and bool((found[0].W != step.state.W)[coasts].any(1).all())
    torch.testing.assert_close(found[0].W[step.moving()].norm(dim=1), torch.ones(int(step.moving().sum())))


@bodies.of_gpu
def test_a_shadow_of_unit_rows_is_made_anew(body):
    step = a_step(20, unit=True)
    gradients = {"weight_step": step.gradient(), "row_step": step.dense_gradient(torch.float32)}
    for op in ("weight_step", "row_step") if body.backend == "triton" else ("weight_step",):
        state, shadow = State(*there(*step.state.tensors())), None
        shadow = ops.make_shadow(state.W)
        getattr(ops, op)(*state.tensors(), moved(gradients[op], DEVICE), unit_rows=True, shadow=shadow, **ADAM)
        assert not same_bits(state.W.cpu(), step.state.W)
        assert_same_bits(list(shadow), list(ops.make_shadow(state.W)))
    with pytest.raises(NotImplementedError, match="unit_rows"):
        launched(step, moved(step.gradient(), DEVICE), True, shadow)
    with pytest.raises(NotImplementedError, match="unit_rows"):
        step_kernels.row_step(Rows(*state.tensors(), shadow), state.W, update(True))


def test_what_set_adam_leaves_on_the_device():
    adam = step_kernels.new_adam(DEVICE)
    for beta2 in (0.999, 0.0):
        step_kernels.set_adam(adam, step=3, lr=0.1, beta1=0.9, beta2=beta2, eps=1e-8)
        want = [0.1 / (1 - 0.9**3), 1e-8, beta2, 1 - beta2, (1 - beta2**3) ** -0.5, 0.9, 1 - 0.9]
        found = adam.constants[[0, 1, 2, 3, 4, 7, 8]]
        assert torch.equal(found.cpu(), torch.tensor(want, dtype=torch.float64).float()) and int(adam.step) == 3
        rate = adam.constants[5:7].double().sum()
        assert abs(2 ** float(1000 * rate) - beta2**1000) <= 1e-12


@pytest.mark.parametrize("momentum", [False, True])
def test_row_step_with_offsets_takes_no_gradient_of_rows_without_entries(momentum):
    """Whatever it holds there."""
    step, beta1 = make_step(12, 20, 9, long=True, momentum=momentum), 0.9 * momentum
    state, grad = moved(step.state.clone(), DEVICE), there(step.dense_gradient(torch.float32))
    grad[there(~step.touched())] = 3.0
    colptr = there(step.gradient().csc.colptr)
    with use_backend("triton"):
        step_kernels.row_step(Rows(*state.tensors(), None, state.m), grad, update(False, beta1), colptr=colptr)
    judge_state(moved(state, "cpu"), step, False, beta1)


@bodies.of_gpu
def test_at_an_eps_of_0_the_columns_past_a_rows_end_are_no_part_of_its_norm(body):
    step, adam = a_step(20, unit=True), ADAM | dict(eps=0.0)
    judge = Judge()
    add_state(judge, stepped(body, step, True, adam), step, True, adam=adam)
    judge.verdict()
    state, grad = State(*there(*step.state.tensors())), randn(9, 20)
    if body.backend == "triton":
        ops.row_step(*state.tensors(), there(grad), unit_rows=True, **adam)
        assert bool(state.W.isfinite().all())
    nothing = State(step.state.W, step.state.v * 0, step.state.last_step)
    still = replace(step, state=nothing, values=step.values * 0)  # 0 / 0 within the row, as Adam's
    assert bool(stepped(body, still, True, adam).W[step.touched()].isnan().all())


# ---- CUDA C++ --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_rows", [False, True])
def test_weight_step_without_runs_and_from_anywhere_in_memory(unit_rows, cuda_calls):
    step = a_step(132, unit_rows, B=70, F=21, S=2)  # feature 0: two warps' worth of 32 entries, and four more
    aligned = stepped(CUDA, step, unit_rows)
    judge_state(aligned, step, unit_rows)
    state = State(*map(misaligned, there(*step.state.tensors())))
    ops.weight_step(*state.tensors(), moved(step.gradient(), DEVICE), unit_rows=unit_rows, **ADAM)
    assert_same_bits(aligned, moved(state, "cpu"))
    assert cuda_calls == ["weight_step"] * 2


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("d, momentum", [(1030, True), (1028, False), (8196, True)])
def test_wide_unit_rows_by_slices(d, momentum, cuda_calls):
    """Of any width, the last slice of one warp; after a gradient's part along the row is taken off by entry."""
    step, beta1 = make_step(40, d, 9, S=2, unit=True, own=True, long=True, momentum=momentum), 0.9 * momentum
    gradient = known_along(step)
    found = every_schedule(CUDA, lambda: moved(launched(step, gradient, True, beta1=beta1), "cpu"))
    judge_state(found, step, True, beta1)
    assert set(cuda_calls) == {"weight_step"}
    torch.testing.assert_close(found.W[step.moving()].norm(dim=1), torch.ones(int(step.moving().sum())))


@pytest.mark.parametrize("d, body", [(2051, "cuda"), (4100, "cuda"), (8192, "cuda"), (4101, "triton"), (8196, "triton")])
def test_long_unit_rows(d, body, cuda_calls):
    step = a_step(d, True, B=4, F=5)
    judge_state(stepped(CUDA, step, True), step, True)
    assert cuda_calls == ["weight_step"] * (body == "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit_rows", [False, True])
def test_rows_in_16_bits_are_read_as_they_are(unit_rows, dtype, cuda_calls, monkeypatch):
    for generation in _config.SHIPPED.values():
        monkeypatch.setitem(generation, "outer", {**generation["outer"], "run": 5})
    step = a_step(260, unit_rows, B=42, F=21, S=2)
    gradient = moved(replace(step, A=step.A.to(dtype)).gradient(), DEVICE)
    found = launched(step, gradient, unit_rows)
    assert_same_bits(found, launched(step, replace(gradient, A=[a.float() for a in gradient.A]), unit_rows))
    assert cuda_calls == ["partials", "weight_step"] * 2


@pytest.mark.parametrize("d", [5, 20, 100, 516])
def test_the_last_row_of_the_last_feature(d, cuda_calls):
    """For the sanitizer: nothing beyond it is anybody's."""
    whole = code_of(torch.ones(2, 2, dtype=torch.bool), 1, torch.Generator().manual_seed(0))
    for unit_rows in (False, True):
        step = replace(make_step(2, d, 2, unit=unit_rows), code=whole, values=randn(1, 4, seed=7) + 2)
        judge_state(stepped(CUDA, step, unit_rows), step, unit_rows)
    for dtype in CUDA.dtypes:
        values, A = step.values.to(dtype), step.A.to(dtype)
        rows = CUDA.run(ops.outer, step.gradient().csc, list(values), list(A))
        assert_close_2x(rows, *both(plain_rows(whole), values, A))


def test_what_the_kernels_cannot_take_says_why(cuda_calls, monkeypatch):
    step = a_step(20)
    state, gradient = State(*there(*step.state.tensors())), moved(step.gradient(), DEVICE)
    with pytest.raises(ValueError, match="row_step cannot run there: it has the bodies"):
        ops.row_step(*state.tensors(), state.W, **ADAM)
    half = state.W.half()
    with pytest.raises(ValueError, match="float32 weights"), use_backend("triton"):
        ops.row_step(half, half.clone(), state.last_step, half.clone(), **ADAM)
    with pytest.raises(ValueError, match="float32 weights"):
        ops.weight_step(half, half.clone(), state.last_step, moved(gradient, DEVICE, torch.float16), **ADAM)
    monkeypatch.setattr(native, "module", None)
    for run in (lambda: stepped(CUDA, step), lambda: ops.outer(gradient.csc, gradient.values, gradient.A)):
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
    assert trainer._device.graphs is not None and "weight_step" in cuda_calls
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
