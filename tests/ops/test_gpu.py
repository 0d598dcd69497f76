"""On an NVIDIA GPU, at sizes that are used: encode at every precision, torch.compile, CUDA graphs, streams, memory, and a
Trainer that never waits; the other ops meet such sizes in their contracts.  What a GPU decides by itself is not forced
here: each op takes the way that it takes for a user.

Without a GPU all of it is skipped; the bodies run in Triton's interpreter too, at the smaller sizes below.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from helpers import (
    Judge,
    assert_close_2x,
    assert_is_code,
    assert_same_bits,
    dense,
    make_inputs,
    opcheck,
    randn,
    random_code,
    same_bits,
)
from problems.encode import arguments
from problems.encode import plain as plain_encode
from torch import Tensor

import sae_fast as sf
from sae_fast import ops, reference, use_backend
from sae_fast.code import SparseCode, Transposed
from sae_fast.ops import dispatch
from sae_fast.ops.encode import shadow as shadowing

pytest.importorskip("triton")

from sae_fast.kernels import _config
from sae_fast.train import device_steps
from sae_fast.train.eager import EagerTrainer

pytestmark = pytest.mark.gpu

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
B, D, F = (513, 768, 4099) if GPU else (9, 40, 33)
DENSITY = 0.01 if GPU else 0.1
FEW = (9, D, 131 if GPU else 33)  # rows, columns and features where size does not matter: no other kernels to compile
STORAGE = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]  # wrong in the interpreter
L0 = 20 if GPU else 3
SETTINGS = dict(lr=1e-3, l1_coefficient=0.5)


@pytest.fixture(autouse=True)
def in_the_interpreter():
    with nullcontext() if GPU else use_backend("triton"):
        yield


def on(value):
    """Tensors, and what is made of them, on the device."""
    if isinstance(value, Tensor):
        return value.detach().to(DEVICE, copy=True)
    if isinstance(value, SparseCode):
        return SparseCode(value.shape, *map(on, (value.indptr, value.indices, value.u, value.values)))
    if isinstance(value, Transposed):
        return Transposed(*map(on, (value.colptr, value.rows, value.perm)))
    return [on(v) for v in value] if isinstance(value, (list, tuple)) else value


def home(code: SparseCode) -> SparseCode:
    return SparseCode(code.shape, *(t.cpu() for t in (code.indptr, code.indices, code.u, code.values)))


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


@cache
def a_code(V: int, rows: int = B, features: int = F) -> SparseCode:
    """With empty rows, and rows that have every feature."""
    return random_code(rows, features, V, DENSITY)


# ---- encode, against float64 ------------------------------------------------------------------------------------------


def judge_code(code: SparseCode, given: dict, tolerance: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
    """The support is float64's, but where π is within ``tolerance`` · ‖x‖‖w‖ of its threshold; u and the values on it by
    the 2× rule, or, where operands were rounded, within that tolerance."""
    assert_is_code(code)
    arrays = {k: v.double() if isinstance(v, Tensor) else v for k, v in on_all(given).items()}
    member, u, values = (t.cpu() for t in plain_encode(**arrays))
    _, u_own, values_own = (t.cpu() for t in plain_encode(**on_all(given)))
    size = (arrays["x"].norm(dim=1)[:, None] * arrays["W_enc"].norm(dim=1)).cpu()
    found = dense(code, torch.ones(code.nnz)) > 0
    cut = arrays["threshold"].clamp(min=0).cpu() if "threshold" in given else 0
    near = (u + arrays["bias"].cpu() - cut).abs() <= max(tolerance, 2.0**-22) * size
    assert not ((found != member) & ~near).any(), "the support is not float64's"
    assert member.sum() > 0 and (found != member).double().mean() < 0.02 * DENSITY
    agreed = found & member
    got_u, got_values = dense(code, code.u), dense(code, code.values)
    if tolerance:
        assert bool(((got_u - u).abs() * agreed <= tolerance * size).all())
        return
    assert code.u.dtype == code.values.dtype == dtype
    assert_close_2x(got_u * agreed, u_own * agreed, u * agreed, "u")
    assert_close_2x(got_values * agreed, values_own * agreed, values * agreed, "values")


def on_all(given: dict) -> dict:
    return {k: on(v) for k, v in given.items()}


@cache
def encode_problem(activation: str) -> dict:
    return arguments(make_inputs(B, D, F, DENSITY), activation)


@pytest.mark.parametrize("activation", ["gated", "relu", "jumprelu"])
@pytest.mark.parametrize("precision", ["exact", "fp32", "tf32", "bf16"])
def test_encode(precision, activation):
    given = encode_problem(activation)
    code = home(ops.encode(**on_all(given), precision=precision))
    tolerance = {"exact": 0.0, "fp32": 0.0, "tf32": 2.0**-8 if GPU else 0.0, "bf16": 2.0**-10}[precision]
    judge_code(code, given, tolerance)


@pytest.mark.parametrize("dtype", STORAGE[1:], ids=str)
def test_encode_of_what_is_stored_in_16_bits(dtype):
    given = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in encode_problem("gated").items()}
    judge_code(home(ops.encode(**on_all(given))), given, dtype=dtype)


@pytest.mark.parametrize("kernel", ["plain", "persistent", "library"])
@pytest.mark.parametrize("d", [D, 2 * D], ids=["narrow", "wide"])
def test_every_screen_finds_the_same_members(d, kernel, monkeypatch):
    """Of wide rows too, which have tiles of their own."""
    given = encode_problem("gated") if d == D else arguments(make_inputs(FEW[0] * 20, d, F, DENSITY), "gated")
    code = ops.encode(**on_all(given))
    assert dispatch._no_triton() is None and code.nnz > 0
    change = {"persistent": int(kernel == "persistent"), "library": int(kernel == "library")}
    for generation, every in _config.SHIPPED.items():
        new = {op: {**every[op], **change} for op in ("screen", "screen_wide")}
        monkeypatch.setitem(_config.SHIPPED, generation, {**every, **new})
    assert_same_bits(code, ops.encode(**on_all(given)))
    if kernel == "plain":
        judge_code(home(code), given)


def test_no_rows():
    sae, x = sf.GatedSAE(D, F, device=DEVICE), torch.empty(0, D, device=DEVICE)
    code = sae.encode_sparse(x)
    assert code.nnz == 0 and code.indptr.tolist() == [0] and code.values.shape == (2, 0)
    assert sae(x).shape == (0, D) and sae.encode(x).shape == (0, F) and sae.decode(code).shape == (0, D)


# ---- opcheck, torch.compile, autograd ---------------------------------------------------------------------------------


OPS = ["encode", "decode", "sampled_dots", "decode_loss", "transpose", "outer", "weight_step", "row_step", "grad_sqnorm"]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    rows, d, features = FEW
    code = on(a_code(2, rows, features))
    W, x, bias = on((randn(features, d), randn(rows, d, seed=1), randn(features, seed=2)))
    csc = ops.transpose(code)
    parts, state = csc.parts(), (W.square(), torch.zeros(features, dtype=torch.int64, device=DEVICE), None)
    adam, values = (1, 0.1, 0.0, 0.9, 1e-3), code.values.clone()
    plain_losses = (float(rows), False, None, None, False)
    call = {
        "encode": (x, W, bias, bias, bias, "gated", "threshold", 0, 0.0),
        "decode": (code.indptr, code.indices, values, W, None),
        "sampled_dots": (code.indptr, code.indices, x, W),
        "decode_loss": (code.indptr, code.indices, values, W, x[0].clone(), x, bias.abs(), *plain_losses),
        "transpose": (code.indptr, code.indices, features),
        "outer": (*parts, [values[0].clone()], [x], None, 0, features),
        "weight_step": (W, *state, *parts, [values[0].clone()], [x], None, 0, *adam, True, *4 * [None]),
        "row_step": (W, *state, on(randn(features, d, seed=3)), *adam, False, *4 * [None]),
        "grad_sqnorm": (W, *parts, [values[0].clone()], [x], None, 0, False),
    }[op]
    with use_backend("triton"):  # so few features make a code dense
        # A static trace has no size for what depends on the data.
        utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        opcheck(getattr(torch.ops.sae_fast, op).default, call, utils if op == "encode" else None)


def layer(cls=sf.GatedSAE, features: int = F, device: str = DEVICE, **options):
    """A layer with L0 open features an example, no two parameters alike; the same on any device."""
    sae = cls(D, features, seed=0, **options)
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * randn(D, seed=1))
        sae.calibrate_(randn(256, D, seed=2), L0)
        if cls is sf.GatedSAE:
            sae.r_mag.copy_(0.1 * randn(features, seed=3))
            sae.b_mag.add_(0.1 * randn(features, seed=4))
    return sae.to(device)


def batches(n: int, rows: int = B, seed: int = 0) -> list[Tensor]:
    return [on(randn(rows, D, seed=100 * seed + 10 + i)) for i in range(n)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_layer_and_its_loss_compile_as_one_graph_with_gradients(backend):
    sae, x = layer(), batches(1)[0]
    forward = torch.compile(lambda x: sae(x), backend=backend, fullgraph=True)
    loss = torch.compile(lambda x: sae.loss(x, 0.5).total, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(forward(x), sae(x), rtol=1e-5, atol=1e-5)
    grads = []
    for function in (loss, lambda x: sae.loss(x, 0.5).total):
        sae.zero_grad()
        total = function(x)
        total.backward()
        grads.append([total.detach(), *(p.grad for p in sae.parameters())])
    for a, b in zip(*grads, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


@pytest.mark.parametrize("dialect", ["paper", "saelens"])
def test_gradients_are_as_close_to_float64_as_the_references(dialect):
    p = make_inputs(B, D, F, DENSITY)
    results, names = [], ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")
    for dtype in (None, torch.float32, torch.float64):
        if dtype is None:
            sae = sf.GatedSAE(D, F, device=DEVICE)
            sae.load_state_dict({name: getattr(p, name) for name in names})
            tensors, x = [sae.get_parameter(name) for name in names], on(p.x).requires_grad_()
            losses = sae.loss(x, 0.5, dialect)
        else:
            x, *tensors = (on(t).to(dtype).requires_grad_() for t in (p.x, *(getattr(p, name) for name in names)))
            losses = reference.gated_loss(x, *tensors, 0.5, dialect)
        losses.total.backward()
        results.append([losses.total.detach(), x.grad, *(t.grad for t in tensors)])
    judge = Judge()
    for name, *three in zip(("total", "x", *names), *results, strict=True):
        if name == "total":
            assert float(three[0]) == pytest.approx(float(three[2]), rel=1e-6)
        else:
            judge.add(name, *three)
    judge.verdict()


def test_a_frozen_layer_makes_its_shadow_once_and_gives_the_same_bits(monkeypatch):
    sae, data, made, make = layer(), batches(3), [], shadowing.make_shadow
    monkeypatch.setattr(shadowing, "make_shadow", lambda W: made.append(W.shape) or make(W))
    with torch.no_grad():
        wanted = [sae.encode_sparse(x) for x in data]
        with sae.frozen():
            assert_same_bits(wanted, [sae.encode_sparse(x) for x in data])
            assert len(made) == 1
            sae.W_enc.mul_(1.5)
            changed = sae.encode_sparse(data[0])
            assert len(made) == 2
        assert_same_bits(changed, sae.encode_sparse(data[0]))


# ---- Training ---------------------------------------------------------------------------------------------------------


def trainer_of(device: str = DEVICE, cls=sf.GatedSAE, **settings) -> sf.Trainer:
    return sf.Trainer(layer(cls, device=device), **{**SETTINGS, **settings})


def everything(trainer: sf.Trainer) -> list[Tensor]:
    """Every bit of a trainer's state, once its steps have happened."""
    trainer.wait()
    synchronize()
    states = [trainer.optimizer.state[p] for p in trainer.sae.parameters()]
    moments = [s[key].cpu() for s in states for key in ("exp_avg_sq", "last_step")]
    return [torch.tensor(trainer.step_count), *(p.detach().cpu().clone() for p in trainer.sae.parameters()), *moments]


