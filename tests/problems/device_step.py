"""A step of the kernels without a device: its launches, torch's ops and the memory that it takes, on the device "meta"."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sae_fast as sf
from sae_fast.code import Shadow

SMALL = (4096, 768, 24576)  # B, d, F
FREE = {"detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh"}


@dataclass
class Counted(TorchDispatchMode):
    """torch's ops that a GPU would run in the block, and the most bytes that were held at once."""

    ops: list[str] = field(default_factory=list)
    held: int = 0
    peak: int = 0

    def __post_init__(self):
        super().__init__()
        self.known: dict[weakref.ref, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device.type == "meta"]
        name = func.overloadpacket.__name__
        fresh = any(t.untyped_storage()._cdata not in inputs for t in made)
        if func._schema.is_mutable or (fresh and name not in FREE):
            self.ops.append(name)
        for t in made:
            self._holds(t.untyped_storage())
        return out

    def _holds(self, storage) -> None:
        ref = weakref.ref(storage, self._freed)
        if ref not in self.known:
            self.known[ref] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)

    def _freed(self, ref) -> None:
        self.held -= self.known.pop(ref)


@dataclass
class Cost:
    """Of a step: the kernels that are launched, torch's own, and bytes held at most beside what the step keeps."""

    kernels: list[str]
    torch: list[str]
    peak: int

    @property
    def launches(self) -> int:
        return len(self.kernels) + len(self.torch)


def cost(sae: sf.nn.SparseAutoencoder, x: torch.Tensor, capacity: int, **settings) -> Cost:
    """Of a step of a layer on the device "meta" on x [B, d]."""
    from sae_fast.kernels import _launch
    from sae_fast.kernels.round import rounded
    from sae_fast.train.device_step import DeviceStep

    trainer = sf.Trainer(sae, **settings)
    trainer.optimizer.prepare()
    with _launch.recording() as launches:
        step = DeviceStep(trainer.state, Shadow(*rounded(sae.W_enc.detach())), capacity, ahead=1)
        launches.clear()
        with Counted() as counted:
            step.run(x)
    return Cost([launch.kernel.__name__ for launch in launches], counted.ops, counted.peak)
