"""The choice of the body of an op that runs, and its reasons.

An op has up to four bodies: ``reference`` (plain PyTorch, any device and dtype), ``cpu`` (C++), ``triton`` and ``cuda``.
Each op's file lists the ones that it has, fastest first; the first whose conditions hold is taken.  A rejection has a
reason, logged once at DEBUG level on the logger ``sae_fast``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from threading import local
from typing import Any

import torch
from torch import Tensor

from sae_fast import backend

logger = logging.getLogger("sae_fast")
BACKENDS = ("reference", "cpu", "triton", "cuda")

_forced = backend.forced
_logged: set[tuple[str, str]] = set()
_here = local()

_C: Any = None
try:
    from sae_fast import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:  # an unbuilt checkout: the reference serves, slowly
    if "SAE_FAST_CPU_ISA" in str(error):
        raise
    logger.warning("the C++ engine is not built (%s); the reference bodies will run", error)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one body for every op in the ``with`` block: "reference", "cpu", "triton" or "cuda".

    For tests, and to check a result that you doubt.  It holds for the whole process.  An op that has no
    such body, or whose arguments that body cannot take, raises ``ValueError`` with the reason.
    """
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, want one of {BACKENDS}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


@contextmanager
def trusted() -> Iterator[None]:
    """In the block, and this thread, codes are taken as sound: those that our own ops made of what was checked."""
    outer = trusts()
    _here.trusts = True
    try:
        yield
    finally:
        _here.trusts = outer


def trusts() -> bool:
    """True in such a block."""
    return getattr(_here, "trusts", False)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast reaches into an op's body and would hand the engine bf16 where it reads fp32."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def cpu_rejects(*tensors: Tensor | None) -> str | None:
    """The reason why the C++ engine cannot take these tensors, or None."""
    if _C is None:
        return "the extension sae_fast._C is not built"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"a tensor is {tensor.dtype}; the engine computes in float32"
    return None


@cache
def _no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return None


def triton_rejects(*tensors: Tensor | None) -> str | None:
    """The reason why the Triton kernels cannot take these tensors, or None.  Triton's interpreter (TRITON_INTERPRET=1,
    for tests) takes tensors on the CPU, where ``use_backend("triton")`` asks for it."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and _forced[-1:] in (["triton"], ["cuda"])
    device = "cpu" if interpreted else "cuda"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != device:
            return f"a tensor is on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"a tensor is {tensor.dtype}; the kernels take float32, bfloat16 and float16"
    return _no_triton()


def cuda_rejects(op: str, *tensors: Tensor | None) -> str | None:
    """The reason why the CUDA C++ kernels of an op cannot take these tensors, or should not, or None."""
    reason = triton_rejects(*tensors)  # whose helpers they share
    if reason is not None:
        return reason
    from sae_fast.kernels import native

    if native.module is None:
        return "the extension sae_fast._C_cuda is not built (SAE_FAST_CUDA=1 builds it)"
    return None if native.takes(op) else "its Triton kernels are no slower on this GPU"


def log_once(op: str, message: str) -> None:
    """At DEBUG level, once a process."""
    if (op, message) not in _logged:
        _logged.add((op, message))
        logger.debug("%s: %s", op, message)


def may_run(name: str) -> bool:
    """True if no other body is forced."""
    return not _forced or _forced[-1] == name


def pick(op: str, bodies: Mapping[str, Callable], rejections: Mapping[str, str | None]) -> Callable:
    """The first body that is not rejected, or the forced one."""
    if _forced:
        name = _forced[-1]
        reason = rejections.get(name) if name in bodies else f"it has the bodies {tuple(bodies)}"
        if reason:
            raise ValueError(f"use_backend({name!r}): {op} cannot run there: {reason}")
        return without_autocast()(bodies[name])
    for name, body in bodies.items():
        reason = rejections.get(name)
        if not reason:
            return without_autocast()(body)
        log_once(op, f"not {name}: {reason}")
    raise RuntimeError(f"{op}: no body can take these arguments: {dict(rejections)}")
