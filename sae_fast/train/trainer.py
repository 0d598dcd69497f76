"""Trainer: schedules, a loop with a progress bar, checkpoints; the steps themselves are taken by Steps."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_fast import arguments, nn
from sae_fast.objectives import AuxK, Objective
from sae_fast.ops.dispatch import log_once
from sae_fast.optim import RowAdam
from sae_fast.signals import uninterrupted
from sae_fast.train import checkpoint, resume, schedules
from sae_fast.train.device_steps import DeviceSteps
from sae_fast.train.state import Rates, Settings, StepLog, TrainState, default_objective
from sae_fast.train.steps import HostSteps, Steps


def _held(name: str) -> Any:
    """An attribute of the Trainer that its state holds."""
    return property(attrgetter(f"state.{name}"), lambda trainer, value: setattr(trainer.state, name, value))


class Trainer:
    """Trains an SAE of any kind; the sole writer of its weights between steps.

    ``objective`` is one of sae_fast.objectives; without one a GatedSAE and a ReluSAE take that of ``l1_coefficient``, λ,
    and of ``dialect``: ``paper`` holds the decoder rows at unit norm (projection, Adam, renormalisation), ``saelens``
    weights the sparsity by the decoder norms instead. A TopKSAE and a BatchTopKSAE take TopK(), prefixes of their groups.
    lr and the objective's coefficient (λ) are constant unless warm-up or decay steps are given: both warm up linearly from
    0; the learning rate falls linearly to 0 from ``lr_decay_start`` to ``total_steps``. ``init_l0``: calibrate the encoder
    biases on the first batch (see ``calibrate_``). ``grad_clip``: the largest global gradient norm. At
    ``betas[0] = 0`` only rows of features that fired are visited; ``unit_start`` is for decoder rows that are not unit at
    first (see RowAdam for both).
    ``dead_after``: features that have not fired for so many examples count as dead. ``aux``, with it: the coefficient of
    AuxK for them, usually 1/32, or an AuxK. A frozen parameter (requires_grad False) keeps its bits. Ctrl-C in a step waits
    for its end.
    """

    sae: nn.SparseAutoencoder = _held("sae")
    settings: Settings = _held("settings")
    optimizer: RowAdam = _held("optimizer")
    step_count: int = _held("step_count")

    def __init__(
        self,
        sae: nn.SparseAutoencoder,
        lr: float = 3e-4,
        l1_coefficient: float | None = None,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        dialect: str = "paper",
        lr_warmup_steps: int = 0,
        lr_decay_start: int | None = None,
        total_steps: int | None = None,
        l1_warmup_steps: int = 0,
        init_l0: float | None = None,
        grad_clip: float | None = None,
        unit_start: bool = True,
        objective: Objective | None = None,
        dead_after: int | None = None,
        aux: float | AuxK | None = None,
    ):
        if not isinstance(sae, nn.SparseAutoencoder):
            raise ValueError(f"sae: got {sae!r}, want one of sae_fast's layers")
        if objective is not None and l1_coefficient is not None:
            raise ValueError(f"l1_coefficient: got {l1_coefficient} beside an objective, want its coefficient there")
        if objective is not None and dialect != "paper":
            raise ValueError(f"dialect: got {dialect!r} beside an objective, which says what it is")
        if aux is not None:
            objective = objective or default_objective(sae, l1_coefficient, dialect)
            if not isinstance(objective, Objective):
                raise ValueError(f"objective: got {objective!r}, want one of sae_fast.objectives, or None")
            objective = replace(objective, aux=aux if isinstance(aux, AuxK) else AuxK(aux))
            l1_coefficient, dialect = None, "paper"  # which the objective says
        settings = Settings(
            lr, l1_coefficient, betas, eps, dialect, lr_warmup_steps, lr_decay_start, total_steps, l1_warmup_steps, init_l0,
            grad_clip, unit_start, objective, dead_after,
        )  # fmt: skip
        self.state = TrainState(sae, settings)
        self._host, self._device = HostSteps(self.state), DeviceSteps(self.state)

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        return self.__dict__

    @uninterrupted()
    def step(self, x: Tensor, lr: float | None = None, l1_coefficient: float | None = None) -> StepLog:
        """One optimizer step on a batch x [..., d_in].  ``lr`` and ``l1_coefficient`` replace the settings' and their
        schedules in this step, for callers with schedules of their own.

        A NaN or infinity in x is a ``ValueError``, a non-finite loss or gradient a ``FloatingPointError``; both name the
        step, and leave weights and optimizer as they were.  So does a parameter that was replaced: ``ValueError``.
        """
        index = self.step_count
        steps = self._steps()
        scheduled = self._rates(index)
        rates = Rates(*(s if given is None else given for s, given in zip(scheduled, (lr, l1_coefficient), strict=True)))
        return StepLog(index, *rates, steps.step(x, rates))

    def wait(self) -> None:
        """Until every step has happened: on a GPU the host runs a few steps ahead, and repeats a step whose buffers were
        too small.  The SAE's own methods, copies and state_dict wait by themselves; whoever reads or changes its parameters
        directly calls this first."""
        self._device.wait()

    def _steps(self) -> Steps:
        """The GPU's own steps, where it can take the next one, or the host's."""
        if self._device.goes_on():
            return self._device
        self.state.check_parameters(f"step {self.step_count}: ")
        reason = self._device.refuses()
        if reason is None:
            return self._device
        log_once("Trainer", f"not the GPU's own step: {reason}")
        self.wait()
        return self._host

    def _rates(self, index: int) -> Rates:
        """The learning rate and the sparsity coefficient of a step."""
        settings = self.settings
        lr = settings.lr * schedules.warmup(index, settings.lr_warmup_steps)
        lr *= schedules.decay(index, settings.lr_decay_start, settings.total_steps)
        return Rates(lr, float(self.state.objective.coefficient) * schedules.warmup(index, settings.l1_warmup_steps))

    def fit(
        self, batches: Iterable[Tensor], steps: int | None = None, log_every: int = 10, progress: bool = True
    ) -> list[dict[str, float]]:
        """Steps through ``batches`` (at most ``steps`` of them) under a progress bar.

        Returns one record every ``log_every`` steps and for the last: step, loss, reconstruction, sparsity, auxiliary, l0,
        fvu (of that batch), lr, l1_coefficient, seconds (since the start of this call), and dead if that is counted.
        """
        log_every = arguments.whole("log_every", log_every, wanted="≥ 1, a whole number of steps")
        if steps is not None:
            steps = arguments.whole("steps", steps, 0, wanted="a whole number ≥ 0, or None")
            batches = itertools.islice(batches, steps)
        history: list[dict[str, float]] = []
        start = time.perf_counter()
        latest: tuple[StepLog, Tensor] | None = None
        with tqdm(total=steps, disable=not progress, unit="step", desc="training", dynamic_ncols=True) as bar:
            for x in batches:
                latest = (self.step(x), x)
                if latest[0].step % log_every == 0:
                    history.append(_record(*latest, time.perf_counter() - start))
                    last = history[-1]
                    bar.set_postfix(loss=f"{last['loss']:.4g}", l0=f"{last['l0']:.1f}", fvu=f"{last['fvu']:.3f}")
                bar.update()
        self.wait()
        if latest is not None and (not history or history[-1]["step"] != latest[0].step):
            history.append(_record(*latest, time.perf_counter() - start))
        return history

    def save(self, path: str | os.PathLike) -> None:
        """Writes weights, raw optimizer state and settings into the folder ``path``, atomically; ``sf.load`` reads the SAE
        from it, :meth:`load` all of it, to resume bit for bit.  ``FileExistsError`` where another program's files are, and
        ``ValueError`` for an SAE that cannot be saved; nothing is written then."""
        self.wait()
        self.state.check_parameters()
        about, tensors = resume.describe(self.state)
        contents = {"weights": self.sae.state_dict(), "optimizer": tensors}
        checkpoint.write(path, {"sae": checkpoint.describe(self.sae), "trainer": about}, contents)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> Trainer:
        """The Trainer that :meth:`save` wrote.  Errors as :func:`sae_fast.load`."""
        manifest, tensors = checkpoint.read(path, ("weights", "optimizer"))
        sae = checkpoint.rebuild(manifest, tensors["weights"]).to(device)
        for name, n in sae.not_finite().items():
            warnings.warn(f"{path}: {name}: {n} of its numbers are NaN or infinite", stacklevel=2)
        trainer = cls(sae, **resume.settings(manifest))
        resume.restore(trainer.state, manifest, tensors["optimizer"])
        return trainer


def _record(log: StepLog, x: Tensor, seconds: float) -> dict[str, float]:
    rows = x.reshape(-1, x.shape[-1]).float()
    variance = float((rows - rows.mean(0)).pow(2).sum(1).mean())
    return {
        "step": log.step, "loss": log.loss, "reconstruction": log.reconstruction, "sparsity": log.sparsity,
        "auxiliary": log.auxiliary, "l0": log.l0, "fvu": log.squared_error / variance if variance else float("nan"),
        "lr": log.lr, "l1_coefficient": log.l1_coefficient, "seconds": seconds,
        **({} if log.dead is None else {"dead": log.dead}),
    }  # fmt: skip
