"""Engine: trains a dictionary of the package on its own memory; OnEngine: the part that the trainers share."""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae_fast import nn, ops
from sae_fast.code import RowGradient, SparseCode
from sae_fast.functional import TakenAlong, with_gradients
from sae_fast.objectives import Objective
from sae_fast.train import Trainer
from sae_fast.train.state import StepLog
from sae_fast.train.steps import HostResult

LossLog = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])


# ---- The dictionary's memory ----------------------------------------------------------------------------------------


class Engine:
    """Trains a dictionary of the package: an SAE of ours and a Trainer, on the dictionary's own memory.

    ``names``: our parameter for each of the dictionary's.  ``flipped``, one of the dictionary's, is [d, F] there, and gets
    the memory of ours, its transpose; the others are the same Parameter in both.
    """

    def __init__(self, ae: Any, sae: nn.SparseAutoencoder, names: Mapping[str, str], flipped: str, **settings: Any):
        self.ae, self.sae, self.names, self.flipped = ae, sae, names, flipped
        for theirs, ours in names.items():
            if theirs != flipped:
                setattr(sae, ours, ae.get_parameter(theirs))
        self.link()
        self.trainer = Trainer(sae, unit_start=False, **settings)
        self.version = self._encoder()._version

    def link(self) -> None:
        """Makes the two share memory, rows contiguous, where they do not: at first, and after the dictionary was moved or
        given other tensors."""
        rows = {theirs: self._rows(theirs) for theirs in self.names}
        ours = {theirs: self.sae.get_parameter(name) for theirs, name in self.names.items()}
        if all(t.is_contiguous() and t.data_ptr() == ours[theirs].data_ptr() for theirs, t in rows.items()):
            return
        self.sae.settle()
        for theirs, t in rows.items():
            t = t.contiguous()
            ours[theirs].data = t
            self.ae.get_parameter(theirs).data = t.T if theirs == self.flipped else t

    def _rows(self, theirs: str) -> Tensor:
        """A parameter of the dictionary as ours has it."""
        data = self.ae.get_parameter(theirs).data
        return data.T if theirs == self.flipped else data

    def _encoder(self) -> torch.nn.Parameter:
        return next(self.ae.get_parameter(theirs) for theirs, ours in self.names.items() if ours == "W_enc")

    def step(self, x: Tensor, lr: float, coefficient: float) -> StepLog:
        for theirs, ours in self.names.items():
            self.sae.get_parameter(ours).requires_grad_(self.ae.get_parameter(theirs).requires_grad)  # frozen or not
        if (version := self._encoder()._version) != self.version:  # written to through the dictionary's Parameter
            self.version, self.trainer.state.kept = version, ops.KeptShadow()
        return self.trainer.step(x, lr=lr, l1_coefficient=coefficient)

    @torch.no_grad()
    def evaluate(self, x: Tensor, coefficient: float) -> tuple[Tensor, SparseCode, dict[str, RowGradient | Tensor]]:
        """The losses [3], the code and the gradients of a step on x that is not taken; counted for dead features."""
        state, rows = self.trainer.state, self.sae.check_input(x)
        objective = state.objective.now(coefficient, state.step_count, self.sae.d_sae)
        done, code = self.sae.row_gradients(rows, objective, dead=state.dead)
        state.since_fired = state.fired(code)
        return done.losses, code, done.by_name

    def differentiable(self, loss: Tensor, by_name: Mapping[str, RowGradient | Tensor]) -> Tensor:
        """A loss, 0-d, with the gradients of our parameters as those of the dictionary's."""
        taken = [
            TakenAlong(self.ae.get_parameter(theirs), by_name[ours], self.sae.get_parameter(ours), theirs == self.flipped)
            for theirs, ours in self.names.items()
        ]
        return with_gradients(loss, taken)


# ---- The package's signatures ---------------------------------------------------------------------------------------


def check_dict_class(package: type, known: type, args: tuple, kwargs: dict[str, Any]) -> None:
    """``ValueError`` unless the dict_class among the arguments of the package's trainer, which may be given by position, is
    ``known`` or computes what it computes."""
    bound = inspect.signature(package).bind(*args, **kwargs)
    bound.apply_defaults()
    dict_class = bound.arguments["dict_class"]
    if not (isinstance(dict_class, type) and issubclass(dict_class, known)):
        raise ValueError(f"dict_class: got {dict_class!r}, want {known.__name__}, the class that {package.__name__} trains")
    changed = [n for n in ("encode", "decode", "forward") if getattr(dict_class, n) is not getattr(known, n)]
    if changed:
        raise ValueError(f"dict_class: {dict_class.__name__} has its own {', '.join(changed)}, want {known.__name__}'s")


