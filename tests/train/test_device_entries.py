"""Every objective's gradients by a GPU's kernels, without a host that waits, against autograd in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import Judge, assert_same_bits
from problems import bodies
from problems.objectives import CASES, Problem, problem
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

from problems.gapped import DEVICE, Gapped

from sae_fast import gradients, ops, use_backend
from sae_fast.code import Decoder, RowGradient, SparseCode
from sae_fast.kernels import compact
from sae_fast.kernels.decode_loss import Ends
from sae_fast.train.device_step import DeviceKernels

SHAPE = (6, 19, 20)
ENTRIES = [case for case, (_, objective) in CASES.items() if objective.aux is None or objective.prefixes is not None]


def dense(W: Tensor, gradient: RowGradient | Tensor) -> Tensor:
    if isinstance(gradient, Tensor):
        return gradient
    csc, n = gradient.csc, int(gradient.csc.colptr[-1])
    perm = csc.perm[:n]
    packed = replace(csc, rows=csc.rows[:n], perm=torch.arange(n, device=perm.device))
    own = gradient.self_coefficient
    with use_backend("reference"):
        out = ops.outer(packed, [v[perm] for v in gradient.values], gradient.A)
    return out if own is None else out + own[:, None] * W


def within(code: SparseCode, bias: Tensor, reach: Tensor | None) -> SparseCode:
    """The entries that have a gradient, as a device's step finds them."""
    if reach is None:
        return code
    at = code.indices.long()
    keep = code.u + bias[at] > reach[at]
    indptr = functional.pad(keep.cumsum(0), (1, 0))[code.indptr]
    return SparseCode(code.shape, indptr, code.indices[keep], code.u[keep], code.values[:, keep])


def by_device(step: Problem) -> dict[str, Tensor]:
    """As Problem.by_engine, of a code with gaps that nothing reads, on the device."""
    with use_backend("cpu"):
        sae, objective = step.sae.cpu(), step.objective
        layer = sae.layer()
        code = sae._train_code(sae.centred(step.x), None, objective.slack(layer))
        gapped = Gapped(within(code, layer.bias, objective.reach(layer)), torch.float32)
    sae, objective = sae.to(DEVICE), objective.now(torch.tensor(objective.coefficient).to(DEVICE), 0, sae.d_sae)
    x, layer = step.x.to(DEVICE), sae.layer()
    x_c = sae.centred(x)
    code = compact.Gapped(gapped.begin, gapped.end, gapped.indices, gapped.spread(gapped.code.u), gapped.values)
    prefixes, ends = objective.prefixes, None
    if prefixes is not None:
        ends = Ends(torch.tensor(prefixes.ends(sae.d_sae), device=DEVICE), prefixes.costs(x))
    kernels = DeviceKernels(torch.ones(gapped.capacity, device=DEVICE), sae.d_sae, ends)
    decoder = Decoder(sae.W_dec, sae.b_dec, sae.apply_b_dec_to_input)
    found = gradients.of_step(code, x_c, x, layer, decoder, objective, kernels)
    by_name = {name: dense(sae.get_parameter(name), g) for name, g in found.by_name.items()}
    return {name: t.detach().cpu() for name, t in {"losses": found.losses, **by_name}.items()}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("case", ENTRIES)
@bodies.of_gpu
def test_gradients_are_autograds(body, case):
    judged(case)


@pytest.mark.parametrize("case", ["step", "target of f"])
@bodies.of_gpu
def test_gradients_where_all_thresholds_are_negative_are_autograds(body, case):
    judged(case, below=2.0)


def judged(case: str, below: float = 0.0) -> None:
    judge = Judge()
    for seed in range(2):
        with use_backend("cpu"):
            step = problem(case, *SHAPE, seed=10 * seed)
        step.objective = replace(step.objective, aux=None)
        if below:
            step.sae.threshold.sub_(below)
        found = by_device(step)
        if seed == 0:
            assert_same_bits(list(by_device(step).values()), list(found.values()))
        step.sae.cpu()
        with torch.enable_grad():
            torchs, exact = step.by_autograd(torch.float32), step.by_autograd(torch.float64)
        for name, value in found.items():
            judge.add(name, value, torchs[name], exact[name])
        for name in set(exact) - set(found):
            assert not exact[name].any(), name
    judge.verdict()
