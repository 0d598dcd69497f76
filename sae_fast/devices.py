"""The device that a command or a pipeline computes on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager:
    """In the block launches, events and captures are of this device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def usable(device: str | torch.device | None = None, name: str = "device") -> torch.device:
    """The device of a name, by default the GPU if there is one.  ValueError for a device that torch does not know or that
    this machine has not."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises, by build and device
        here = "cpu" + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        raise ValueError(f"{name}: got {str(device)!r}, want one that is here: {here}") from error
    return torch.device(device)
