"""The kernels' step on batches of one kind, in slots that the host fills ahead, captured in a CUDA graph for each slot."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.code import Shadow
from sae_fast.train.device_floors import Floors
from sae_fast.train.device_report import REPORT
from sae_fast.train.device_step import DeviceStep
from sae_fast.train.state import Rates, TrainState

RENEW = 1024  # steps after which rows of the shadow get new scales: a row far from its own has too many candidates


class DeviceGraphs:
    """Enqueues steps on batches like x [B, d], up to ``ahead`` at a time.  ``key``: what they were made for; ``before``:
    whose slots they take over, with the batches in them, where those are of this kind."""

    def __init__(
        self, state: TrainState, shadow: Shadow, x: Tensor, capacity: int, ahead: int, key: tuple,
        before: DeviceGraphs | None, floors: Floors | None = None,
    ):  # fmt: skip
        self.state, self.key, self.step = state, key, DeviceStep(state, shadow, capacity, ahead, floors)
        self.trained = [p for p in state.sae.parameters() if p.requires_grad]
        self._slots: list[Tensor]
        self._reports: list[Tensor]
        if before is not None and before.takes(x):
            self._slots, self._reports = before._slots, before._reports
        else:
            self._slots = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ahead)]
            # Pinned once: whoever keeps the logs would have the driver pin more in each step.
            self._reports = [torch.empty(len(REPORT), dtype=torch.float64, pin_memory=x.is_cuda) for _ in range(ahead)]
        self._events = [torch.cuda.Event() for _ in range(ahead)] if x.is_cuda else []
        self.warm = False  # compiling and loading kernels cannot be captured
        self.captured: dict[int, torch.cuda.CUDAGraph] = {}
        # One, as memory is shared within a stream only; torch's own for captures is of the device that captured first.
        self.stream = torch.cuda.Stream() if x.is_cuda else None

    def takes(self, x: Tensor) -> bool:
        """True if the slots are for batches like x [B, d]."""
        return (self._slots[0].shape, self._slots[0].dtype) == (x.shape, x.dtype)

    def slot(self, index: int) -> Tensor:
        """The memory that holds the batch of step ``index`` is, until the step that needs its place."""
        return self._slots[index % len(self._slots)]

    def report(self, index: int) -> Tensor:
        """The report of step ``index``, to be read once its event has happened."""
        return self._reports[index % len(self._reports)]

    def enqueue(self, index: int, rates: Rates) -> torch.cuda.Event | None:
        """Enqueues step ``index`` on the batch in its slot; the event happens when its report is there."""
        W, at = self.state.sae.W_enc, index % len(self._slots)
        self.step.set(index + 1, rates.lr, rates.l1_coefficient)
        if self.warm and self._events:
            self._graph(at).replay()
        else:
            self.step.run(self._slots[at])
            self.warm = True
        if (index + 1) % RENEW == 0:
            ops.refresh_shadow(W, self.step.shadow)
        torch.autograd.graph.increment_version(self.trained)
        self.state.kept.follows(W)
        self._reports[at].copy_(self.step.report, non_blocking=True)
        if not self._events:
            return None
        self._events[at].record()
        return self._events[at]

    def _graph(self, at: int) -> torch.cuda.CUDAGraph:
        if at not in self.captured:
            graph = torch.cuda.CUDAGraph()
            # They never run at the same time, so they share memory.
            pool = next(iter(self.captured.values())).pool() if self.captured else None
            # A loader may pin memory meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                self.step.run(self._slots[at])
            self.captured[at] = graph
        return self.captured[at]
