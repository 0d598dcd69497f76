"""Calls of differentiable ops.

``custom_op`` gives an op an autograd function that torch.func refuses and that drops the tangents of forward-mode
derivatives without a word.  So outside a compiled region an op is called through an autograd function of its own, with the
same formula: torch.func.grad works, and what does not work says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function

_functions: dict[str, type[Function]] = {}


def call(op: str, *arguments: Any) -> Any:
    """torch.ops.sae_fast.<op>(*arguments), differentiable."""
    if torch.compiler.is_compiling():  # one node of the graph, which has the op's own autograd
        return getattr(torch.ops.sae_fast, op)(*arguments)
    return _functions[op].apply(*arguments)


def differentiable(op: str, setup_context: Callable, backward: Callable) -> None:
    """Registers the formula of an op's gradients, for both ways of calling it."""
    torch.library.register_autograd(f"sae_fast::{op}", backward, setup_context=setup_context)
    _functions[op] = function(op, getattr(torch.ops.sae_fast, op), setup_context, backward)


def function(name: str, forward: Callable, setup_context: Callable, backward: Callable) -> type[Function]:
    """An autograd function that has reverse mode only, and says so."""

    def refuse(what: str, instead: str) -> Callable:
        def raises(*_: Any) -> None:
            raise NotImplementedError(f"sae_fast::{name} has no {what}; {instead}")

        return raises

    methods = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": backward,
        "jvp": refuse("forward-mode derivative (torch.func.jvp, jacfwd, hessian)", "take reverse mode"),
        "vmap": refuse("rule for torch.vmap (jacrev, is_grads_batched)", "give the layer leading dimensions, or loop"),
    }
    return type(f"sae_fast_{name}", (Function,), {key: staticmethod(method) for key, method in methods.items()})
