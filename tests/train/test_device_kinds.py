"""Steps of every kind on a GPU: the trajectory is the host's, also where steps are repeated."""

from __future__ import annotations

import pytest
import torch
from helpers import Judge, assert_same_bits, randn
from torch.nn import functional

import sae_fast as sf
from sae_fast import use_backend
from sae_fast.objectives import L0, L1, AuxK, Gated, Matryoshka, Objective, TopK

pytest.importorskip("triton")

from problems.device_runner import DEVICE, D, F, batches, recoveries_seen

from sae_fast.kernels.flag import DEAD, OVERFLOW, SHORT
from sae_fast.train.device_floors import Floors

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Triton's interpreter
B = 5
MOMENTUM = dict(betas=(0.9, 0.99), grad_clip=2.0)
KINDS = {
    "topk": (sf.TopKSAE, TopK(), {"k": 3}, MOMENTUM),
    "batchtopk": (sf.BatchTopKSAE, TopK(threshold_start=1, threshold_beta=0.5), {"k": 3}, MOMENTUM),
    "a group is off": (sf.TopKSAE, TopK(), {"k": 3, "group_sizes": [12, 8], "active_groups": 1}, {}),
    "l0": (sf.JumpReluSAE, L0(0.1, bandwidth=0.3), {}, dict(grad_clip=0.5)),
    "l0 target": (sf.JumpReluSAE, L0(1.0, target=2, bandwidth=0.3, ste_to_input=True), {}, MOMENTUM),
    "l0 quadratic of f": (sf.JumpReluSAE, L0(0.1, target=2, form="quadratic", window="f", bandwidth=0.3), {}, {}),
    "l0 tanh, thresholds below 0": (sf.JumpReluSAE, L0(0.1, form="tanh", bandwidth=0.3, positive=False), {}, {}),
    "p": (sf.GatedSAE, Gated(0.3, p=0.7), {}, {}),
    "p rooted": (sf.ReluSAE, L1(0.3, p=0.5, rooted=True), {}, MOMENTUM),
    "norms, b_dec not subtracted": (sf.ReluSAE, L1(0.3, decoder_norms=True), {"apply_b_dec_to_input": False}, {}),
    "prefixes": (
        sf.BatchTopKSAE,
        Matryoshka(TopK(threshold_start=1, threshold_beta=0.5), group_sizes=(5, 15)),
        {"k": 3},
        MOMENTUM,
    ),
    "random prefixes": (sf.TopKSAE, Matryoshka(random=3, weights=(1, 0.5, 2)), {"k": 3}, MOMENTUM),
    "prefixes of L1": (sf.ReluSAE, Matryoshka(random=2, over=L1(0.3)), {}, MOMENTUM),
    "prefixes of gates": (sf.GatedSAE, Matryoshka(fractions=(0.3, 0.7), over=Gated(0.3)), {}, {}),
    "aux": (sf.TopKSAE, TopK(aux=AuxK()), {"k": 3}, dict(MOMENTUM, dead_after=3 * B + 2)),
}


def layer(cls: type, device: str, objective: Objective, **options) -> sf.nn.SparseAutoencoder:
    sae = cls(D, F, seed=0, **options)
    with torch.no_grad():
        sae.W_enc.add_(0.05 * randn(F, D, seed=1))
        sae.b_dec.copy_(0.1 * randn(D, seed=2))
        if not isinstance(sae, sf.nn.GroupedSAE):
            sae.calibrate_(randn(64, D, seed=3), 3)
        if isinstance(sae, sf.JumpReluSAE):
            sae.threshold.add_(0.1 if objective.positive else 0.02 - 0.1 * (torch.arange(F) % 3 == 0))
            sae.b_enc.add_(0.1)
        sae.W_dec.copy_(
            functional.normalize(sae.W_dec, dim=1)
            * (1 + torch.arange(F) / F if cls is sf.ReluSAE else torch.ones(F))[:, None]
        )
    return sae.to(device)


