"""Steps: takes batches and rates, and moves a TrainState on; knows no Trainer.  HostSteps goes op by op, here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sae_fast import gradients, nn, ops
from sae_fast.code import RowGradient, SparseCode
from sae_fast.objectives import Objective, TopK
from sae_fast.ops import checks
from sae_fast.ops.dispatch import trusted
from sae_fast.train.state import Rates, Result, TrainState


class Steps(Protocol):
    """Takes the steps of a TrainState, which it owns, one after the other."""

    state: TrainState

    def step(self, x: Tensor, rates: Rates) -> Result:
        """Takes a step on a batch x [..., d_in], or enqueues it and lets its result wait for it.  ``ValueError`` and
        ``FloatingPointError`` name the step, and leave the state as it was before that step."""

    def wait(self) -> None:
        """Until every step has happened."""


class HostResult:
    """Losses, squared error and code of a step that the host has taken; how many features are dead, if that is counted."""

    def __init__(self, losses: Tensor, squared: Tensor, code: SparseCode, dead: int | None = None):
        self.losses, self._squared, self.code, self.dead = losses, squared, code, dead

    @property
    def squared_error(self) -> float:
        return float(self._squared)

    @cached_property
    def fired(self) -> float:
        return float((self.code.magnitudes != 0).sum())

    @property
    def l0(self) -> float:
        return self.fired / self.code.batch


class HostSteps:
    """Steps op by op, each of which has happened when it returns."""

    def __init__(self, state: TrainState):
        self.state = state

    def step(self, x: Tensor, rates: Rates) -> HostResult:
        state = self.state
        with beginning(state, x) as rows, trusted():
            result = update(state, rows, state.step_count, rates, self._shadow())
        state.step_count += 1
        return result

    def wait(self) -> None:
        pass

    def _shadow(self) -> ops.Shadow | None:
        """W_enc's Shadow, which every step keeps up to date.  What else writes to W_enc is noticed at once where torch
        counts it, and otherwise by comparing 16 columns and a sixteenth of the rows a step: at once where whole rows were
        changed, within 16 steps where it is less, unless the row has a step before, which makes up for it."""
        W, index = self.state.sae.W_enc, self.state.step_count
        shadow = None if self.state.sae.precision in ("fp32", "tf32") else self.state.kept.of(W)
        if shadow is None:
            return None
        if bool(ops.stale_columns(W, shadow, index)) or ops.stale_rows(W, shadow, *sixteenth(W, index)):
            warnings.warn(stale_message(index), stacklevel=5)
            ops.refresh_shadow(W, shadow)
        return shadow


def update(state: TrainState, rows: Tensor, index: int, rates: Rates, shadow: ops.Shadow | None) -> HostResult:
    """Step ``index`` op by op on rows [B, d_in]; ``shadow`` is W_enc's as it is now, and is brought up to date."""
    sae, optimizer = state.sae, state.optimizer
    objective = state.objective.now(rates.l1_coefficient, index, sae.d_sae)
    done, code = sae.row_gradients(rows, objective, shadow, state.dead)
    losses, by_name = done.losses, done.by_name
    parameters = {name: sae.get_parameter(name) for name in by_name}
    by_name = {name: g for name, g in by_name.items() if parameters[name].requires_grad}
    for name, value in gradients.finite(losses, by_name, lambda name, g: gradients.largest(parameters[name], g)).items():
        if not bool(torch.isfinite(checks.largest(value))):
            raise FloatingPointError(f"step {index}: the {name} is not finite; the weights are unchanged")
    projected = {"W_dec"} if objective.clips_projected else set()

    def sqnorm(name: str, g: RowGradient) -> Tensor:
        return ops.grad_sqnorm(g, parameters[name], project=name in projected)

    clipped = dict(by_name)
    for name in projected:
        if isinstance(dense := by_name.get(name), Tensor):
            clipped[name] = ops.project_rows(dense, parameters[name])
    scale = gradients.clip(state.settings.grad_clip, clipped, sqnorm)
    for group in optimizer.param_groups:
        group["lr"] = rates.lr
    optimizer.step(
        rows={parameters[name]: g for name, g in by_name.items()},
        grad_scale=None if scale is None else scale.to(sae.W_enc),
        shadows={} if shadow is None else {sae.W_enc: shadow},
    )
    if shadow is not None:
        state.kept.follows(sae.W_enc)
    squared = losses[0] if objective.prefixes is None else done.residual.pow(2).sum(1).mean()
    return HostResult(losses, squared, code, _follow(state, objective, code, index))


