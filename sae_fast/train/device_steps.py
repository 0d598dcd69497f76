"""DeviceSteps: steps on a GPU that the host runs ahead of, up to ``AHEAD`` of them under way.

The batches of the steps under way are kept.  When a report says that the flag was set, no weight has changed since that
step; its cause is removed (a larger buffer, a refreshed shadow, the dense way) and every step from it on is repeated on the
batch that was kept, so the trajectory is what it would have been.
"""

from __future__ import annotations

import warnings
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_fast import backend, nn, ops
from sae_fast.devices import on_device
from sae_fast.ops import checks, crossovers
from sae_fast.ops.dispatch import cuda_rejects, may_run, triton_rejects
from sae_fast.ops.encode import gpu
from sae_fast.signals import uninterrupted
from sae_fast.train.device_report import Report
from sae_fast.train.state import Rates, TrainState
from sae_fast.train.steps import beginning, check_size, naming, stale_message, update

if TYPE_CHECKING:
    from sae_fast.train.device_floors import Floors
    from sae_fast.train.device_graphs import DeviceGraphs

AHEAD = 4  # steps, each of which keeps its batch
GRAIN = 64  # of the room: kernels are compiled anew for sizes that are no multiples of 16
ROOM = 128  # candidates an example that the first buffers have room for


@dataclass(eq=False, repr=False)
class DeviceResult:
    """A step that may be under way; reading waits for it.  ``report`` is set once it is known to have happened, ``error``
    if it was abandoned."""

    steps: DeviceSteps
    index: int
    rates: Rates
    shape: torch.Size  # of the batch as it was given
    counts: bool  # dead features
    graphs: DeviceGraphs
    event: torch.cuda.Event | None = None
    report: Report | None = None
    error: Exception | None = None

    @property
    def x(self) -> Tensor:
        """Its batch [B, d], while it is under way."""
        return self.graphs.slot(self.index)

    @property
    def losses(self) -> Tensor:
        return self.steps.settle(self).losses

    @property
    def squared_error(self) -> float:
        return self.steps.settle(self).squared_error

    @property
    def l0(self) -> float:
        return self.steps.settle(self).l0

    @property
    def dead(self) -> int | None:
        return self.steps.settle(self).dead if self.counts else None


