"""The C++ engine, and its arguments: contiguous tensors with memory, and torch's own thread count."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.ops.dispatch import _C

__all__ = ["_C", "contiguous", "in_memory", "threads"]

# Dispatch keys of a tensor that stands for another: a subclass with ops of its own (fake, distributed), torch.func's
# wrappers, and views that change what they show.
_WRAPPED = [
    getattr(torch._C.DispatchKey, name)
    for name in (
        "Python", "FuncTorchGradWrapper", "FuncTorchBatched", "Functionalize", "Negative", "Conjugate", "ZeroTensor",
    )
]  # fmt: skip
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def in_memory(tensor: Tensor) -> bool:
    """True if a tensor's values are in its memory, as they are, and what is made of them is no constant of a graph: False
    for what torch.func, a FakeTensorMode, make_fx, torch.jit.trace or a mesh of devices wraps or records."""
    keys = torch._C._dispatch_keys(tensor)
    recorder = torch._C._get_dispatch_mode(_PROXY) or torch._ops._get_dispatch_mode_pre_dispatch(_PROXY)
    return not (any(map(keys.has, _WRAPPED)) or recorder is not None or torch.jit.is_tracing())


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def threads() -> int:
    return torch.get_num_threads()
