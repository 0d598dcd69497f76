"""RowAdam: Adam that visits only the weight rows that move, and is exact.

With β1 = 0 (the paper's setting) a row with a zero gradient has a zero step; only its second moment decays, and
v ← β2^Δt v makes up for that at the next visit.  So a step costs what its touched rows cost.  With momentum every row
moves that ever had a gradient, but a gradient is still summed on chip, row by row, and never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_fast import arguments, ops
from sae_fast.code import RowGradient
from sae_fast.signals import uninterrupted


class RowAdam(torch.optim.Optimizer):
    """Equal to ``torch.optim.Adam`` (plus, with ``unit_rows``, gradient projection before and renormalisation after).

    A parameter's gradient is a RowGradient given to :meth:`step`, or else its dense ``.grad``, of which every row counts as
    touched; so do all rows at eps = 0, where a row of zeros has no step to skip but 0/0.
    ``params`` may be groups; ``unit_rows=True`` in a group holds the rows of its [F, d] weights at unit norm: the component
    of the gradient along each row is removed, Adam steps, the row is renormalised.  Rows are made unit before the first
    step; with ``unit_start=False`` it takes them as they are and makes them so, as other packages' optimizers do.  State:
    ``step``, ``exp_avg_sq`` (raw, as of ``last_step`` [F]), and ``exp_avg`` if the first step was at β1 > 0, which goes on
    as torch's while β1 changes; state_dict() keeps it raw, so that resuming is bitwise.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        unit_rows: bool = False,
        unit_start: bool = True,
    ):
        betas = checked_betas(betas)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, unit_rows=unit_rows, unit_start=unit_start))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, by itself or from the constructor; ``ValueError`` names what is wrong with it."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(
        self,
        closure: Any = None,
        rows: Mapping[torch.nn.Parameter, RowGradient | Tensor] | None = None,
        grad_scale: Tensor | None = None,
        skip: Tensor | None = None,
        shadows: Mapping[torch.nn.Parameter, ops.Shadow] | None = None,
    ) -> Any:
        """One step on every parameter that has a gradient, in ``rows`` or in ``.grad``, and is not frozen (requires_grad).

        ``grad_scale`` (0-d) multiplies every gradient; ``skip`` (0-d bool) makes the step a no-op.  ``shadows`` of
        parameters [F, d] are brought up to date with them.  ``ValueError``, before anything changes: for a parameter that
        the optimizer does not hold; for β1 > 0 after a start at β1 = 0, where the last gradient is not kept.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if skip is not None and bool(skip):
            return loss
        rows, shadows = rows or {}, shadows or {}
        held = {p for group in self.param_groups for p in group["params"]}
        for name, given in (("rows", rows), ("shadows", shadows)):
            for p in given:
                if p not in held:
                    raise ValueError(f"{name}: got a parameter of shape {tuple(p.shape)} that the optimizer does not hold")
        due = []
        for group in self.param_groups:
            for p in group["params"]:
                gradient = rows.get(p, p.grad)
                if gradient is not None and p.requires_grad:
                    _check_momentum(self.state.get(p, {}), group["betas"])
                    due.append((p, gradient, group))
        with uninterrupted():
            for p, gradient, group in due:
                self._step_one(p, gradient, group, grad_scale, shadows.get(p))
        return loss

    def _step_one(
        self,
        p: Tensor,
        gradient: RowGradient | Tensor,
        group: dict,
        grad_scale: Tensor | None,
        shadow: ops.Shadow | None,
    ) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        as_it_is = not state and group["unit_rows"] and not group.get("unit_start", True)  # each row is to be made unit
        if as_it_is or group["eps"] == 0:
            gradient = ops.dense_gradient(p, gradient)
        if not state:
            self._initialise(p, state, group)
            if shadow is not None and group["unit_rows"]:
                ops.refresh_shadow(p, shadow)
        self._prepare(p, state, group)
        state["step"] += 1
        rows = _as_rows(p), _as_rows(state["exp_avg_sq"]), state["last_step"]
        settings = dict(
            m=_as_rows(state["exp_avg"]) if "exp_avg" in state else None, step=state["step"], lr=float(group["lr"]),
            beta1=beta1, beta2=beta2, eps=group["eps"], unit_rows=group["unit_rows"], grad_scale=grad_scale, shadow=shadow,
        )  # fmt: skip
        if isinstance(gradient, RowGradient):
            ops.weight_step(*rows, gradient, **settings)
        else:
            ops.row_step(*rows, _as_rows(gradient), **settings)

    @torch.no_grad()
    def prepare(self) -> None:
        """The state of every parameter that is not frozen as its next step wants it: made where there is none yet, and as
        of the group's betas."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    if not self.state[p]:
                        self._initialise(p, self.state[p], group)
                    self._prepare(p, self.state[p], group)

    def _prepare(self, p: Tensor, state: dict, group: dict) -> None:
        beta1, beta2 = group["betas"]
        if beta1 > 0 and "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p)
        if beta2 != state["beta2"]:
            self._catch_up(p, state, state["step"])
            state["beta2"] = beta2

    def _initialise(self, p: Tensor, state: dict, group: dict) -> None:
        state["step"] = 0
        state["beta2"] = group["betas"][1]
        state["exp_avg_sq"] = torch.zeros_like(p)
        state["last_step"] = torch.zeros(_as_rows(p).shape[0], dtype=torch.int64, device=p.device)
        if group["unit_rows"] and group.get("unit_start", True):  # once: the lazy route never visits an idle row
            p.copy_(torch.nn.functional.normalize(p, dim=1))

    @staticmethod
    def _catch_up(p: Tensor, state: dict, step: int) -> None:
        """Decays every row of v to what it would be at ``step`` in plain Adam."""
        decay = state["beta2"] ** (step - state["last_step"]).clamp(min=0).double()
        _as_rows(state["exp_avg_sq"]).mul_(decay.to(p.dtype)[:, None])
        state["last_step"].clamp_(min=step)

    @torch.no_grad()
    def catch_up(self) -> None:
        """Brings every second moment up to date, so that ``exp_avg_sq`` reads as torch.optim.Adam's: for export."""
        for p, state in self.state.items():
            self._catch_up(p, state, state["step"])

    def load_state_dict(self, state_dict: dict) -> None:
        for i, state in state_dict["state"].items():
            if state and (missing := sorted({"step", "beta2", "exp_avg_sq", "last_step"} - set(state))):
                raise ValueError(
                    f"state_dict: state of parameter {i}: {missing} missing; want what RowAdam.state_dict() gave"
                )
        super().load_state_dict(state_dict)
        # torch casts every state tensor to its parameter's dtype; the row counters are integers.
        saved = state_dict["state"]
        parameters = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, parameters, strict=True):
            if i in saved:
                self.state[p]["last_step"] = saved[i]["last_step"].to(p.device, torch.int64, copy=True)