def run(kind: str, backend: str, data, double: bool = False, **changes):
    """(trainer, logs) after ``data``; eps is large, or Adam would make steps of full size of rounding."""
    cls, objective, options, settings = KINDS[kind]
    device = DEVICE if backend == "triton" else "cpu"
    with use_backend(backend):
        sae = layer(cls, device, objective, **options)
        settings = dict(lr=1e-2, eps=1e-2, dead_after=2 * B + 2, objective=objective) | settings | changes
        trainer = sf.Trainer(sae.double() if double else sae, **settings)
        logs = [trainer.step(x.to(device, torch.float64 if double else torch.float32)) for x in data]
        trainer.wait()
    return trainer, logs


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def recoveries(monkeypatch):
    return recoveries_seen(monkeypatch)


@pytest.mark.slow(but=3)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_as_close_to_float64_as_on_the_cpu_engine(kind, recoveries):
    data = batches(8)
    trainer, logs = run(kind, "triton", data)
    engine, told = run(kind, "cpu", data)
    exact, _ = run(kind, "reference", data, double=True)
    assert trainer._device.graphs is not None, "the device path"
    by_ops = [log.result.report.by_ops for log in logs]
    assert not all(by_ops) and any(by_ops) == (kind == "aux")
    assert any(flag & SHORT for _, flag in recoveries) == isinstance(trainer.sae, sf.nn.GroupedSAE)
    assert all(flag & (SHORT | DEAD) for _, flag in recoveries)
    assert (kind == "aux") == any(flag & DEAD for _, flag in recoveries)
    judge = Judge()
    for name, p in trainer.sae.named_parameters():
        judge.add(name, p.cpu(), engine.sae.get_parameter(name), exact.sae.get_parameter(name))
    judge.verdict()
    for a, b in zip(trainer.sae.buffers(), engine.sae.buffers(), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-6) and float(a) > 0
    for log, want in zip(logs, told, strict=True):
        assert (log.l0, log.dead, log.step) == (want.l0, want.dead, want.step)
        assert log.losses.tolist() == pytest.approx(want.losses.tolist(), rel=1e-5, abs=1e-6)
        assert log.squared_error == pytest.approx(want.squared_error, rel=1e-5)
    assert torch.equal(trainer.state.since_fired.cpu(), engine.state.since_fired)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "l0", "random prefixes"])
def test_a_step_of_a_kind_that_found_too_little_room_leaves_nothing_behind(kind, recoveries):
    """Neither thresholds, nor counts, nor floors."""
    data = batches(6)
    wanted, _ = run(kind, "triton", data)
    recoveries.clear()
    cls, objective, options, settings = KINDS[kind]
    with use_backend("triton"):
        sae = layer(cls, DEVICE, objective, **options)
        trainer = sf.Trainer(sae, lr=1e-2, eps=1e-2, dead_after=2 * B + 2, objective=objective, **settings)
        for i, x in enumerate(data):
            if i == 4:
                trainer.wait()
                trainer._device.capacity = 1
            trainer.step(x)
        trainer.wait()
    assert (4, OVERFLOW) in recoveries
    for a, b in zip(trainer.sae.state_dict().values(), wanted.sae.state_dict().values(), strict=True):
        assert_same_bits(a, b)
    assert torch.equal(trainer.state.since_fired, wanted.state.since_fired)


def test_a_floor_that_hides_some_of_the_largest_is_found_and_lowered(recoveries):
    """Examples of which one is far smaller in its largest entries than those before: beside b_dec, along no feature."""
    data = batches(6)
    data[4] = data[4].clone()
    data[4][2] = 0.1 * randn(D, seed=2).to(DEVICE) + 1e-3 * data[4][2]
    trainer, logs = run("batchtopk", "triton", [*data[:4], 0.01 * data[4], data[5]])
    _, told = run("batchtopk", "cpu", [*data[:4], 0.01 * data[4], data[5]])
    assert (4, SHORT) in recoveries and not logs[4].result.report.by_ops
    assert [log.l0 for log in logs] == [log.l0 for log in told]
    assert trainer._device.floors.margin < 0.9


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_what_is_known_of_floors_changes_no_bit(kind, recoveries, monkeypatch):
    """Nor is it in a checkpoint."""
    wanted, _ = run(kind, "triton", batches(4))
    monkeypatch.setattr(Floors, "follow", lambda *_: None)  # each step has to be repeated above floors that are sure
    recoveries.clear()
    found, _ = run(kind, "triton", batches(4))
    assert [flag for _, flag in recoveries] == 4 * [SHORT]
    for a, b in zip(found.sae.state_dict().values(), wanted.sae.state_dict().values(), strict=True):
        assert_same_bits(a, b)