class DeviceSteps:
    """Steps on the GPU.  ``refuses`` says why the next one has to be the host's."""

    def __init__(self, state: TrainState):
        self.state = state
        self.under_way: deque[DeviceResult] = deque()
        self.capacity = 0
        self.dense = False  # the last step went the dense way: wait for each, as the next will probably too
        self.graphs: DeviceGraphs | None = None
        self.floors: Floors | None = None
        self._saw: tuple = ()  # by the last step
        self._version = 0  # of W_enc after it
        self._steady = False  # nothing that graphs hang on but the batch's shape has changed since

    def __reduce__(self) -> tuple:
        self.wait()
        return DeviceSteps, (self.state,)  # a copy has steps, graphs and events of its own

    def refuses(self) -> str | None:
        settings, optimizer, sae = self.state.settings, self.state.optimizer, self.state.sae
        W, (beta1, _) = sae.W_enc, settings.betas
        if isinstance(sae, nn.GroupedSAE) and not isinstance(sae.k, int):
            return f"k = {sae.k} is no whole number"
        if W.dtype != torch.float32:
            return f"the weights are {W.dtype}"
        if settings.eps == 0:
            return "eps = 0 visits every row in every step"
        if any((g["betas"], g["eps"]) != (settings.betas, settings.eps) for g in optimizer.param_groups):
            return "the optimizer's betas and eps are not those that it was made with"
        taken = self.state.step_count - len(self.under_way)
        for state in (optimizer.state.get(p) or {"step": 0} for p in sae.parameters() if p.requires_grad):
            if state["step"] != taken:
                return "a parameter has missed steps"
            if beta1 > 0 and taken > 0 and "exp_avg" not in state:
                return "a parameter has no momentum from earlier steps"
        if not settings.unit_start and taken == 0:
            return "its first step makes every decoder row unit"
        if sae.precision not in ("exact", "bf16"):
            return f"precision {sae.precision!r} takes torch's product"
        if not (may_run("triton") or may_run("cuda")):
            return "another backend is forced"
        rejects = triton_rejects(W) if may_run("triton") else cuda_rejects("weight_step", W)  # forced, it has to be there
        return rejects or gpu.rejects(W)

    def goes_on(self) -> bool:
        """True if the next step can be taken as the last was: nothing that :meth:`refuses`, the state's check of parameters
        or the captured graphs hang on has changed, as far as torch counts changes.  It spares a step's host those."""
        state, states = self.state, self.state.optimizer.state
        graphs, taken = self.graphs, state.step_count - len(self.under_way)
        same = graphs is not None and self._version == state.sae.W_enc._version and self._saw == self._sees()
        self._steady = same and all(states[p]["step"] == taken for p in graphs.trained) if graphs else False
        return self._steady

    def _sees(self) -> tuple:
        state, sae, states = self.state, self.state.sae, self.state.optimizer.state
        seen = [state.settings, state.objective, sae.precision, sae.options(), backend.forced[-1:], id(state.kept.shadow)]
        if backend.forced[-1:] == ["cuda"]:
            from sae_fast.kernels import native

            seen.append(id(native.module))
        seen += [t.data_ptr() for t in (*sae.buffers(), state.since_fired) if t is not None]
        seen.append(self.capacity)
        for group in state.optimizer.param_groups:
            seen += group["betas"], group["eps"], len(group["params"])
        for p in sae.parameters():
            held = states.get(p, {})
            seen += id(p), p.requires_grad, p.stride(), p.data_ptr(), held.get("beta2")
            seen += [t.data_ptr() for t in held.values() if isinstance(t, Tensor)]
        return tuple(seen)

    def step(self, x: Tensor, rates: Rates) -> DeviceResult:
        """Enqueues a step on x [..., d]; the weights follow when the device gets there."""
        if self.state.step_count == 0:
            with beginning(self.state, x):
                step = self._enqueue(x, rates)
                self.settle(step)
                return step
        with naming(self.state.step_count):
            self.state.sae.check_shape(x)
            check_size(x)
        step = self._enqueue(x, rates)
        if self.dense:
            self.settle(step)
        return step

    def wait(self) -> None:
        """Until every step has happened."""
        while self.under_way:
            self.settle(self.under_way[0])

    @uninterrupted()
    def settle(self, step: DeviceResult) -> Report:
        """Waits until ``step``, and those before it, have happened."""
        while step.report is None:
            if step.error is not None:
                raise step.error
            first = self.under_way[0]
            if first.event is not None:
                first.event.synchronize()
            report = Report(tuple(first.graphs.report(first.index).tolist()), first.x.shape[0])
            if flag := int(report.of("flag")):
                with on_device(first.x.device):
                    self._recover(first, flag, int(report.of("candidates")))
            else:
                self._happened(first, report)
                self.dense = False
        return step.report

    # ---- Under way ----------------------------------------------------------------------------------------------------

    def _enqueue(self, x: Tensor, rates: Rates) -> DeviceResult:
        index, device = self.state.step_count, self.state.sae.W_enc.device
        if x.device != device:
            raise ValueError(f"step {index}: x: got a tensor on {x.device}, want {device}, the device of the weights")
        if len(self.under_way) == AHEAD:
            self.settle(self.under_way[0])
        rows = x.detach().reshape(-1, x.shape[-1])
        with on_device(device):
            graphs = self._ready(rows)
            graphs.slot(index).copy_(rows)
            counts, event = self.state.since_fired is not None, graphs.enqueue(index, rates)
            step = DeviceResult(self, index, rates, x.shape, counts, graphs, event)
        self.under_way.append(step)
        self.state.step_count += 1
        if not self._steady:
            self._saw = self._sees()
        self._version, self._steady = self.state.sae.W_enc._version, False
        return step

    def _ready(self, x: Tensor) -> DeviceGraphs:
        """Buffers and graphs for batches like x [B, d], and a shadow of W_enc as it is now."""
        state, sae, optimizer = self.state, self.state.sae, self.state.optimizer
        before = self.graphs
        if self._steady and before is not None and before.takes(x):
            return before
        self.wait()
        optimizer.prepare()
        shadow = state.kept.of(sae.W_enc)
        assert shadow is not None  # or refuses() would have said so
        self.capacity = self.capacity or x.shape[0] * min(sae.d_sae, ROOM)
        capacity = self.capacity
        if crossovers.gpu_rejects(capacity, x.shape[0], sae.d_sae):
            # Which way a batch takes must not hang on those before it.
            capacity = max(1, int(crossovers.GPU_DENSE * x.shape[0] * sae.d_sae))
        # A graph replays the kernels of the backend under which it was captured; another's are compiled before a capture.
        kind = (x.shape, x.dtype, capacity, *self._sees())
        key = (*kind, *(t.data_ptr() for t in shadow))
        before = self.graphs
        if before is not None and before.key == key:
            return before
        from sae_fast.train.device_graphs import DeviceGraphs

        if before is not None:
            before.captured.clear()  # their memory first; it may not suffice
        self.graphs = None
        if self.floors is None and isinstance(sae, nn.GroupedSAE):
            from sae_fast.train.device_floors import Floors

            self.floors = Floors(sae)
        self.graphs = DeviceGraphs(state, shadow, x, capacity, AHEAD, key, before, self.floors)
        sae.settle_by(self.wait)
        return self.graphs

    # ---- What came of it ----------------------------------------------------------------------------------------------

    def _happened(self, step: DeviceResult, report: Report) -> None:
        self.under_way.popleft()
        step.report = report
        for p in step.graphs.trained:
            self.state.optimizer.state[p]["step"] = step.index + 1
        del step.graphs  # which whoever keeps the log would keep

    def _recover(self, step: DeviceResult, flag: int, candidates: int) -> None:
        """``step`` did not happen, nor did any after it: removes the cause, and repeats them."""
        graphs, self._steady = step.graphs, False
        try:
            self._remedy(step, flag, candidates)
        except Exception as error:
            self._abandon(list(self.under_way), error)
            self.under_way.clear()
            raise
        finally:
            graphs.step.flag.zero_()
        rest = list(self.under_way)
        self.under_way.clear()
        try:
            graphs = self._ready(rest[0].x) if rest else graphs
            for again in rest:
                again.graphs, again.event = graphs, graphs.enqueue(again.index, again.rates)
                self.under_way.append(again)
        except Exception as error:  # such as too little memory for more room
            self._abandon(rest[len(self.under_way) :], error)
            raise

    def _abandon(self, steps: list[DeviceResult], error: Exception) -> None:
        for step in steps:
            step.error = error
        self.state.step_count = steps[0].index

    def _remedy(self, step: DeviceResult, flag: int, candidates: int) -> None:
        """Removes what kept ``step`` from happening, or takes it op by op; an error where it must not happen."""
        from sae_fast.kernels import flag as bits

        if flag & bits.NOT_FINITE:
            self._not_finite(step)
        if flag & bits.STALE:
            warnings.warn(stale_message(step.index), stacklevel=5)
        shadow = step.graphs.step.shadow
        ops.refresh_shadow(self.state.sae.W_enc, shadow)  # a scale may have become too large
        again = step.graphs.step
        if flag & (bits.SHORT | bits.OVERFLOW) and self.floors is not None and again.sure_of != step.index:
            if flag & bits.SHORT and self.floors.least > 0:
                self.floors.lower()
            again.make_sure(step.index, step.x)
            self.dense = True
        elif flag & bits.DEAD:
            self._by_ops(step, shadow)
            self.dense = True
        elif flag & bits.OVERFLOW:
            if crossovers.gpu_rejects(candidates, step.x.shape[0], self.state.sae.d_sae):
                self._by_ops(step, shadow)
                self.dense = True
            else:
                self.capacity = -(-(candidates + candidates // 4) // GRAIN) * GRAIN
        elif flag & bits.NOT_FINITE_LOSS and not flag & bits.STALE:
            self._by_ops(step, shadow)  # where what is not finite is found, if there is anything

    def _by_ops(self, step: DeviceResult, shadow: ops.Shadow) -> None:
        """Takes the first step under way with the host in between, which goes the dense way or says what is not finite."""
        rows = step.x.to(self.state.sae.W_enc.dtype)
        result = update(self.state, rows, step.index, step.rates, shadow)
        losses = *result.losses.tolist(), result.squared_error
        numbers = *losses, result.fired, result.code.nnz, result.dead or 0, 0
        self._happened(step, Report(numbers, rows.shape[0], by_ops=True))

    @staticmethod
    def _not_finite(step: DeviceResult) -> None:
        with naming(step.index):
            checks.finite("x", step.x.view(step.shape))
        raise FloatingPointError(f"step {step.index}: x − b_dec is not finite; the weights are unchanged")