def checked_betas(betas: Any) -> tuple[float, float]:
    """(β1, β2); ``ValueError`` for what is none."""
    wanted = "two numbers in [0, 1)"
    beta1, beta2, *others = (*arguments.numbers("betas", betas, lambda beta: 0 <= beta < 1, wanted), None)
    if beta2 is None or len(others) != 1:
        raise ValueError(f"betas: got {betas}, want {wanted}")
    return beta1, beta2


def check_group(group: dict[str, Any]) -> None:
    """``ValueError`` unless RowAdam can step the parameters of this group with its settings."""
    checked_betas(group["betas"])
    for name in ("lr", "eps"):
        value = group[name]
        arguments.number(name, value.item() if isinstance(value, Tensor) else value, lambda n: n >= 0, "≥ 0")
    for p in group["params"]:
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"params: got a parameter in {p.dtype}, want float32 masters; keep bf16 modules for inference")
        if group["unit_rows"] and p.dim() != 2:
            raise ValueError(f"unit_rows: got a parameter of shape {tuple(p.shape)}, want [F, d]")
        if not p.is_contiguous():
            raise ValueError(f"params: got strides {p.stride()}, want contiguous parameters")


def _check_momentum(state: Mapping[str, Any], betas: tuple[float, float]) -> None:
    if betas[0] > 0 and state.get("step", 0) > 0 and "exp_avg" not in state:
        raise ValueError(
            f"betas: got β1 = {betas[0]} after {state['step']} steps from a start at β1 = 0, whose last gradient, where "
            "torch's Adam would go on from, is not kept; want β1 = 0, a start at β1 > 0, or a new optimizer"
        )


def _as_rows(p: Tensor) -> Tensor:
    """A weight as it is; a vector as rows of one element; anything else as one element a row."""
    return p if p.dim() == 2 else p.reshape(-1, 1)
