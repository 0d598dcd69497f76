"""Sharing a pass among examples: how many at once, of a model that does not mix them, by a metric that is told which."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

TOKENS_PER_PASS = 4096  # positions that one pass of the model takes, where several examples or points of a path share it


def check_repeatable(model: nn.Module) -> None:
    """ValueError where the metric of one example would depend on chance, or on what else is in its batch."""
    for name, module in model.named_modules():
        chance = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if module.training and (chance or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            raise ValueError(f"model: {name!r} is a {type(module).__name__} in training mode, want model.eval()")


def takes_examples(metric: Callable[..., Tensor]) -> bool:
    """Says if a metric is to be called as metric(output, examples): it has a second positional parameter, without a default
    or of that name."""
    try:
        called = metric.forward if isinstance(metric, nn.Module) else metric
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):  # some built-in functions do not say
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (positional[1].default is inspect.Parameter.empty or positional[1].name == "examples")
