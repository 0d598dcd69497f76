"""The cost of a step on a GPU, as far as it can be counted without one: launches, the host's part, memory."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest
import torch

import sae_fast as sf
from sae_fast import use_backend

pytest.importorskip("triton")

from problems.device_runner import batches, make
from problems.device_step import SMALL, cost

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: its launches run"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of Triton's interpreter
]


def test_a_step_is_so_many_launches():
    """Lower ones are welcome."""
    B, d, F = SMALL
    found = cost(sf.GatedSAE(d, F, device="meta"), torch.empty(B, d, device="meta"), 128 * B, l1_coefficient=1.0)
    assert (len(found.kernels), len(found.torch)) <= (22, 22), (found.kernels, found.torch)


def test_random_prefixes_are_so_many_launches_more():
    """And the host waits for none: this device has no numbers to wait for."""
    B, d, F = SMALL
    x, plain = torch.empty(B, d, device="meta"), sf.objectives.L1(1.0)
    one, several = (
        cost(sf.ReluSAE(d, F, device="meta"), x, 128 * B, objective=objective)
        for objective in (plain, sf.objectives.Matryoshka(plain, random=5))
    )
    assert several.kernels == [name.replace("_residuals", "_prefix_residuals") for name in one.kernels]
    assert len(several.torch) - len(one.torch) <= 12, several.torch


@pytest.fixture
def replayed(monkeypatch):
    """A trainer whose next steps are replays on a device that does nothing, and a batch."""
    torch.set_num_threads(1)
    with use_backend("triton"):
        trainer, x = sf.Trainer(make(device="cpu"), lr=1e-2, l1_coefficient=0.4), batches()[0]
        trainer.step(x)
        graphs = trainer._device.graphs
        monkeypatch.setattr(graphs.step, "run", lambda x: pytest.fail("it is replayed"))
        monkeypatch.setattr(graphs, "_graph", lambda at: SimpleNamespace(replay=lambda: None))
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        monkeypatch.setattr(graphs, "_events", [event] * len(graphs._slots))
        for _ in range(8):
            trainer.step(x)
        yield trainer, x


def test_the_hosts_part_of_a_replayed_step_is_so_many_calls(replayed):
    trainer, x = replayed
    calls: list[str] = []

    def count(frame, event, argument):
        if event in ("call", "c_call"):
            calls.append(frame.f_code.co_name if event == "call" else argument.__name__)

    sys.setprofile(count)
    try:
        trainer.step(x)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 370, f"{len(calls)}: {calls}"


@pytest.mark.slow
def test_the_hosts_part_of_a_replayed_step_takes_60_microseconds(replayed):
    """The least of several: the machine may have other work."""
    trainer, x = replayed
    least = float("inf")
    for _ in range(50):
        start = time.process_time()
        for _ in range(40):
            trainer.step(x)
        least = min(least, (time.process_time() - start) / 40)
    assert least <= 60e-6, f"{1e6 * least:.0f} µs"


CHANGES = ["a parameter's memory", "a moment's", "frozen", "settings", "betas", "precision", "W_enc"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_is_prepared_anew_where_anything_has_changed(replayed, change):
    trainer, _ = replayed
    sae, state = trainer.sae, trainer.optimizer.state
    assert trainer._device.goes_on()
    with torch.no_grad():
        if change == "a parameter's memory":
            sae.b_dec.data = sae.b_dec.data.clone()
        elif change == "a moment's":
            state[sae.b_dec]["exp_avg_sq"] = state[sae.b_dec]["exp_avg_sq"].clone()
        elif change == "frozen":
            sae.b_gate.requires_grad_(False)
        elif change == "settings":
            trainer.settings = sf.Trainer(make(), lr=1e-2, l1_coefficient=0.4, grad_clip=1.0).settings
        elif change == "betas":
            trainer.optimizer.param_groups[1]["betas"] = 0.0, 0.9
        elif change == "precision":
            sae.precision = "bf16"
        else:
            sae.W_enc.mul_(2)
    assert not trainer._device.goes_on()
