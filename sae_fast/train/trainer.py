"""Trainer: the fused training step, schedules, a loop with a progress bar, checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_fast import files, nn, ops
from sae_fast.code import RowGradient, SparseCode
from sae_fast.ops import checks
from sae_fast.ops.dispatch import log_once
from sae_fast.optim import RowAdam, check_group
from sae_fast.reference import DIALECTS
from sae_fast.signals import uninterrupted
from sae_fast.train import checkpoint, schedules
from sae_fast.train.device_runner import DeviceRunner, Step, mean_l0, stale_message


class HostResult:
    """What came of a step that the host has taken."""

    def __init__(self, losses: Tensor, code: SparseCode):
        self.losses, self.code = losses, code

    @cached_property
    def l0(self) -> float:
        return mean_l0(self.code)


class DeviceResult:
    """What comes of a step on a GPU; to ask is to wait for it."""

    def __init__(self, runner: DeviceRunner, step: Step):
        self._runner, self._step = runner, step

    @property
    def losses(self) -> Tensor:
        return self._runner.losses(self._step)

    @property
    def l0(self) -> float:
        return self._runner.l0(self._step)


@dataclass(frozen=True, repr=False)
class StepLog:
    """What one step saw, before its update.  Losses are means over the batch; reading a field may synchronise."""

    step: int
    lr: float
    l1_coefficient: float
    result: HostResult | DeviceResult

    def __repr__(self) -> str:
        terms = ", ".join(f"{n}={getattr(self, n):.6g}" for n in ("loss", "reconstruction", "sparsity", "auxiliary", "l0"))
        return f"StepLog(step={self.step}, {terms})"

    @property
    def losses(self) -> Tensor:
        """[3]: reconstruction, sparsity, auxiliary."""
        return self.result.losses

    @property
    def reconstruction(self) -> float:
        return float(self.losses[0])

    @property
    def sparsity(self) -> float:
        """λ included."""
        return float(self.losses[1])

    @property
    def auxiliary(self) -> float:
        return float(self.losses[2])

    @property
    def loss(self) -> float:
        return float(self.losses.sum())

    @property
    def l0(self) -> float:
        """Mean number of non-zero features an example."""
        return self.result.l0


GROUP_SETTINGS = ("betas", "eps", "unit_rows", "unit_start")  # of the optimizer, which may change in mid-run


@dataclass(frozen=True)
class Settings:
    """A Trainer's arguments, as its checkpoint keeps them."""

    lr: float
    l1_coefficient: float
    betas: tuple[float, float]
    eps: float
    dialect: str
    lr_warmup_steps: int
    lr_decay_start: int | None
    total_steps: int | None
    l1_warmup_steps: int
    init_l0: float | None
    grad_clip: float | None
    unit_start: bool = True

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise ValueError(f"dialect: got {self.dialect!r}, want one of {DIALECTS}")
        for name in ("lr_warmup_steps", "l1_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, want ≥ 0")
        if not self.l1_coefficient >= 0:
            raise ValueError(f"l1_coefficient: got {self.l1_coefficient}, want ≥ 0")
        if (self.lr_decay_start is None) != (self.total_steps is None):
            raise ValueError("lr_decay_start, total_steps: got one without the other, want both or neither")
        if self.lr_decay_start is not None and self.total_steps is not None and self.lr_decay_start > self.total_steps:
            raise ValueError(f"lr_decay_start: got {self.lr_decay_start}, want ≤ total_steps = {self.total_steps}")
        if self.init_l0 is not None and not self.init_l0 > 0:
            raise ValueError(f"init_l0: got {self.init_l0}, want > 0 or None")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip: got {self.grad_clip}, want > 0 or None")


