"""Arguments for the C++ engine: addresses of contiguous tensors, and torch's own thread count."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.ops._dispatch import _C

__all__ = ["_C", "address", "contiguous", "threads"]


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None.  The caller keeps the tensor alive during the call."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise RuntimeError("the engine takes contiguous tensors only")
    return tensor.data_ptr()


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def threads() -> int:
    return torch.get_num_threads()
