"""Steps by themselves, of both kinds: on a TrainState, with no Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same_bits, randn
from torch import Tensor

import sae_fast as sf
from sae_fast import use_backend
from sae_fast.train.device_steps import DeviceSteps
from sae_fast.train.state import Rates, TrainState
from sae_fast.train.steps import HostSteps

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Triton's interpreter

ARGUMENTS = dict(lr=1e-2, l1_coefficient=0.4, init_l0=3, grad_clip=1.0)
RATES = [Rates(1e-2, 0.4), Rates(3e-3, 0.1), Rates(2e-2, 0.0)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[HostSteps, DeviceSteps])
def kind(request):
    torch.set_num_threads(1)
    if request.param is DeviceSteps:
        pytest.importorskip("triton")
    with use_backend("triton" if request.param is DeviceSteps else "reference"):
        yield request.param


def layer() -> sf.GatedSAE:
    sae = sf.GatedSAE(6, 20, seed=0).to(DEVICE)
    with torch.no_grad():
        sae.W_dec.mul_(1.5)  # which the first step makes unit
    return sae


def fresh() -> TrainState:
    return TrainState(layer(), sf.Trainer(layer(), **ARGUMENTS).settings)


def batch(i: int) -> Tensor:
    return 0.8 * randn(5, 6, seed=i).to(DEVICE)


def everything(state: TrainState) -> list[Tensor]:
    held = [state.optimizer.state.get(p, {}) for p in state.sae.parameters()]
    moments = [torch.as_tensor(s[key]).cpu() for s in held for key in sorted(s)]
    return [torch.tensor(state.step_count), *(p.detach().cpu().clone() for p in state.sae.parameters()), *moments]


def test_they_take_the_trainers_steps(kind):
    steps, trainer = kind(fresh()), sf.Trainer(layer(), **ARGUMENTS)
    results = [steps.step(batch(i), rates) for i, rates in enumerate(RATES)]
    logs = [trainer.step(batch(i), *rates) for i, rates in enumerate(RATES)]
    steps.wait()
    trainer.wait()
    assert (trainer._device.graphs is not None) == (kind is DeviceSteps)
    assert [r.l0 for r in results] == [log.l0 for log in logs] and results[0].l0 > 0
    assert_same_bits([r.losses for r in results], [log.losses for log in logs])
    assert_same_bits(everything(steps.state), everything(trainer.state))


def test_a_first_step_that_fails_leaves_the_state_as_it_was(kind):
    steps, twin = kind(fresh()), kind(fresh())
    before = everything(steps.state)
    for bad, error in ((1e25, FloatingPointError), (float("nan"), ValueError)):
        with pytest.raises(error, match=r"^step 0: "):
            steps.step(batch(0) * bad, RATES[0])
        assert_same_bits(everything(steps.state), before)
    for s in (steps, twin):
        s.step(batch(0), RATES[0])
        s.wait()
    assert_same_bits(everything(steps.state), everything(twin.state))


def test_a_copy_has_a_state_of_its_own(kind):
    steps = kind(fresh())
    for i in range(2):
        steps.step(batch(i), RATES[i])
    other = copy.deepcopy(steps)  # with a step under way
    before = everything(steps.state)
    assert_same_bits(everything(other.state), before)
    other.step(batch(2), RATES[2])
    other.wait()
    assert_same_bits(everything(steps.state), before)
    steps.step(batch(2), RATES[2])
    steps.wait()
    assert_same_bits(everything(steps.state), everything(other.state))