class Trainer:
    """Trains a GatedSAE or ReluSAE; the sole writer of its weights between steps.

    The ``paper`` dialect holds the decoder rows at unit norm (projection, Adam, renormalisation); ``saelens`` weights the
    sparsity by the decoder norms instead. ``l1_coefficient``, λ, has to be given. lr and l1_coefficient are constant unless
    warm-up or decay steps are given: both warm up linearly from 0; the learning rate falls linearly to 0 from
    ``lr_decay_start`` to ``total_steps``. ``init_l0``: calibrate the encoder biases on the first batch (see
    ``calibrate_``). ``grad_clip``: the largest global gradient norm. ``betas[0] = 0`` takes the lazy optimizer;
    ``unit_start`` is for decoder rows that are not unit at first (see RowAdam for both). A frozen parameter (requires_grad
    False) keeps its bits. Ctrl-C in a step waits for its end.
    """

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
    ):
        if not hasattr(sae, "loss"):
            raise ValueError(f"sae: got {type(sae).__name__}, want a GatedSAE or ReluSAE; others are for inference")
        if l1_coefficient is None:
            raise ValueError(
                "l1_coefficient: got None, want λ ≥ 0, the weight of the sparsity beside ‖x − x̂‖².  It goes with the scale "
                "of x; at unit variance per dimension begin with 1 to 10, and raise it where L0 ends too high"
            )
        self.sae = sae
        self.settings = Settings(
            lr, l1_coefficient, tuple(betas), eps, dialect, lr_warmup_steps, lr_decay_start, total_steps,  # type: ignore[arg-type]
            l1_warmup_steps, init_l0, grad_clip, unit_start,
        )  # fmt: skip
        rest = [p for name, p in sae.named_parameters() if name != "W_dec"]
        groups = [{"params": [sae.W_dec], "unit_rows": dialect == "paper"}, {"params": rest}]
        self.optimizer = RowAdam(groups, lr=lr, betas=betas, eps=eps, unit_start=unit_start)
        self.step_count = 0
        self._kept = ops.KeptShadow()  # of W_enc
        self._runner: DeviceRunner | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        return {**self.__dict__, "_runner": None}  # a copy has steps, graphs and events of its own

    @uninterrupted()
    def step(self, x: Tensor, lr: float | None = None, l1_coefficient: float | None = None) -> StepLog:
        """One optimizer step on a batch x [..., d_in].  ``lr`` and ``l1_coefficient`` replace the settings' and their
        schedules in this step, for callers with schedules of their own.

        A NaN or infinity in x is a ``ValueError``, a non-finite loss or gradient a ``FloatingPointError``; both name the
        step, and leave weights and optimizer as they were.  So does a parameter that was replaced: ``ValueError``.
        """
        index = self.step_count
        self._check_parameters(f"step {index}: ")
        runner = self._device_runner()
        undo: dict[str, Tensor] = {}
        started = index > 0 or any(self.optimizer.state.values())
        try:
            self.sae.check_shape(x)
            if x.numel() == 0:
                raise ValueError(f"x: got shape {tuple(x.shape)}, want at least one example")
            if runner is None or index == 0:
                rows = self.sae.check_input(x)
            undo = self._prepare(rows) if runner is None or index == 0 else {}
        except ValueError as error:
            raise ValueError(f"step {index}: {error}") from error
        scheduled = self._rates(index)
        lr, l1 = (s if given is None else given for s, given in zip(scheduled, (lr, l1_coefficient), strict=True))
        result: HostResult | DeviceResult
        try:
            if runner is not None:
                result = DeviceResult(runner, runner.step(x.detach(), lr, l1))
            else:
                result = HostResult(*self._update(rows, index, lr, l1, self._shadow()))
                self.step_count += 1
        except (FloatingPointError, ValueError):
            self.sae.load_state_dict(undo, strict=False)
            if not started:
                self.optimizer.state.clear()  # which a step on a GPU makes first
            raise
        return StepLog(index, lr, l1, result)

    def wait(self) -> None:
        """Until every step has happened: on a GPU the host runs a few steps ahead, and repeats a step whose buffers were
        too small.  The SAE's own methods, copies and state_dict wait by themselves; whoever reads or changes its parameters
        directly calls this first."""
        if self._runner is not None:
            self._runner.wait()

    def _check_parameters(self, where: str = "") -> None:
        """``ValueError`` that names a parameter of the SAE which is not the optimizer's, or not as its state is."""
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        for name, p in self.sae.named_parameters():
            if p not in held:
                raise ValueError(
                    f"{where}{name}: got a Parameter that the optimizer does not hold (load_state_dict(assign=True), a new "
                    "one); want its values copied into the one that was there, or a new Trainer"
                )
            held.remove(p)
            state = self.optimizer.state.get(p, {}).get("exp_avg_sq", p)
            if p.dtype not in (torch.float32, torch.float64) or not p.is_contiguous():
                raise ValueError(f"{where}{name}: got {p.dtype}, strides {p.stride()}, want contiguous float32 masters")
            if (p.dtype, p.device, p.shape) != (state.dtype, state.device, state.shape):
                raise ValueError(
                    f"{where}{name}: got {p.dtype} {tuple(p.shape)} on {p.device}, but the optimizer's state is "
                    f"{state.dtype} {tuple(state.shape)} on {state.device}; want both alike (save, and load where it goes)"
                )
        if held:
            raise ValueError(f"{where}optimizer: got {len(held)} parameters that are not the SAE's, want its own only")

    def _device_runner(self) -> DeviceRunner | None:
        """What takes the steps on a GPU, where it can."""
        reason = DeviceRunner.refuses(self)
        if reason is not None:
            log_once("Trainer", f"not the GPU's own step: {reason}")
            self.wait()
            return None
        if self._runner is None:
            self._runner = DeviceRunner(self)
            self.sae._settle = self._runner.wait
        return self._runner

    def _rates(self, index: int) -> tuple[float, float]:
        """The learning rate and the sparsity coefficient of a step."""
        settings = self.settings
        lr = settings.lr * schedules.warmup(index, settings.lr_warmup_steps)
        lr *= schedules.decay(index, settings.lr_decay_start, settings.total_steps)
        return lr, settings.l1_coefficient * schedules.warmup(index, settings.l1_warmup_steps)

    def _update(
        self, rows: Tensor, index: int, lr: float, l1: float, shadow: ops.Shadow | None
    ) -> tuple[Tensor, SparseCode]:
        """The step, op by op: its losses and its code."""
        losses, code, gradients = self.sae.row_gradients(rows, l1, self.settings.dialect, shadow)
        gradients = {name: g for name, g in gradients.items() if self.sae.get_parameter(name).requires_grad}
        self._check_finite(index, losses, gradients)
        by_parameter = {self.sae.get_parameter(name): g for name, g in gradients.items()}
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        shadows = {} if shadow is None else {self.sae.W_enc: shadow}
        self.optimizer.step(rows=by_parameter, grad_scale=self._clip(gradients), shadows=shadows)
        if shadow is not None:
            self._kept.follows(self.sae.W_enc)
        return losses, code

    def fit(
        self, batches: Iterable[Tensor], steps: int | None = None, log_every: int = 10, progress: bool = True
    ) -> list[dict[str, float]]:
        """Steps through ``batches`` (at most ``steps`` of them) under a progress bar.

        Returns one record every ``log_every`` steps and for the last: step, loss, reconstruction, sparsity, auxiliary, l0,
        fvu (of that batch), lr, l1_coefficient, seconds (since the start of this call).
        """
        if log_every < 1:
            raise ValueError(f"log_every: got {log_every}, want ≥ 1")
        if steps is not None:
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
        self._check_parameters()
        tensors, numbers = {}, {}
        for name, parameter in self.sae.named_parameters():
            for key, value in (self.optimizer.state.get(parameter) or {"step": 0}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{key}"] = value
                else:
                    numbers[f"{name}.{key}"] = value
        groups = [{key: group[key] for key in GROUP_SETTINGS} for group in self.optimizer.param_groups]
        frozen = [name for name, parameter in self.sae.named_parameters() if not parameter.requires_grad]
        about = {
            "step": self.step_count, "settings": dataclasses.asdict(self.settings), "optimizer": numbers, "groups": groups,
            "frozen": frozen,
        }  # fmt: skip
        contents = {"weights": self.sae.state_dict(), "optimizer": tensors}
        checkpoint.write(path, {"sae": checkpoint.describe(self.sae), "trainer": about}, contents)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> Trainer:
        """The Trainer that :meth:`save` wrote.  Errors as :func:`sae_fast.load`."""
        manifest, tensors = checkpoint.read(path, ("weights", "optimizer"))
        sae = checkpoint.rebuild(manifest, tensors["weights"]).to(device)
        for name, n in sae.not_finite().items():
            warnings.warn(f"{path}: {name}: {n} of its numbers are NaN or infinite", stacklevel=2)
        settings = checkpoint.entry(manifest, dict, "trainer", "settings")
        fields = dataclasses.fields(Settings)
        needed = {field.name for field in fields if field.default is dataclasses.MISSING}
        missing, unknown = sorted(needed - set(settings)), sorted(set(settings) - {field.name for field in fields})
        if missing or unknown:
            raise ValueError(f"{checkpoint.MANIFEST}: trainer.settings: {missing} missing, {unknown} unknown")
        betas = tuple(checkpoint.entry(manifest, list, "trainer", "settings", "betas"))
        trainer = cls(sae, **{**settings, "betas": betas})
        trainer.step_count = checkpoint.entry(manifest, int, "trainer", "step")
        parameters = dict(sae.named_parameters())
        trainer._restore(manifest["trainer"])
        entries: dict[str, Any] = {**tensors["optimizer"], **checkpoint.entry(manifest, dict, "trainer", "optimizer")}
        for full_name, value in entries.items():
            name, key = full_name.rsplit(".", 1)
            if name not in parameters:
                raise ValueError(f"optimizer: state for an unknown parameter {name!r}")
            trainer.optimizer.state[parameters[name]][key] = value.to(device) if isinstance(value, Tensor) else value
        momentum = {p: group["betas"][0] > 0 for group in trainer.optimizer.param_groups for p in group["params"]}
        for name, parameter in parameters.items():
            state = trainer.optimizer.state.get(parameter, {})
            if state == {"step": 0}:
                state.clear()  # never stepped
            elif trainer.step_count:
                _check_state(name, parameter, state, momentum[parameter])
        return trainer

    def _restore(self, about: dict[str, Any]) -> None:
        """What a checkpoint says of the optimizer's groups and of frozen parameters; one of before it did says neither."""
        for i, group in enumerate(self.optimizer.param_groups if "groups" in about else []):
            saved = dict(enumerate(files.key(about, checkpoint.MANIFEST, list, "groups"))).get(i)
            if not isinstance(saved, dict) or set(saved) != set(GROUP_SETTINGS) or not isinstance(saved["betas"], list):
                raise ValueError(
                    f"{checkpoint.MANIFEST}: trainer.groups: got {saved!r}, want {list(GROUP_SETTINGS)} of group {i}"
                )
            group.update(saved | {"betas": tuple(saved["betas"])})
            check_group(group)
        parameters = dict(self.sae.named_parameters())
        for name in files.key(about, checkpoint.MANIFEST, list, "frozen") if "frozen" in about else []:
            if name not in parameters:
                raise ValueError(f"{checkpoint.MANIFEST}: trainer.frozen: got {name!r}, want one of {sorted(parameters)}")
            parameters[name].requires_grad_(False)

    @torch.no_grad()
    def _prepare(self, rows: Tensor) -> dict[str, Tensor]:
        """What the first step of a parameter does before it starts: calibration, unit rows.  Returns what it changed, as it
        was."""
        undo, W, vectors = {}, self.sae.W_dec, [self.sae.get_parameter(name) for name in self.sae.per_feature]
        if self.step_count == 0 and self.settings.init_l0 is not None and vectors[0].requires_grad:
            undo = {name: p.clone() for name, p in zip(self.sae.per_feature, vectors, strict=True)}
            self.sae.calibrate_(rows, self.settings.init_l0)
            for p, before in zip(vectors, undo.values(), strict=True):
                if not p.requires_grad:
                    p.copy_(before)
        unit = self.settings.dialect == "paper" and self.settings.unit_start
        if not unit or not W.requires_grad or self.optimizer.state.get(W):
            return undo
        norms = W.norm(dim=1)
        undo["W_dec"] = W.clone()  # the optimizer makes the rows unit to the last bit
        if bool(((norms - 1).abs() > 8 * torch.finfo(norms.dtype).eps).any()):
            W.copy_(torch.nn.functional.normalize(W, dim=1))
        return undo

    def _shadow(self) -> ops.Shadow | None:
        """W_enc's Shadow, which every step keeps up to date.  What else writes to W_enc is noticed at once where torch
        counts it, and otherwise by comparing 16 columns and a sixteenth of the rows a step: at once where whole rows were
        changed, within 16 steps where it is less, unless the row has a step before, which makes up for it."""
        W = self.sae.W_enc
        shadow = None if self.sae.precision in ("fp32", "tf32") else self._kept.of(W)
        if shadow is None:
            return None
        sixteenth = self.step_count % 16
        first, last = (W.shape[0] * i // 16 for i in (sixteenth, sixteenth + 1))
        if bool(ops.stale_columns(W, shadow, self.step_count)) or ops.stale_rows(W, shadow, first, last):
            warnings.warn(stale_message(self.step_count), stacklevel=4)
            ops.refresh_shadow(W, shadow)
        return shadow

    def _check_finite(self, index: int, losses: Tensor, gradients: dict[str, RowGradient | Tensor]) -> None:
        parts = {"reconstruction": losses[0], "sparsity": losses[1], "auxiliary": losses[2]}
        for name, gradient in gradients.items():
            parts[f"gradient of {name}"] = self._bound(name, gradient)
        for name, value in parts.items():
            if not bool(torch.isfinite(checks.largest(value))):
                raise FloatingPointError(f"step {index}: the {name} is not finite; the weights are unchanged")

    @torch.no_grad()
    def _bound(self, name: str, gradient: RowGradient | Tensor) -> Tensor:
        """Finite if and only if every element of the gradient is.  A bound settles it but for values near overflow."""
        if isinstance(gradient, Tensor) or gradient.csc.rows.shape[0] == 0:
            return gradient if isinstance(gradient, Tensor) else torch.zeros(())
        W = self.sae.get_parameter(name)
        largest = checks.largest
        pairs = zip(gradient.values, gradient.A, strict=True)
        bound = torch.stack([largest(v).double() * largest(a) * a.shape[0] for v, a in pairs]).sum()
        if gradient.self_coefficient is not None:
            bound = bound + largest(gradient.self_coefficient).double() * largest(W)
        if float(bound) < torch.finfo(W.dtype).max:
            return bound
        return ops.grad_sqnorm(gradient, W if W.dim() == 2 else W.view(-1, 1))

    @torch.no_grad()
    def _clip(self, gradients: dict[str, RowGradient | Tensor]) -> Tensor | None:
        """0-d factor that brings the global gradient norm to ``grad_clip``, or None."""
        if self.settings.grad_clip is None:
            return None
        total = torch.zeros((), dtype=torch.float64, device=self.sae.W_enc.device)
        for name, gradient in gradients.items():
            if isinstance(gradient, RowGradient):
                W = getattr(self.sae, name)
                total += ops.grad_sqnorm(gradient, W if W.dim() == 2 else W.view(-1, 1))
            else:
                total += gradient.double().pow(2).sum()
        return (self.settings.grad_clip / (total.sqrt() + 1e-6)).clamp(max=1.0).to(self.sae.W_enc.dtype)


def _check_state(name: str, parameter: Tensor, state: dict[str, Any], momentum: bool) -> None:
    """``ValueError`` unless ``state`` is RowAdam's for this parameter."""
    want = {"exp_avg_sq": (parameter.shape, parameter.dtype), "last_step": (parameter.shape[:1], torch.int64)}
    if momentum:
        want["exp_avg"] = want["exp_avg_sq"]
    for key, (shape, dtype) in want.items():
        value = state.get(key)
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"optimizer: {name}.{key}: got {got}, want {dtype} {tuple(shape)}")
    for key in ("step", "beta2"):
        if not isinstance(state.get(key), (int, float)):
            raise ValueError(f"optimizer: {name}.{key}: got {state.get(key)!r}, want a number")


def _record(log: StepLog, x: Tensor, seconds: float) -> dict[str, float]:
    rows = x.reshape(-1, x.shape[-1]).float()
    variance = float((rows - rows.mean(0)).pow(2).sum(1).mean())
    return {
        "step": log.step, "loss": log.loss, "reconstruction": log.reconstruction, "sparsity": log.sparsity,
        "auxiliary": log.auxiliary, "l0": log.l0, "fvu": log.reconstruction / variance if variance else float("nan"),
        "lr": log.lr, "l1_coefficient": log.l1_coefficient, "seconds": seconds,
    }  # fmt: skip
