"""A TrainState as a checkpoint keeps it beside the weights: an entry of the manifest, the optimizer's tensors; and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sae_fast import files, objectives
from sae_fast.optim import check_group
from sae_fast.train.checkpoint import MANIFEST, entry
from sae_fast.train.state import Settings, TrainState

SINCE_FIRED = "since_fired"  # among the optimizer's tensors, which are of parameters
GROUP_SETTINGS = ("betas", "eps", "unit_rows", "unit_start")  # of the optimizer, which may change in mid-run


def describe(state: TrainState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest's entry of a training, and the optimizer's tensors by parameter and key."""
    tensors, numbers = {}, {}
    for name, parameter in state.sae.named_parameters():
        for key, value in (state.optimizer.state.get(parameter) or {"step": 0}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
            else:
                numbers[f"{name}.{key}"] = value
    groups = [{key: group[key] for key in GROUP_SETTINGS} for group in state.optimizer.param_groups]
    frozen = [name for name, parameter in state.sae.named_parameters() if not parameter.requires_grad]
    settings = dataclasses.asdict(state.settings)
    if state.settings.objective is not None:
        settings["objective"] = objectives.describe(state.settings.objective)
    if state.since_fired is not None:
        tensors[SINCE_FIRED] = state.since_fired
    about = {"step": state.step_count, "settings": settings, "optimizer": numbers, "groups": groups, "frozen": frozen}
    return about, tensors


def settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments in a manifest."""
    saved = entry(manifest, dict, "trainer", "settings")
    fields = dataclasses.fields(Settings)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    missing, unknown = sorted(needed - set(saved)), sorted(set(saved) - {field.name for field in fields})
    if missing or unknown:
        raise ValueError(f"{MANIFEST}: trainer.settings: {missing} missing, {unknown} unknown")
    if saved.get("objective") is not None:
        saved = {**saved, "objective": objectives.rebuild(entry(manifest, dict, "trainer", "settings", "objective"))}
    return {**saved, "betas": tuple(entry(manifest, list, "trainer", "settings", "betas"))}


def restore(state: TrainState, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Brings a new TrainState to where the one was that was saved."""
    state.step_count = entry(manifest, int, "trainer", "step")
    _restore_groups(state, manifest["trainer"])
    parameters = dict(state.sae.named_parameters())
    tensors = dict(tensors)
    _restore_counts(state, tensors.pop(SINCE_FIRED, None))
    entries: dict[str, Any] = {**tensors, **entry(manifest, dict, "trainer", "optimizer")}
    for full_name, value in entries.items():
        name, key = full_name.rsplit(".", 1)
        if name not in parameters:
            raise ValueError(f"optimizer: state for an unknown parameter {name!r}")
        device = parameters[name].device
        state.optimizer.state[parameters[name]][key] = value.to(device) if isinstance(value, Tensor) else value
    momentum = {p: group["betas"][0] > 0 for group in state.optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        held = state.optimizer.state.get(parameter, {})
        if held == {"step": 0}:
            held.clear()  # never stepped
        elif state.step_count:
            _check(name, parameter, held, momentum[parameter])


def _restore_counts(state: TrainState, since: Tensor | None) -> None:
    """Sets ``since_fired``; ``ValueError`` unless it is there where the settings count."""
    want = state.since_fired
    if want is None and since is None:
        return
    if want is None or since is None or since.shape != want.shape or since.dtype != want.dtype:
        got, wanted = (None if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (since, want))
        raise ValueError(f"optimizer: {SINCE_FIRED}: got {got}, want {wanted}")
    state.since_fired = since.to(want.device)


def _restore_groups(state: TrainState, about: dict[str, Any]) -> None:
    """Sets the optimizer's groups and freezes parameters as the checkpoint says; one of before it did says neither."""
    for i, group in enumerate(state.optimizer.param_groups if "groups" in about else []):
        saved = dict(enumerate(files.key(about, MANIFEST, list, "groups"))).get(i)
        if not isinstance(saved, dict) or set(saved) != set(GROUP_SETTINGS) or not isinstance(saved["betas"], list):
            raise ValueError(f"{MANIFEST}: trainer.groups: got {saved!r}, want {list(GROUP_SETTINGS)} of group {i}")
        group.update(saved | {"betas": tuple(saved["betas"])})
        check_group(group)
    parameters = dict(state.sae.named_parameters())
    for name in files.key(about, MANIFEST, list, "frozen") if "frozen" in about else []:
        if name not in parameters:
            raise ValueError(f"{MANIFEST}: trainer.frozen: got {name!r}, want one of {sorted(parameters)}")
        parameters[name].requires_grad_(False)


def _check(name: str, parameter: Tensor, state: dict[str, Any], momentum: bool) -> None:
    """``ValueError`` unless ``state`` is RowAdam's for this parameter."""
    want = {"exp_avg_sq": (parameter.shape, parameter.dtype), "last_step": (parameter.shape[:1], torch.int64)}
    if momentum or "exp_avg" in state:
        want["exp_avg"] = want["exp_avg_sq"]
    for key, (shape, dtype) in want.items():
        value = state.get(key)
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"optimizer: {name}.{key}: got {got}, want {dtype} {tuple(shape)}")
    for key in ("step", "beta2"):
        if not isinstance(state.get(key), (int, float)):
            raise ValueError(f"optimizer: {name}.{key}: got {state.get(key)!r}, want a number")