def run(data: list[Tensor], capacity: int | None = None, **settings) -> tuple[sf.Trainer, list[Tensor], list[Tensor]]:
    """(trainer, its state after ``data``, the losses of each step)."""
    trainer = trainer_of(**settings)
    assert trainer._device.refuses() is None, "the device path"
    trainer._device.capacity = capacity or trainer._device.capacity
    logs = [trainer.step(x) for x in data]
    return trainer, everything(trainer), [log.losses for log in logs]


STEPS = 20 if GPU else 3
RUNS = [(sf.GatedSAE, "paper", None), (sf.GatedSAE, "saelens", 1.0), (sf.ReluSAE, "paper", 1.0)]


@pytest.mark.parametrize("cls, dialect, clip", RUNS)
def test_twenty_steps_repeat_bit_for_bit_and_begin_as_the_cpu_engines(cls, dialect, clip):
    settings = dict(cls=cls, dialect=dialect, grad_clip=clip)
    data = batches(STEPS)
    trainer, *first = run(data, **settings)
    assert_same_bits(first, run(data, **settings)[1:])
    assert all(bool(p.isfinite().all()) for p in trainer.sae.parameters())
    with use_backend("cpu"):
        twin = trainer_of("cpu", **settings)
        losses = [twin.step(x.cpu()).losses for x in data[:2]]
    torch.testing.assert_close(torch.stack(first[1][:2]), torch.stack(losses), rtol=1e-5, atol=1e-6)
    if GPU:
        assert len(trainer._device.graphs.captured) == device_steps.AHEAD, "the steps are replays of captured graphs"