@torch.no_grad()
def _follow(state: TrainState, objective: Objective, code: SparseCode, index: int) -> int | None:
    """Moves on what follows from step ``index`` but has no gradient; returns the number of dead features."""
    sae = state.sae
    if isinstance(objective, TopK) and isinstance(sae, nn.BatchTopKSAE):
        sae.threshold.copy_(objective.next_threshold(sae.threshold, code.magnitudes, index))
    if state.clamps:
        sae.get_parameter("threshold").clamp_(min=0)
    since, dead_after = state.fired(code), state.settings.dead_after
    if since is None or state.since_fired is None or dead_after is None:
        return None
    state.since_fired.copy_(since)
    return int((since >= dead_after).sum())


# ---- Before a step -------------------------------------------------------------------------------------------------------


@contextmanager
def naming(index: int) -> Iterator[None]:
    """In the block a ``ValueError`` names the step."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"step {index}: {error}") from error


@contextmanager
def beginning(state: TrainState, x: Tensor) -> Iterator[Tensor]:
    """Gives the step in the block the rows of x, every value looked at, and does what the first step of a parameter does
    before it starts; a step that fails leaves all as it was."""
    sae, optimizer = state.sae, state.optimizer
    with naming(state.step_count):
        rows = sae.check_input(x)
        check_size(x)
        undo = _prepare(state, rows)
    started = state.step_count > 0 or any(optimizer.state.values())
    try:
        yield rows
    except Exception:
        sae.load_state_dict(undo, strict=False)
        if not started:
            optimizer.state.clear()
        raise


def check_size(x: Tensor) -> None:
    if x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want at least one example")


@torch.no_grad()
def _prepare(state: TrainState, rows: Tensor) -> dict[str, Tensor]:
    """Calibrates the encoder biases and makes the decoder rows unit, where it is time.  Returns what it changed, as it
    was."""
    sae, settings, undo = state.sae, state.settings, {}
    W, vectors = sae.W_dec, [sae.get_parameter(name) for name in sae.per_feature]
    if state.step_count == 0 and settings.init_l0 is not None and sae.encoder_bias.requires_grad:
        undo = {name: p.clone() for name, p in zip(sae.per_feature, vectors, strict=True)}
        sae.calibrate_(rows, settings.init_l0)
        for p, before in zip(vectors, undo.values(), strict=True):
            if not p.requires_grad:
                p.copy_(before)
    if state.step_count == 0 and state.clamps:
        threshold = sae.get_parameter("threshold")
        undo.setdefault("threshold", threshold.clone())
        threshold.clamp_(min=0)
    unit = state.objective.unit_rows and settings.unit_start
    if not unit or not W.requires_grad or state.optimizer.state.get(W):
        return undo
    norms = W.norm(dim=1)
    undo["W_dec"] = W.clone()  # the optimizer makes the rows unit to the last bit
    if bool(((norms - 1).abs() > 8 * torch.finfo(norms.dtype).eps).any()):
        W.copy_(torch.nn.functional.normalize(W, dim=1))
    return undo


def sixteenth(W: Tensor, index: int) -> tuple[int, int]:
    """The rows of W that step ``index`` compares with its Shadow: all within 16 steps."""
    return W.shape[0] * (index % 16) // 16, W.shape[0] * (index % 16 + 1) // 16


def stale_message(index: int) -> str:
    return (
        f"step {index}: W_enc has been changed since the last step in a way that torch does not count "
        "(.data, numpy, a fused optimizer); up to 16 steps may have missed active features of changed rows"
    )
