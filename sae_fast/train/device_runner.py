"""Steps on a GPU that the host runs ahead of: up to ``AHEAD`` of them are under way, each captured in a CUDA graph.

The batches of the steps under way are kept.  When a report says that the flag was set, no weight has changed since that
step; its cause is removed (a larger buffer, a refreshed shadow, the dense way) and every step from it on is repeated on the
batch that was kept, so the trajectory is what it would have been.
"""

from __future__ import annotations

import warnings
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_fast import backend, ops
from sae_fast.code import SparseCode
from sae_fast.ops import checks, crossovers
from sae_fast.ops.dispatch import cuda_rejects, may_run, triton_rejects
from sae_fast.ops.encode import gpu
from sae_fast.signals import uninterrupted

if TYPE_CHECKING:
    from sae_fast.train.device_step import DeviceStep
    from sae_fast.train.trainer import Trainer

AHEAD = 4  # steps, each of which keeps its batch
GRAIN = 64  # of the room: kernels are compiled anew for sizes that are no multiples of 16
RENEW = 1024  # steps after which rows of the shadow get new scales: a row far from its own has too many candidates
ROOM = 128  # candidates an example that the first buffers have room for


@dataclass
class Step:
    """A step under way; ``report`` is filled when it is known to have happened, ``error`` when it never will."""

    index: int
    lr: float
    l1: float
    x: Tensor
    shape: torch.Size  # of the batch as it was given
    incoming: Tensor
    event: torch.cuda.Event | None
    report: list[float] | None = None
    by_ops: tuple[Tensor, float] | None = None  # losses and L0 of a step that was taken op by op
    error: Exception | None = None


