"""A training step for the GPU in which the host waits for nothing: the kernels in order, in buffers of a fixed capacity.

What would need a decision by the host sets a bit of one flag on the device instead, and while the flag is set no weight
changes.  device_steps.py reads it later, and repeats what did not happen.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from sae_fast import gradients, nn
from sae_fast.code import Decoder, Layer, RowGradient, Rows, Shadow, Transposed
from sae_fast.gradients import Entries
from sae_fast.kernels.compact import Gapped
from sae_fast.kernels.decode_loss import Ends, Outputs, StepOutputs, decode_loss
from sae_fast.kernels.encode import candidates, members
from sae_fast.kernels.flag import DEAD, SHORT
from sae_fast.kernels.grad_sqnorm import grad_sqnorm, slices
from sae_fast.kernels.jump import jump
from sae_fast.kernels.largest import Largest
from sae_fast.kernels.outer import Runs
from sae_fast.kernels.round import watch
from sae_fast.kernels.transpose import transpose
from sae_fast.kernels.vectors import check_finite, step_vectors, sums
from sae_fast.kernels.weight_step import Constants, Update, adam_constants, weight_step
from sae_fast.objectives import Objective
from sae_fast.ops.dispatch import without_autocast
from sae_fast.ops.encode.gpu import sure_floor
from sae_fast.penalty import OF_F, TANH, TARGET
from sae_fast.train.device_after import follow, silent_after
from sae_fast.train.device_floors import Floors
from sae_fast.train.device_report import REPORT
from sae_fast.train.state import TrainState

GIVEN = "={}q11f"  # a step's number from 1, its prefixes' ends, the penalty's coefficient, Floors.margin, Adam's constants


class DeviceKernels:
    """The kernels of one step, on a code with gaps of up to ``capacity`` entries: gradients.Kernels."""

    def __init__(self, ones: Tensor, features: int, prefixes: Ends | None = None):
        self.ones, self.features, self.prefixes = ones, features, prefixes
        self.runs: Runs | None = None

    def entries(self, code: Gapped, layer: Layer, decoder: Decoder, target: Tensor, objective: Objective) -> Entries:
        B, C, penalty = target.shape[0], code.values.shape[1], objective.penalty
        l0 = mean = None
        assert isinstance(objective.coefficient, Tensor)  # as DeviceStep has it
        if penalty.window:
            l0 = jump(code, layer, penalty.window == OF_F)
            mean = l0.mean(dtype=torch.float64)
        delta, weights = self.ones.new_zeros(2, C)  # zeros in the gaps
        columns, along, auxiliary = self.ones.new_empty(C, 4), self.ones.new_empty(C), not objective.stops_auxiliary
        norms = delta.new_empty(C) if penalty.native == TANH else None
        step = StepOutputs(
            layer, code.u, penalty, objective.coefficient, delta, columns, weights, along, auxiliary,
            mean if penalty.native == TARGET else l0, norms,
        )  # fmt: skip
        out = Outputs.of(code.values, target, self.prefixes)
        of_code = code.begin, code.end, code.indices, code.values
        costs = objective.norms(decoder.W)
        decode_loss(of_code, decoder.W, decoder.b, target, costs, float(B), out, step, objective.zeros, self.prefixes)
        losses, residuals = out.losses.sum(0, dtype=torch.float64) / B, tuple(out.residuals.flatten(1, -2))
        norms = code.values[-1] if objective.costs_norm and norms is None else norms
        constants = {} if mean is None else objective.constants(layer, mean)
        error, ends = residuals[0], None
        if self.prefixes is not None:
            error, ends = out.residuals[0, -1] / self.prefixes.costs[-1], self.prefixes.ends
        return Entries(losses, residuals, error, delta, columns, weights, constants, norms, along, ends)

    def transpose(self, code: Gapped) -> Transposed:
        csc = Transposed.empty(self.features, code.indices)
        self.runs = Runs.of(csc.colptr, code.indices.shape[0])
        transpose(code.begin, code.end, code.indices, csc, self.runs)
        return csc

    def sums(self, csc: Transposed, columns: Tensor, also: Tensor | None, rows: int) -> list[Tensor]:
        return list(sums(csc, columns, also))


class DeviceStep:
    """The step of one SAE, with a code of up to ``capacity`` candidates; ``ahead`` of them may be enqueued.  ``floors``:
    those of an SAE that keeps the largest."""

    def __init__(self, state: TrainState, shadow: Shadow, capacity: int, ahead: int, floors: Floors | None = None):
        self.state, self.sae, self.shadow, self.capacity = state, state.sae, shadow, capacity
        self.settings, self.objective, device = state.settings, state.objective, state.sae.W_enc.device
        self.ones, self.none = torch.ones(capacity, device=device), torch.zeros((), dtype=torch.float64, device=device)
        ints = 1 + len(self._ends(0))
        self._layout = Struct(GIVEN.format(ints))
        self._given = torch.zeros(self._layout.size, dtype=torch.uint8, device=device)
        step, floats = self._given[: 8 * ints].view(torch.int64), self._given[8 * ints :].view(torch.float32)
        prefixes, self.prefixes = self.objective.prefixes, None
        if prefixes is not None:
            self.prefixes = Ends(step[1:], prefixes.costs(self.ones))
        self.adam = Constants(floats[2:], step[0])
        self.l1, self.margin, self.floors = floats[0], floats[1], floors
        self.sure: Tensor | None = None  # floors [B]
        self.sure_of = -1  # the step that they are of
        pin, size = device.type == "cuda", self._layout.size
        on_host = [torch.zeros(size, dtype=torch.uint8, pin_memory=pin) for _ in range(ahead)]
        self._on_host = [(t, t.numpy().data) for t in on_host]
        self.flag = torch.zeros((), dtype=torch.int32, device=device)
        self.report = torch.zeros(len(REPORT), dtype=torch.float64, device=device)

    def set(self, step: int, lr: float, l1: float) -> None:
        """Sets the constants of the next run, by one copy; ``step`` counts from 1."""
        given, memory = self._on_host[step % len(self._on_host)]
        margin = 0.0 if self.floors is None or self.sure_of == step - 1 else self.floors.margin
        adam = adam_constants(step, lr, *self.settings.betas, self.settings.eps)
        self._layout.pack_into(memory, 0, step, *self._ends(step - 1), l1, margin, *adam)
        self._given.copy_(given, non_blocking=True)

    def _ends(self, index: int) -> tuple[int, ...]:
        """Those of the prefixes of step ``index``, from 0."""
        prefixes, features = self.objective.prefixes, self.sae.d_sae
        return () if prefixes is None else prefixes.drawn(features, index).ends(features)

    @torch.no_grad()
    @without_autocast()
    def make_sure(self, index: int, x: Tensor) -> None:
        """Gives the repetition of step ``index`` on x [B, d] floors that hide nothing, whatever was kept before."""
        assert self.floors is not None and self.sure is not None  # as it has run
        x_c, exact = self.sae.centred(x.to(self.sae.W_enc.dtype)), self.sae.precision == "exact"
        self.sure.copy_(sure_floor(x_c, self.sae.layer(self.shadow), self.floors.k, self.floors.whole, exact))
        self.sure_of = index

    @torch.no_grad()
    @without_autocast()
    def run(self, x: Tensor) -> None:
        """One step on x [B, d]; ``report`` says what it saw."""
        sae, layer, exact = self.sae, self.sae.layer(self.shadow), self.sae.precision == "exact"
        layer = layer._replace(cut=self.objective.reach(layer))
        watch(sae.W_enc, *self.shadow, self.adam.step, self.flag)
        shift = sae.b_dec if sae.apply_b_dec_to_input else None
        x_c = x if shift is None and x.dtype == sae.W_enc.dtype else self.ones.new_empty(x.shape)
        which = self._largest(x, shift)
        floor = None if which is None else which.floor
        screened = candidates(x, layer, exact, shift, None if x_c is x else x_c, self.flag, floor)
        found = members(x_c, layer, screened, self.capacity, self.flag, exact, which)
        code = self._active(found)
        kernels = DeviceKernels(self.ones, sae.d_sae, self.prefixes)
        decoder = Decoder(sae.W_dec, sae.b_dec, shift is not None)
        objective = self.objective.now(self.l1, 0, sae.d_sae)
        step = gradients.of_step(code, x_c, x, layer, decoder, objective, kernels)
        check_finite(step.losses, screened.norms, step.by_name, self.flag)
        by_name = {name: g for name, g in step.by_name.items() if sae.get_parameter(name).requires_grad}
        since = silent_after(self.state, code)
        if objective.aux is not None:
            assert since is not None and self.settings.dead_after is not None  # as the settings have it
            self.flag.bitwise_or_(torch.where((since >= self.settings.dead_after).any(), DEAD, 0).to(torch.int32))
        self._update(by_name, kernels.runs)
        if self.floors is not None:
            self.floors.follow(found, x_c, self.flag)
        dead = follow(self.state, code, since, self.adam.step, self.flag)
        fired = (code.values[0] != 0).sum()  # the gaps hold zeros
        squared = step.losses[0] if self.prefixes is None else step.residual.pow(2).sum(1, dtype=torch.float64).mean()
        counts = squared, fired, screened.end[-1], self.none if dead is None else dead, self.flag
        self.report.copy_(torch.stack([*step.losses.double(), *(count.double() for count in counts)]))

    def _largest(self, x: Tensor, shift: Tensor | None) -> Largest | None:
        """The choice among the candidates of x [B, d], if one is made; SHORT where no floor is known.  No margin stands for
        the floors that are sure."""
        if self.floors is None:
            return None
        if self.sure is None:
            self.sure = torch.zeros(x.shape[0], device=x.device)
        known = self.margin * self.floors.least
        self.flag.bitwise_or_(torch.where((known > 0) | (self.margin == 0), 0, SHORT).to(torch.int32))
        guessed = known * self.floors.scale(x if shift is None else x - shift)
        floor = torch.where(self.margin == 0, self.sure, guessed)
        return Largest(self.floors.k, self.floors.whole, floor)

    def _active(self, code: Gapped) -> Gapped:
        """The code without the values of groups that are off."""
        sae = self.sae
        if not isinstance(sae, nn.GroupedSAE) or sae.all_active:
            return code
        return code._replace(values=torch.where(code.indices < sae.active_features, code.values, 0))

    def _rows(self, name: str) -> Rows:
        """A parameter and its state; of a vector [n]."""
        W = self.sae.get_parameter(name)
        state, shadow = self.state.optimizer.state[W], self.shadow if name == "W_enc" else None
        return Rows(W.detach(), state["exp_avg_sq"], state["last_step"], shadow, state.get("exp_avg"))

    def _update(self, by_name: dict[str, RowGradient | Tensor], split: Runs | None) -> None:
        def sqnorm(name: str, g: RowGradient) -> Tensor:
            W, projects = self.sae.get_parameter(name), name == "W_dec" and self.objective.clips_projected
            squares = torch.empty(W.shape[0], slices(W.shape[1], projects), dtype=torch.float64, device=W.device)
            grad_sqnorm(g, W, projects, squares, runs=split)
            return squares.sum()

        scale = gradients.clip(self.settings.grad_clip, by_name, sqnorm)
        scale = None if scale is None else scale.float()
        rows = {name: self._rows(name) for name in by_name}
        vectors = [(rows[name], g) for name, g in by_name.items() if isinstance(g, Tensor)]
        weights = {name: g for name, g in by_name.items() if isinstance(g, RowGradient)}
        decays = step_vectors(
            vectors, [(rows[name], g.csc.colptr) for name, g in weights.items()], Update(self.adam, False, scale, self.flag)
        )
        for (name, g), decay in zip(weights.items(), decays, strict=True):
            unit = name == "W_dec" and self.objective.unit_rows
            weight_step(rows[name], g, Update(self.adam, unit, scale, self.flag), runs=split, decay=decay)