def signed_as(package: type, init_l0: bool = True) -> Callable[[Callable], Callable]:
    """Gives an ``__init__`` of any arguments the signature of the package's, which it passes them to, and ``init_l0``."""
    signature = inspect.signature(package.__init__)  # type: ignore[misc]
    new = inspect.Parameter("init_l0", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="float | None")

    def signed(init: Callable) -> Callable:
        parameters = [*signature.parameters.values(), *([new] if init_l0 else [])]
        init.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return init

    return signed


# ---- The trainers' common part --------------------------------------------------------------------------------------


class OnEngine:
    """The part that the trainers share; mixed in before the package's class, whose __init__ has run."""

    device: Any
    engine: Engine | None = None
    lr: float
    scheduler: Any
    optimizer: Any
    constant: Tensor | float = 0.0  # in the loss, beside what the engine has

    @property
    def ae(self) -> Any:
        """The package's dictionary, when every step has happened: on a GPU the host runs a few steps ahead."""
        if self.engine is not None:
            self.engine.trainer.wait()
        return self._ae

    @ae.setter
    def ae(self, value: Any) -> None:
        self._ae = value

    @property
    def _sae(self) -> Any:
        """Our SAE, on the dictionary's memory as it is now."""
        assert self.engine is not None
        self.engine.link()
        return self.engine.sae

    def _start(
        self, cls: type[nn.SparseAutoencoder], names: Mapping[str, str], flipped: str = "decoder.weight",
        options: Mapping[str, Any] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        ae = self.ae
        device = next(ae.parameters()).device
        sae = cls(ae.activation_dim, ae.dict_size, device=device, seed=0, **(options or {}))  # torch's generator stays
        self.engine = Engine(
            ae, sae, names, flipped, lr=self.lr, objective=self._objective(), dead_after=self._dead_after(), **settings
        )
        self.optimizer = self.engine.trainer.optimizer
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.scheduler.lr_lambdas[0])

    def _ready(self) -> Engine:
        """The engine, on the dictionary's memory and by the trainer's attributes as they are now."""
        assert self.engine is not None
        self.engine.link()
        trainer, now = self.engine.trainer, (self._objective(), self._dead_after())
        if now != (trainer.settings.objective, trainer.settings.dead_after):
            trainer.wait()
            trainer.settings = replace(trainer.settings, objective=now[0], dead_after=now[1])
        return self.engine

    def _step(self, step: int, x: Tensor) -> StepLog:
        engine, lr = self._ready(), self.scheduler.get_last_lr()[0]
        log = engine.step(x.detach().to(self.device), lr, self._coefficient(step))
        self.scheduler.step()
        if isinstance(log.result, HostResult):
            self._follow(step, log.result.code)
        return log

    def _evaluate(self, x: Tensor, step: int, logging: bool) -> Any:
        """As the package's loss: 0-d, differentiable with respect to ``ae``'s parameters; with ``logging`` its log, f
        dense, [B, F]."""
        if x.requires_grad and torch.is_grad_enabled():
            return super().loss(x, step, logging=logging)  # type: ignore[misc]
        x = x.to(self.device)
        engine = self._ready()
        losses, code, by_name = engine.evaluate(x, self._coefficient(step))
        self._follow(step, code)
        total = losses.sum() + self.constant
        if not logging:
            return engine.differentiable(total, by_name)
        with torch.no_grad():
            x_hat, f = engine.sae.decode(code).reshape(x.shape), code.to_dense().reshape(*x.shape[:-1], code.d_sae)
            log = {"loss": total, **self._logged(losses, code, x - x_hat)}
            log = {name: v.item() if isinstance(v, Tensor) else v for name, v in log.items()}
        return self._as_log(x, x_hat, f, log)

    def _as_log(self, x: Tensor, x_hat: Tensor, f: Tensor, log: dict[str, Any]) -> Any:
        return LossLog(x, x_hat, f, log)

    def _dead_after(self) -> int | None:
        """The examples after which a feature is dead, where the engine is to count them."""
        return None

    def _objective(self) -> Objective:
        raise NotImplementedError

    def _coefficient(self, step: int) -> float:
        """The weight of the penalty in a step."""
        raise NotImplementedError

    def _follow(self, step: int, code: SparseCode) -> None:
        """Moves on what the package's trainer moves on in every evaluation of its loss."""

    def _logged(self, losses: Tensor, code: SparseCode, residual: Tensor) -> dict[str, Any]:
        """The parts of a loss that the package's trainer logs besides its sum."""
        raise NotImplementedError


def l1_mean(code: SparseCode, norms: Tensor | None = None) -> Tensor:
    """Σ of the last value set, λ left out, as a mean over the examples; times ``norms`` [F], if there are any."""
    values = code.values[-1] if norms is None else code.values[-1] * norms[code.indices.long()]
    return values.sum() / max(code.batch, 1)
