"""A Trainer through any sequence of what one does to it, beside a twin that only trains: the same bits after each."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import tempfile
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits, randn
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from problems.checkpoint import interrupted
from problems.trainer import everything

import sae_fast as sf
from sae_fast import use_backend

B, D, F = 9, 6, 20
LAYERS = [sf.GatedSAE, sf.ReluSAE]
NAMES = ("W_enc", "W_dec", "b_dec", "bias")
choose = st.sampled_from


class TrainerMachine(RuleBasedStateMachine):
    """``trainer`` is saved, loaded, copied, interrupted and so on; ``twin`` gets only what changes the trajectory."""

    backend: str | None = None

    @initialize(
        cls=choose(LAYERS),
        betas=choose([(0.0, 0.999), (0.9, 0.99)]),
        dialect=choose(["paper", "saelens"]),
        precision=choose(["exact", "bf16", "fp32"]),
        init_l0=choose([None, 4]),
        grad_clip=choose([None, 0.5]),
    )
    def start(self, cls, betas, dialect, precision, init_l0, grad_clip):
        torch.set_num_threads(1)
        sae = cls(D, F, seed=0, precision=precision)
        with torch.no_grad():
            sae.W_dec.mul_(torch.linspace(0.5, 2, F)[:, None])
        self.trainer = sf.Trainer(
            sae, lr=1e-2, l1_coefficient=0.3, betas=betas, dialect=dialect, init_l0=init_l0, grad_clip=grad_clip
        )
        self.twin = copy.deepcopy(self.trainer)
        self.folder = Path(tempfile.mkdtemp(prefix="sae_fast-test-"))
        self.saved: sf.Trainer | None = None  # the twin as it was at the last save

    def teardown(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def on_backend(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "step .*: W_enc has been changed")
            if self.backend is None:
                yield
            else:
                with use_backend(self.backend):
                    yield

    def parameter(self, trainer: sf.Trainer, name: str) -> torch.nn.Parameter:
        return trainer.sae.get_parameter(trainer.sae.per_feature[0] if name == "bias" else name)

    def both(self):
        return self.trainer, self.twin

    @invariant()
    def they_are_the_same(self):
        if hasattr(self, "trainer"):
            for trainer in self.both():
                trainer.wait()
            assert_same_bits(everything(self.trainer), everything(self.twin))
            frozen = [[p.requires_grad for p in trainer.sae.parameters()] for trainer in self.both()]
            assert frozen[0] == frozen[1] and self.trainer.settings == self.twin.settings
            assert self.trainer.sae.precision == self.twin.sae.precision

    # ---- What changes the trajectory ----------------------------------------------------------------------------------

    @rule(seed=st.integers(0, 5), steps=st.integers(1, 3))
    def step(self, seed, steps):
        with self.on_backend():
            for i in range(steps):
                logs = [trainer.step(randn(B, D, seed=10 * seed + i)) for trainer in self.both()]
                assert logs[0].losses.tolist() == logs[1].losses.tolist() and logs[0].l0 == logs[1].l0

    @rule(name=choose(NAMES), trained=st.booleans())
    def freeze_or_thaw(self, name, trained):
        for trainer in self.both():
            trainer.wait()
            self.parameter(trainer, name).requires_grad_(trained)

    @rule(beta2=choose([0.999, 0.9]))
    def change_beta2(self, beta2):
        for trainer in self.both():
            trainer.wait()
            for group in trainer.optimizer.param_groups:
                group["betas"] = (group["betas"][0], beta2)

    @rule(row=st.integers(0, F - 1), torch_counts=st.booleans())
    def write_a_row(self, row, torch_counts):
        """The twin is told."""
        for trainer in self.both():
            trainer.wait()
            with torch.no_grad():
                W = trainer.sae.W_enc if trainer is self.twin or torch_counts else trainer.sae.W_enc.data
                W[row] = randn(D, seed=row)

    # ---- What does not ------------------------------------------------------------------------------------------------

    @rule()
    def save(self):
        self.trainer.save(self.folder)
        self.saved = copy.deepcopy(self.twin)
        assert len(list(self.folder.iterdir())) == 3

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self):
        self.trainer, self.twin = sf.Trainer.load(self.folder), copy.deepcopy(self.saved)

    @rule(way=choose([copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))]))
    def copy(self, way):
        self.trainer = way(self.trainer)

    @precondition(lambda self: self.saved is not None)
    @rule(moment=st.integers(0, 30))
    def kill_a_save(self, moment):
        self.trainer.wait()
        child = os.fork()
        if child == 0:
            try:
                with interrupted(moment, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                    self.trainer.save(self.folder)
                os._exit(0)
            finally:
                os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = everything(sf.Trainer.load(self.folder))
        wanted = [everything(t) for t in (self.saved, self.twin)]
        same = [len(found) == len(w) and all(map(torch.equal, found, w)) for w in wanted]
        assert ended in (0, -signal.SIGKILL) and (any(same) if ended else same[1])
        if same[1]:
            self.saved = copy.deepcopy(self.twin)

    @rule(name=choose(NAMES), seed=st.integers(0, 5))
    def replace_a_parameter(self, name, seed):
        sae, old = self.trainer.sae, self.parameter(self.trainer, name)
        (own,) = (n for n, p in sae.named_parameters() if p is old)
        setattr(sae, own, torch.nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
        for act in (lambda: self.trainer.step(randn(B, D, seed=seed)), lambda: self.trainer.save(self.folder)):
            with pytest.raises(ValueError, match=f"{own}: got a Parameter that the optimizer does not hold"):
                act()
        setattr(sae, own, old)

    @rule(name=choose(NAMES))
    def load_values(self, name):
        self.trainer.sae.load_state_dict({n: t.clone() for n, t in self.trainer.sae.state_dict().items()})

    @rule(seed=st.integers(0, 5))
    def move_and_step_and_move_back(self, seed):
        started = self.trainer.step_count > 0 and bool(self.trainer.optimizer.state.get(self.trainer.sae.W_enc))
        self.trainer.wait()
        self.trainer.sae.double()
        if started:
            with pytest.raises(ValueError, match=r"W_enc: got torch\.float64"):
                self.trainer.step(randn(B, D, seed=seed))
        self.trainer.sae.float()

    @rule(bad=choose([float("nan"), float("inf"), 1e30]))
    def a_bad_batch(self, bad):
        with self.on_backend(), pytest.raises((ValueError, FloatingPointError), match=f"^step {self.trainer.step_count}: "):
            self.trainer.step(torch.full((B, D), bad))
            self.trainer.wait()

    @rule(seed=st.integers(0, 5), at=choose(["row_gradients", "check_shape"]))
    def interrupt_a_step(self, seed, at):
        sae = self.trainer.sae
        method = getattr(sae, at)

        def interrupting(*args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            return method(*args, **kwargs)

        setattr(sae, at, interrupting)
        before = self.trainer.step_count
        with self.on_backend():
            try:
                self.trainer.step(randn(B, D, seed=seed))
            except KeyboardInterrupt:
                pass
            else:
                assert at == "row_gradients" and self.backend is not None
            finally:
                delattr(sae, at)
            assert self.trainer.step_count == before + 1
            self.twin.step(randn(B, D, seed=seed))


TestTrainer = TrainerMachine.TestCase
TestTrainer.settings = settings(max_examples=12, stateful_step_count=25)


class DeviceMachine(TrainerMachine):
    """By Triton's interpreter, or the GPU's own steps."""

    backend = "triton"


TestTrainerOnADevice = pytest.mark.slow(DeviceMachine.TestCase)
TestTrainerOnADevice.settings = settings(max_examples=6, stateful_step_count=10)
if find_spec("triton") is None:
    TestTrainerOnADevice = pytest.mark.skip(reason="triton is not installed")(TestTrainerOnADevice)
