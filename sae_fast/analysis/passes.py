"""A count of a model's forward and backward passes, taken by hooks: what a budget is compared by is seen, not claimed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves


@dataclass
class Passes:
    """Passes of a model, and the examples in them.

    forward, backward    calls of the model, also those that leave it early; calls that a gradient flowed back into,
                         once for each backward that did
    forward_examples, backward_examples    the rows of their inputs, summed
    """

    forward: int = 0
    backward: int = 0
    forward_examples: int = 0
    backward_examples: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    @property
    def examples(self) -> int:
        """Forward and backward passes of single examples: what attacks with other batch sizes are compared by."""
        return self.forward_examples + self.backward_examples


@contextmanager
def count_passes(model: nn.Module) -> Iterator[Passes]:
    """In the block, every pass of ``model`` is counted, whoever runs it.

    >>> with count_passes(model) as passes:
    ...     model(x).sum().backward()
    >>> passes.forward, passes.backward
    (1, 1)

    A backward is seen where a gradient comes to what a module of the model gave, so one that flows through no module counts
    as none.  Rows are those of the first tensor that the model is given.
    """
    passes = Passes()
    running: list[tuple[object, int]] = []  # (the pass under way, its rows), or nothing between passes
    in_backward: set[object] = set()  # passes that the backward under way has come to

    def begin(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        rows = next((len(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()), 1)
        running[:] = [(object(), rows)]
        passes.forward += 1
        passes.forward_examples += rows

    def watch(_module: nn.Module, args: Any, output: Any) -> None:
        if not running:
            return  # a module of the model that runs by itself
        which, rows = running[0]

        def flowed(_gradient: Tensor) -> None:
            if which not in in_backward:
                if not in_backward:
                    Variable._execution_engine.queue_callback(in_backward.clear)  # when this backward is done
                in_backward.add(which)
                passes.backward += 1
                passes.backward_examples += rows

        given = {
            id(x) for x in tree_leaves(args)
        }  # handed on as it is, by an Identity, x may be of no pass, or of others too
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.grad_fn is not None and id(x) not in given:
                x.register_hook(flowed)

    def end(_module: nn.Module, _args: Any, _output: Any) -> None:
        running.clear()

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [module.register_forward_hook(watch) for module in model.modules()]
    handles.append(model.register_forward_hook(end, always_call=True))  # after the model's own `watch`, or an exception
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
