"""The CUDA C++ bodies (csrc/cuda): which op takes one in the place of its Triton kernels, and how they are called."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from sae_fast import backend
from sae_fast.devices import on_device
from sae_fast.kernels import _config, _launch
from sae_fast.kernels._generations import GENERATIONS

module: Any = None  # sae_fast._C_cuda; the tests put its double on a CPU here
with suppress(ImportError):
    from sae_fast import _C_cuda as module  # type: ignore[attr-defined, no-redef]

# The ops whose CUDA kernels are the default, by GPU generation; the benchmarks put others there for a while.
FASTER = {generation: it.faster for generation, it in GENERATIONS.items()}


def takes(op: str) -> bool:
    """True if the op's CUDA kernels run."""
    if module is None or _launch.is_recording():
        return False
    return backend.forced[-1] == "cuda" if backend.forced else op in FASTER[_config.generation()]


def call(name: str, *arguments: Any) -> None:
    """A function of the module on tensors (contiguous, or None), dtypes and numbers, on their device's current stream."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with on_device(device):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        getattr(module, name)(*map(_native, arguments), stream)


def _native(a: Any) -> Any:
    if a is None:
        return 0
    if isinstance(a, torch.dtype):
        return getattr(module.Storage, str(a).removeprefix("torch."))
    if isinstance(a, Tensor):
        if not a.is_contiguous():
            raise RuntimeError("the CUDA kernels take contiguous tensors only")
        return a.data_ptr()
    return a