def test_a_few_steps_are_as_close_to_float64_as_the_cpu_engines():
    """eps is large, or Adam at β1 = 0 would make steps of full size of rounding."""
    settings, data = dict(eps=1e-2, lr=1e-2), batches(3, B // 4 + 1)  # few: an entry at its threshold would decide
    trainer, _, _ = run(data, **settings)
    with use_backend("cpu"):
        engine = trainer_of("cpu", **settings)
        for x in data:
            engine.step(x.cpu())
    exact = sf.Trainer(layer(device="cpu").double().to(DEVICE), **{**SETTINGS, **settings})
    with use_backend("reference"):
        for x in data:
            exact.step(x.double())
    judge = Judge()
    for (name, p), own, want in zip(
        trainer.sae.named_parameters(), engine.sae.parameters(), exact.sae.parameters(), strict=True
    ):
        judge.add(name, p.cpu(), own, want.detach().cpu())
    judge.verdict()


def test_a_captured_step_replays_with_other_batches_rates_and_coefficients():
    """What an eager run gives, bit for bit: nothing of a replay is decided when it is captured."""
    from sae_fast.train.device_step import DeviceStep

    data, rates = batches(5 if GPU else 3), [(1e-3, 0.5), (5e-4, 0.1), (2e-3, 0.9), (0.0, 0.0), (1e-3, 0.3)]
    states, reports = [], []
    for captured in (False, True):
        trainer = trainer_of()
        sae, optimizer = trainer.sae, trainer.optimizer
        optimizer.prepare()
        shadow = ops.make_shadow(sae.W_enc)
        step = DeviceStep(trainer.state, shadow, capacity=B * 128, ahead=len(data))
        x, graph = torch.empty_like(data[0]), None
        for i, (batch, (lr, l1)) in enumerate(zip(data, rates, strict=False)):
            x.copy_(batch)
            step.set(i + 1, lr, l1)
            if not captured or i == 0 or not GPU:
                step.run(x)
            else:
                if graph is None:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        step.run(x)
                graph.replay()
            reports.append(step.report.cpu().clone())
        assert not step.flag.item()
        assert ops.stale_rows(sae.W_enc, shadow, 0, F) == 0
        states.append(everything(trainer))
    assert_same_bits(*states)
    assert_same_bits(reports[: len(data)], reports[len(data) :])
    assert all(bool(report[3] > 0) for report in reports), "features fired"


def test_a_step_that_found_too_little_room_is_repeated_with_more():
    data = batches(8 if GPU else 3)
    data[2] = data[2] * 1.2  # more than its neighbours have, and still sparse
    _, *wanted = run(data)
    for capacity in (1, B * L0):
        trainer, *found = run(data, capacity)
        assert trainer._device.capacity > capacity
        assert_same_bits(found, wanted)


def test_a_bad_batch_stops_the_run_where_it_was_and_it_goes_on():
    data = batches(8 if GPU else 4)
    _, wanted, _ = run(data)
    _, before, _ = run(data[:2])
    trainer, bad = trainer_of(), data[2].clone()
    bad[B - 1, 5] = float("inf")
    with pytest.raises(ValueError, match=rf"^step 2: x: got inf at index \({B - 1}, 5\) of shape \({B}, {D}\)"):
        for x in (*data[:2], bad, data[3]):
            trainer.step(x)
        trainer.wait()
    assert trainer.step_count == 2
    assert_same_bits(everything(trainer), before)
    for x in data[2:]:
        trainer.step(x)
    assert_same_bits(everything(trainer), wanted)


@pytest.mark.skipif(not GPU, reason="torch.cuda is not available: the interpreter reads what a device would")
def test_no_step_of_the_steady_state_waits():
    trainer = trainer_of(grad_clip=1.0)
    data = batches(16)
    for x in data[:8]:
        trainer.step(x)
    trainer.wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logs = [trainer.step(x) for x in data[8:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(trainer._device.under_way) == device_steps.AHEAD
    assert all(log.loss > 0 for log in logs)


@pytest.mark.skipif(not GPU, reason="torch.cuda is not available: no streams")
def test_two_trainers_on_two_streams():
    data = batches(12)
    _, wanted, _ = run(data)
    trainers, streams = [trainer_of(), trainer_of()], [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for x in data:
        for trainer, stream in zip(trainers, streams, strict=True):
            with torch.cuda.stream(stream):
                trainer.step(x)
    for trainer, stream in zip(trainers, streams, strict=True):
        with torch.cuda.stream(stream):
            trainer.wait()
        assert_same_bits(everything(trainer), wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device_while_the_first_is_current():
    data = batches(8)
    _, wanted, _ = run(data)
    assert torch.cuda.current_device() == 0
    trainer = trainer_of("cuda:1")
    for x in data:
        trainer.step(x.to("cuda:1"))
    assert_same_bits(everything(trainer), wanted)
    given = on_all(encode_problem("gated"))
    other = {k: v.to("cuda:1") if isinstance(v, Tensor) else v for k, v in given.items()}
    assert_same_bits(home(ops.encode(**given)), home(ops.encode(**other)))


@pytest.mark.skipif(not GPU, reason="torch.cuda is not available: no CUDA memory to measure")
def test_a_step_takes_an_eighth_of_the_dense_ones_memory_at_most():
    rows, features = 2048, 24576
    data = [on(randn(rows, D, seed=i)) for i in range(3)]

    def peak(trainer, bytes_of_state: int) -> int:
        """Above parameters and optimizer state, which exist after the first step, over six more."""
        trainer.step(data[0])
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        for i in range(6):
            trainer.step(data[i % 3])
        synchronize()
        return torch.cuda.max_memory_allocated() - before - bytes_of_state

    gc.collect()
    synchronize()
    start = layer(features=features, device="cpu")
    parameters = sum(4 * p.numel() for p in start.parameters())
    before = torch.cuda.memory_allocated()
    sparse = sf.Trainer(layer(features=features), **SETTINGS)
    ours = peak(sparse, 2 * parameters)  # v; β1 = 0 has no m
    sparse.wait()
    assert sparse._device.graphs is not None and not sparse._device.dense
    del sparse
    gc.collect()
    before = torch.cuda.memory_allocated()
    eager = peak(EagerTrainer(layer(features=features), **SETTINGS), 3 * parameters)
    assert 0 < ours <= eager / 8, f"{ours / 2**20:.0f} MiB of {eager / 2**20:.0f}"


@pytest.mark.skipif(not GPU, reason="torch.cuda is not available: needs memory of its own")
def test_a_dense_batch_is_taken_densely_and_the_next_is_not():
    """The one step whose way a GPU chooses for itself: half of all gates open."""
    data = batches(6)
    data[2] = data[2] * 30
    trainer = trainer_of()
    logs = [trainer.step(x) for x in data]
    taken = [log.l0 for log in logs]
    assert logs[2].result.report.by_ops and taken[2] > 0.1 * F
    assert all(not logs[i].result.report.by_ops for i in (0, 1))
    assert_same_bits(everything(trainer), run(data)[1])


def test_a_checkpoint_resumes_bit_for_bit_on_the_device(tmp_path):
    data = batches(8 if GPU else 3)
    trainer, *_ = run(data[:2])
    trainer.save(tmp_path / "saved")
    resumed = sf.Trainer.load(tmp_path / "saved", DEVICE)
    assert same_bits(resumed.sae.W_enc.cpu(), trainer.sae.W_enc.cpu())
    for x in data[2:]:
        trainer.step(x)
        resumed.step(x)
    assert_same_bits(everything(trainer), everything(resumed))
