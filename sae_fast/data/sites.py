"""Places in a model where activations are read and replaced: the output or the input of one of its modules."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_fast.data import _lens_names

Change = Callable[[Tensor], Tensor]


class Site(NamedTuple):
    """The output of a module, or its first input."""

    name: str
    module: nn.Module
    at_input: bool


def find(model: nn.Module, site: str | nn.Module | Site) -> Site:
    """The site of a name: that of a module of the model for its output, such as "encoder.layer.2", with ":input" after it
    for what the module is given; or, in a transformer, TransformerLens' name, such as "blocks.2.hook_resid_post"; or the
    module itself.  ValueError with the near names if there is none."""
    if isinstance(site, Site):
        return site
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(site, nn.Module):
        name = next((name for name, module in modules.items() if module is site), None)
        if name is None:
            raise ValueError(f"site: got a {type(site).__name__} that is not in the model, want one of its modules")
        return Site(name, site, at_input=False)
    if not isinstance(site, str):
        raise ValueError(f"site: got {type(site).__name__}, want the name of a module, or the module")
    if site not in modules:
        site = _lens_names.site_of(model, site) or site
    name, colon, end = site.partition(":")
    if colon and end not in ("input", "output"):
        raise ValueError(f"site: got {site!r}, want {name!r}, {name + ':output'!r} or {name + ':input'!r}")
    if name not in modules or not name:
        names = [n for n in modules if n]
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]
        raise ValueError(
            f"site: the model has no module {name!r}; near names: {', '.join(near) or 'none, it has no modules'}"
        )
    if isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
        members = ", ".join(f"{name}.{member}" for member, _ in list(modules[name].named_children())[:3])
        raise ValueError(f"site: {name!r} is a list of modules, which never runs itself, want one of them: {members} ...")
    return Site(name, modules[name], end == "input")


@contextmanager
def changed(site: Site, change: Change) -> Iterator[None]:
    """In the block, whatever comes through the site is replaced by ``change`` of it; where the module gives or takes
    several things, of the first."""

    def at_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        return _with_first(output, change, site)

    def at_input(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (_with_first(args, change, site), kwargs)
        if not kwargs:
            raise ValueError(f"site: {site.name!r} is called without inputs")
        first = next(iter(kwargs))
        return args, {**kwargs, first: _with_first(kwargs[first], change, site)}

    if site.at_input:
        handle = site.module.register_forward_pre_hook(at_input, with_kwargs=True)
    else:
        handle = site.module.register_forward_hook(at_output)
    try:
        yield
    finally:
        handle.remove()


def run(model: nn.Module, inputs: Any) -> Any:
    """model(inputs): a mapping by keyword, a tuple or list by position, anything else as the one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, str) or (isinstance(inputs, (tuple, list)) and any(isinstance(each, str) for each in inputs)):
        raise ValueError("inputs: got text, want what the model takes: tokenize first")
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def read(model: nn.Module, site: Site, inputs: Any) -> tuple[Tensor, Any]:
    """(what comes through the site [..., d], without its graph; the model's output).  ValueError unless it does so once."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())  # what comes next may write to it in place
        return x

    with torch.no_grad(), changed(site, keep):
        output = run(model, inputs)
    if len(seen) != 1:
        what = "is not reached" if not seen else f"is reached {len(seen)} times"
        raise ValueError(f"site: {site.name!r} {what} when the model runs, want a module that runs once")
    return seen[0], output


class _Reached(Exception):
    def __init__(self, x: Tensor):
        self.x = x


def run_until(model: nn.Module, site: Site, inputs: Any) -> Tensor:
    """The activations at the site [..., d], in the graph of whatever leads to it; the model is left there."""

    def leave(x: Tensor) -> Tensor:
        raise _Reached(x)

    try:
        with changed(site, leave):
            run(model, inputs)
    except _Reached as reached:
        return reached.x
    raise ValueError(f"site: {site.name!r} is not reached when the model runs")


@contextmanager
def without_weight_gradients(*modules: nn.Module) -> Iterator[None]:
    """In the block, gradients stop at the modules' parameters: only those of activations are recorded."""
    on = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in on:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in on:
            p.requires_grad_(True)


def positions(inputs: Any, batch: int) -> int:
    """The most positions that a tensor of the inputs with ``batch`` rows has in one of them: ids, or vectors."""
    if isinstance(inputs, Tensor):
        if not inputs.dim() or inputs.shape[0] != batch:
            return 1
        return inputs[0].numel() if not inputs.is_floating_point() else inputs.shape[1:-1].numel()
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    return max((positions(value, batch) for value in values), default=1)


def repeated(inputs: Any, examples: Tensor, batch: int) -> Any:
    """The inputs of a model with every tensor that has ``batch`` rows taken at ``examples`` [n] instead."""
    if isinstance(inputs, Tensor):
        return inputs[examples.to(inputs.device)] if inputs.dim() and inputs.shape[0] == batch else inputs
    if isinstance(inputs, Mapping):
        return {name: repeated(value, examples, batch) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return _like(inputs, [repeated(value, examples, batch) for value in inputs])
    return inputs


def _like(value: Any, items: list[Any]) -> Any:
    """A tuple, named or not, or a list, with other items."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _with_first(value: Any, change: Change, site: Site) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
        return change(value)
    if isinstance(value, Mapping) and value:  # Hugging Face's outputs among them, whose class stays
        first, value = next(iter(value)), copy.copy(value)
        value[first] = _with_first(value[first], change, site)
        return value
    if isinstance(value, (tuple, list)) and value:
        return _like(value, [_with_first(value[0], change, site), *value[1:]])
    got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    which = "is given" if site.at_input else "gives"
    raise ValueError(f"site: {site.name!r} {which} {got}, want activations [..., d], or a tuple that begins with them")