class DeviceRunner:
    """The Trainer's steps on the GPU.  ``refuses`` says when there is none for a Trainer."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.under_way: deque[Step] = deque()
        self.capacity = 0
        self.dense = False  # the last step went the dense way: wait for each, as the next will probably too
        self._step: DeviceStep | None = None
        self._addresses: tuple = ()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._slots: list[Tensor] = []
        self._reports: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None  # for captures: one, as memory is shared within a stream only

    @staticmethod
    def refuses(trainer: Trainer) -> str | None:
        settings, optimizer, W = trainer.settings, trainer.optimizer, trainer.sae.W_enc
        if W.dtype != torch.float32:
            return f"the weights are {W.dtype}"
        if settings.betas[0] != 0 or not settings.eps > 0:
            return f"betas[0] = {settings.betas[0]} and eps = {settings.eps} visit every row in every step"
        if any((g["betas"], g["eps"]) != (settings.betas, settings.eps) for g in optimizer.param_groups):
            return "the optimizer's betas and eps are not those that it was made with"
        if not all(p.requires_grad for p in trainer.sae.parameters()):
            return "a parameter is frozen"
        ahead = len(trainer._runner.under_way) if trainer._runner is not None else 0
        for state in (optimizer.state.get(p) or {"step": 0} for p in trainer.sae.parameters()):
            if (state["step"], state.get("beta2", settings.betas[1])) != (trainer.step_count - ahead, settings.betas[1]):
                return "a parameter has missed steps, or taken them with another β2"
        if not trainer.sae.apply_b_dec_to_input:
            return "its screen subtracts b_dec from the input, and this SAE does not"
        if not settings.unit_start and trainer.step_count == 0:
            return "its first step makes every decoder row unit"
        if trainer.sae.precision not in ("exact", "bf16"):
            return f"precision {trainer.sae.precision!r} takes torch's product"
        if not (may_run("triton") or may_run("cuda")):
            return "another backend is forced"
        rejects = triton_rejects(W) if may_run("triton") else cuda_rejects("weight_step", W)  # forced, it has to be there
        return rejects or gpu.rejects(W)

    def step(self, x: Tensor, lr: float, l1: float) -> Step:
        """Enqueues a step on x [..., d]; the weights follow when the device gets there."""
        index, shape, device = self.trainer.step_count, x.shape, self.trainer.sae.W_enc.device
        if x.device != device:
            raise ValueError(f"step {index}: x: got a tensor on {x.device}, want {device}, the device of the weights")
        if len(self.under_way) == AHEAD:
            self._settle(self.under_way[0])
        x = x.reshape(-1, shape[-1])
        with self._on_device():
            self._ready(x)
            slot = self._slots[index % AHEAD]
            slot.copy_(x)
            # Pinned once: whoever keeps the logs would have the driver pin more in each step.
            host = self._reports[index % AHEAD]
            step = Step(index, lr, l1, slot, shape, host, torch.cuda.Event() if x.is_cuda else None)
            self._enqueue(step)
        self.under_way.append(step)
        self.trainer.step_count += 1
        if self.dense or index == 0:
            self._settle(step)
        return step

    def wait(self) -> None:
        """Until every step has happened."""
        while self.under_way:
            self._settle(self.under_way[0])

    def losses(self, step: Step) -> Tensor:
        self._settle(step)
        return step.by_ops[0] if step.by_ops else torch.tensor(step.report[:3], dtype=torch.float32)  # type: ignore[index]

    def l0(self, step: Step) -> float:
        self._settle(step)
        return step.by_ops[1] if step.by_ops else step.report[3] / step.x.shape[0]  # type: ignore[index]

    # ---- The device side ----------------------------------------------------------------------------------------------

    def _on_device(self) -> AbstractContextManager:
        from sae_fast.kernels._launch import on_device

        return on_device(self.trainer.sae.W_enc.device)

    def _ready(self, x: Tensor) -> None:
        """Buffers and graphs for batches like x, and a shadow of W_enc as it is now."""
        sae, optimizer = self.trainer.sae, self.trainer.optimizer
        optimizer.initialise()
        kept = self.trainer._kept
        if not kept.serves(sae.W_enc):
            self.wait()
        shadow = kept.of(sae.W_enc)
        assert shadow is not None  # or refuses() would have said so
        state = [t for p in sae.parameters() for t in (p, *(optimizer.state[p][k] for k in ("exp_avg_sq", "last_step")))]
        self.capacity = self.capacity or x.shape[0] * min(sae.d_sae, ROOM)
        capacity = self.capacity
        if crossovers.gpu_rejects(
            capacity, x.shape[0], sae.d_sae
        ):  # which way a batch takes must not hang on those before it
            capacity = max(1, int(crossovers.GPU_DENSE * x.shape[0] * sae.d_sae))
        # A graph replays the kernels of the backend under which it was captured; another's are compiled before a capture.
        kind = (x.shape, x.dtype, capacity, sae.precision, *backend.forced[-1:])
        addresses = (*kind, *(t.data_ptr() for t in (*state, *shadow)))
        if addresses == self._addresses:
            return
        if self.under_way:
            self.wait()
            return self._ready(x)  # a repeated step may have asked for more room
        from sae_fast.train.device_step import REPORT, DeviceStep

        settings = self.trainer.settings
        self._graphs, self._step, self._addresses = {}, None, ()  # their memory first; it may not suffice
        self._step = DeviceStep(
            sae, optimizer, shadow, settings.dialect, settings.betas[1], settings.eps, settings.grad_clip, capacity
        )
        if not self._slots or self._slots[0].shape != x.shape or self._slots[0].dtype != x.dtype:
            self._slots = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(AHEAD)]
            self._reports = [torch.empty(len(REPORT), dtype=torch.float64, pin_memory=x.is_cuda) for _ in range(AHEAD)]
        self._addresses = addresses
        self._warm = False

    def _enqueue(self, step: Step) -> None:
        device = self._step
        assert device is not None
        W = self.trainer.sae.W_enc
        from sae_fast.kernels.round import compare_rows
        from sae_fast.train.device_step import STALE

        sixteenth = step.index % 16
        first, last = (W.shape[0] * i // 16 for i in (sixteenth, sixteenth + 1))
        compare_rows(W.detach()[first:last], *(t[first:last] for t in device.shadow), device.flag)
        replaced = ops.stale_columns(W, device.shadow, step.index)
        device.flag.bitwise_or_(torch.where(replaced, STALE, 0).to(torch.int32))
        if step.index % RENEW == 0:
            ops.refresh_shadow(W, device.shadow)
        device.set(step.index + 1, step.lr, step.l1)
        if step.event is None or not self._warm:  # compiling and loading kernels cannot be captured
            device.run(step.x)
            self._warm = True
        else:
            self._graph(step).replay()
        torch.autograd.graph.increment_version(list(self.trainer.sae.parameters()))
        self.trainer._kept.follows(W)
        step.incoming.copy_(device.report, non_blocking=True)
        if step.event is not None:
            step.event.record()

    def _graph(self, step: Step) -> torch.cuda.CUDAGraph:
        at = step.index % AHEAD
        if at not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            # They never run at the same time, so they share memory.
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            # torch's own stream for captures is of the device that captured first.  A loader may pin memory meanwhile.
            self._stream = self._stream or torch.cuda.Stream()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                self._step.run(step.x)  # type: ignore[union-attr]
            self._graphs[at] = graph
        return self._graphs[at]

    # ---- What came of it ----------------------------------------------------------------------------------------------

    @uninterrupted()
    def _settle(self, step: Step) -> None:
        """Waits until ``step``, and those before it, have happened."""
        while step.report is None and step.by_ops is None:
            if step.error is not None:
                raise step.error
            first = self.under_way[0]
            if first.event is not None:
                first.event.synchronize()
            report = first.incoming.tolist()
            if int(report[-1]):
                with self._on_device():
                    self._recover(first, int(report[-1]), int(report[-2]))
            else:
                self._happened(first)
                first.report = report
                self.dense = False

    def _happened(self, step: Step) -> None:
        self.under_way.popleft()
        for state in self.trainer.optimizer.state.values():
            state["step"] = step.index + 1

    def _recover(self, step: Step, flag: int, candidates: int) -> None:
        """``step`` did not happen, nor did any after it."""
        from sae_fast.train import device_step as bits

        device = self._step
        assert device is not None
        try:
            if flag & bits.NOT_FINITE:
                self._not_finite(step)
            if flag & bits.STALE:
                warnings.warn(stale_message(step.index), stacklevel=4)
            ops.refresh_shadow(self.trainer.sae.W_enc, device.shadow)  # a scale may have become too large
            if flag & bits.OVERFLOW:
                if crossovers.gpu_rejects(candidates, step.x.shape[0], self.trainer.sae.d_sae):
                    self._by_ops(step, device.shadow)
                    self.dense = True
                else:
                    self.capacity = -(-(candidates + candidates // 4) // GRAIN) * GRAIN
            elif flag & bits.NOT_FINITE_LOSS and not flag & bits.STALE:
                self._by_ops(step, device.shadow)  # where what is not finite is found, if there is anything
        except Exception as error:
            device.flag.zero_()
            for lost in self.under_way:
                lost.error = error
            self.under_way.clear()
            self.trainer.step_count = step.index
            raise
        device.flag.zero_()
        rest = list(self.under_way)
        self.under_way.clear()
        try:
            if rest:
                self._ready(rest[0].x)
            for again in rest:
                self._enqueue(again)
                self.under_way.append(again)
        except Exception as error:  # such as too little memory for more room
            dropped = rest[len(self.under_way) :]
            for step in dropped:
                step.error = error
            self.trainer.step_count = dropped[0].index
            raise

    def _by_ops(self, step: Step, shadow: ops.Shadow) -> None:
        """Takes the first step under way with the host in between, which goes the dense way or says what is not finite."""
        rows = step.x.to(self.trainer.sae.W_enc.dtype)
        losses, code = self.trainer._update(rows, step.index, step.lr, step.l1, shadow)
        step.by_ops = losses.cpu(), mean_l0(code)
        self._happened(step)

    @staticmethod
    def _not_finite(step: Step) -> None:
        try:
            checks.finite("x", step.x.view(step.shape))
        except ValueError as error:
            raise ValueError(f"step {step.index}: {error}") from error
        raise FloatingPointError(f"step {step.index}: x − b_dec is not finite; the weights are unchanged")


def mean_l0(code: SparseCode) -> float:
    """Mean number of non-zero features an example."""
    return float((code.magnitudes != 0).sum()) / code.batch


def stale_message(index: int) -> str:
    return (
        f"step {index}: W_enc has been changed since the last step in a way that torch does not count "
        "(.data, numpy, a fused optimizer); up to 16 steps may have missed active features of changed rows"
    )
