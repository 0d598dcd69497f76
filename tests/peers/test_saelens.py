"""SAELens' training classes on the engine, against SAELens itself: its classes, its trainer, its runner, its files.

Only in the environment that `make test` builds for the peers.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import json
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE, Judge, assert_same_bits, make_inputs
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("sae_lens", reason="the peers are in an environment of their own: make test-peers builds it")

sys.path.insert(0, str(Path(__file__).parents[2]))

import sae_lens
from sae_lens import SAE, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_class,
    get_sae_training_class,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from sae_fast.extras import MissingExtra
from sae_fast.interop import saelens
from sae_fast.interop.saelens import step
from sae_fast.ops import crossovers

L1, BANDWIDTH = 2.0, 0.2


def of_jumps(F: int, density: float) -> dict:
    return {"l0_coefficient": 0.3, "jumprelu_bandwidth": BANDWIDTH}


def of_topk(F: int, density: float) -> dict:
    return {"k": max(1, round(density * F))}


def of_batchtopk(F: int, density: float) -> dict:
    return {"k": min(float(F), 0.9 * density * F + 0.3)}


def of_matryoshka(F: int, density: float) -> dict:
    return {**of_batchtopk(F, density), "matryoshka_widths": [F // 4, F // 2, F]}


# By SAELens' name: its class without TrainingSAE, its coefficient, and its configuration at a density.
KINDS = {
    "gated": ("Gated", "l1", lambda F, density: {"l1_coefficient": L1}),
    "standard": ("Standard", "l1", lambda F, density: {"l1_coefficient": L1}),
    "jumprelu": ("JumpReLU", "l0", of_jumps),
    "topk": ("TopK", None, of_topk),
    "batchtopk": ("BatchTopK", None, of_batchtopk),
    "matryoshka_batchtopk": ("MatryoshkaBatchTopK", None, of_matryoshka),
}
REGISTRIES = (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY)
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")  # SAELens saves them as jumprelu
TOPK = ("topk", *BATCH_TOPK)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def classes(kind: str, ours: bool) -> tuple[type, type]:
    """The class and its configuration."""
    package, name = saelens if ours else sae_lens, f"{KINDS[kind][0]}TrainingSAE"
    return getattr(package, name), getattr(package, f"{name}Config")


def warm_up(kind: str, steps: int) -> dict:
    return {f"{KINDS[kind][1]}_warm_up_steps": steps} if KINDS[kind][1] else {}


def saved_as(kind: str) -> str:
    """SAELens' architecture of what it saves for inference."""
    return "jumprelu" if kind in BATCH_TOPK else kind


def bias_of(sae) -> nn.Parameter:
    return sae.b_gate if hasattr(sae, "b_gate") else sae.b_enc


def new(kind: str, ours: bool, seed: int = 0, d_in: int = 16, d_sae: int = 64, density: float = 0.1, **config):
    """A fresh SAE of SAELens or of ours, seeded."""
    sae_class, config_class = classes(kind, ours)
    torch.manual_seed(seed)
    return sae_class(config_class(d_in=d_in, d_sae=d_sae, **{**KINDS[kind][2](d_sae, density), **config}))


@torch.no_grad()
def problem(kind: str, B: int, d: int, F: int, seed: int = 0, density: float = 0.05, **config):
    """(x, SAELens' SAE in float64, in float32, ours), with the same parameters, where rounding decides nothing on x: no
    gate is near its kink, no entry near the end of its window, none nearly as large as the least that is kept."""
    for n in range(100):
        seed += 100 * (n > 0)
        p = make_inputs(B, d, F, density, seed)
        g = torch.Generator().manual_seed(seed)
        lengths = 0.5 + torch.rand(F, 1, generator=g)  # SAELens' rows have any length
        values = {"W_enc": p.W_enc.T, "W_dec": p.W_dec * lengths, "b_dec": p.b_dec, "threshold": torch.rand(F, generator=g)}
        values |= {"b_gate": p.b_gate, "b_mag": p.b_mag, "r_mag": p.r_mag, "b_enc": p.b_gate}
        if kind == "jumprelu":
            values["b_enc"] = p.b_gate + values["threshold"]
        saes = []
        for ours, dtype in ((False, "float64"), (False, "float32"), (True, "float32")):
            sae = new(kind, ours, d_in=d, d_sae=F, density=density, dtype=dtype, **config)
            for name, parameter in sae.named_parameters():
                parameter.copy_(values[name])
            saes.append(sae)
        x = p.x if config.get("apply_b_dec_to_input", True) else p.x_c
        if decided(kind, x, saes[0]):
            return x, *saes
    raise AssertionError


def decided(kind: str, x: Tensor, sae) -> bool:
    if kind not in ("jumprelu", *TOPK):
        return True
    _, pi = sae.encode_with_hidden_pre(x.double())
    if kind == "jumprelu":
        return bool(((pi - sae.threshold).abs() - sae.bandwidth / 2).abs().min() > 3e-6)
    whole, k = kind in BATCH_TOPK, sae.activation_fn.k
    rows, dead = pi.flatten()[None] if whole else pi, dead_features(kind, x, pi.shape[1])
    pairs = [(rows.relu(), int(k * pi.shape[0]) if whole else k)]
    pairs += [] if dead is None else [(pi[:, dead], x.shape[1] // 2)]
    for values, n in pairs:
        ordered = values.sort(dim=1, descending=True).values
        if n < values.shape[1] and bool(((ordered[:, n - 1] - ordered[:, n] < 3e-6) & (ordered[:, n] != 0)).any()):
            return False
    return True


def dead_features(kind: str, x: Tensor, F: int) -> Tensor | None:
    """[F] bool: every fifth feature of the classes that revive, some of which fire again in this step."""
    return torch.arange(F) % 5 == 3 if kind in TOPK and x.shape[-1] > 1 else None


def trainer_of(sae, batch: int = 32, steps: int = 100, data=(), **config) -> SAETrainer:
    config = {"lr": 1e-3, "lr_end": 1e-4, **config}
    return SAETrainer(SAETrainerConfig(steps * batch, batch, **config), sae, iter(data))


def step_input(x: Tensor, dead: Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x, coefficients={"l1": L1, "l0": 0.3}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )


def whole(output_tensor: Tensor) -> Tensor:
    return (output_tensor.to_dense() if output_tensor.is_sparse else output_tensor).detach()


def everything(sae) -> Tensor:
    return torch.cat([p.detach().flatten() for _, p in sorted(sae.named_parameters())])


class Seen(TorchDispatchMode):
    """Which ops ran, and the largest strided tensor that any of them made."""

    def __init__(self):
        super().__init__()
        self.ops: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.layout == torch.strided:
                self.largest = max(self.largest, t.numel())
        return out

    def count(self, op: str) -> int:
        return sum(name.startswith(op) for name in self.ops)


def assert_on_the_engine(seen: Seen, steps: int = 1) -> None:
    assert seen.count("sae_fast.encode") == steps
    assert not seen.count("aten.relu"), "SAELens' own pass ran"


# ---- The fast path is taken -----------------------------------------------------------------------------------------


def test_a_step_of_the_trainer_is_one_sparse_pass_without_a_dense_matrix(kind, caplog):
    B, d, F = 600, 16, 1024  # entries and weights are far fewer than B · F
    x, _, theirs, ours = problem(kind, B, d, F, density=0.01)
    with Seen() as peer:
        trainer_of(theirs, B).step(x)
    assert peer.largest >= B * F, "the count would find a dense matrix"
    assert not peer.count("sae_fast")
    trainer = trainer_of(ours, B)
    trainer.step(x)  # Adam makes its state
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING), Seen() as seen:
        warnings.simplefilter("error")
        out = trainer.step(x)
    assert_on_the_engine(seen)
    assert seen.largest < B * F // 16
    assert out.feature_acts.is_sparse and out.feature_acts.is_coalesced()
    assert ours.why_dense() is None and not caplog.records


def test_w_enc_its_gradient_and_adams_state_share_one_layout_and_nothing_copies_them(kind):
    B, d, F = 8, 64, 256  # a copy of a weight is the largest copy there could be
    x, _, _, ours = problem(kind, B, d, F, density=0.01)
    trainer = trainer_of(ours, B)
    trainer.optimizer.zero_grad = lambda: None
    trainer.step(x)
    assert ours.W_enc.shape == (d, F) and ours.W_enc.T.is_contiguous()
    assert ours.W_enc.grad.stride() == ours.W_enc.stride()
    assert trainer.optimizer.state[ours.W_enc]["exp_avg"].stride() == ours.W_enc.stride()

    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if str(func).split(".")[1] in ("copy_", "clone", "_to_copy", "contiguous"):
                copies.append(max(a.numel() for a in args if isinstance(a, Tensor)))
            return func(*args, **(kwargs or {}))

    ours.zero_grad()
    with Copies():
        trainer.step(x)
    assert max(copies, default=0) < d * F


# ---- One step -------------------------------------------------------------------------------------------------------


def judge_step(judge: Judge, kind: str, x: Tensor, saes, batch: int, threads: int = 1) -> None:
    """Losses, outputs, gradients, and the parameters after a step of SAELens' trainer."""
    torch.set_num_threads(threads)
    found: dict[str, list[Tensor]] = {}
    sure: dict[str, Tensor] = {}
    dead = dead_features(kind, x, saes[0].cfg.d_sae)
    for sae in saes:
        rows = x.to(sae.dtype)
        out = sae.training_forward_pass(step_input(rows, dead))
        out.loss.backward()
        results = {"loss": out.loss.detach(), "sae_out": out.sae_out, "feature_acts": whole(out.feature_acts), **out.losses}
        results |= {f"gradient of {name}": p.grad for name, p in sae.named_parameters()}
        assert [name for name in found if name in out.losses] in ([], list(out.losses))
        assert dead is None or (out.losses["auxiliary_reconstruction_loss"] > 0) == (sae.cfg.aux_loss_coefficient > 0)
        if kind in BATCH_TOPK:
            assert out.metrics["topk_threshold"] is sae.topk_threshold and sae.topk_threshold.dtype == torch.float64
            results["topk_threshold"] = sae.topk_threshold
        sae.zero_grad()
        trainer = trainer_of(sae, batch)
        if dead is not None:
            trainer.n_forward_passes_since_fired[dead] = 10_000
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        trainer.step(rows)  # one: it moves the gates that were kept away from their kinks
        for name, p in sae.named_parameters():
            momentum = trainer.optimizer.state[p]["exp_avg"]
            results |= {f"momentum of {name}": momentum, f"step of {name}": p.detach() - before[name]}
            if sae is saes[0]:
                # Beside Adam's eps it is rounding that decides how far a first step goes, also torch's own.
                sure[f"step of {name}"] = ~((momentum != 0) & (momentum.abs() < 1e-6))
        for name, value in results.items():
            found.setdefault(name, []).append(value.detach())
    assert sum(int(kept.sum()) for kept in sure.values()) > 0.9 * sum(kept.numel() for kept in sure.values())
    for name, (truth, theirs, ours) in found.items():
        truth = truth.double()  # a threshold's is float32
        kept = sure.get(name, torch.ones_like(truth, dtype=torch.bool))
        judge.add(name, ours[kept], theirs[kept], truth[kept])


@pytest.mark.parametrize("shape", [(33, 20, 100), (130, 63, 257), (257, 1, 33), (64, 100, 31)], ids=str)
@pytest.mark.parametrize("centred", [True, False], ids=["b_dec applied", "not applied"])
def test_a_step_is_as_near_to_float64_as_saelens_own(kind, centred, shape, route, monkeypatch):
    judge = Judge()
    few = 64 if shape[1] == 1 else 24 if kind == "jumprelu" else 6  # entries in a window are few as well
    for seed in range(few):  # of a handful of numbers luck decides whose rounding is smaller
        monkeypatch.setattr(step, "precision", lambda x, n=seed: ("exact", "fp32")[n % 2])  # of either processor
        x, *saes = problem(kind, *shape, seed=seed, apply_b_dec_to_input=centred)
        judge_step(judge, kind, x, saes, shape[0], threads=1 + seed % 3)
    judge.verdict()


def test_a_step_from_saelens_own_start_is_near_too(kind):
    """Zero biases: half of all features are active, feature_acts are dense."""
    judge = Judge()
    for seed in range(6):
        x, *saes = problem(kind, 64, 24, 96, seed=seed, density=0.5)
        assert not copy.deepcopy(saes[-1]).training_forward_pass(step_input(x)).feature_acts.is_sparse
        judge_step(judge, kind, x, saes, 64)
    judge.verdict()


OPTIONS = {
    "tanh": ("jumprelu", dict(jumprelu_sparsity_loss_mode="tanh", jumprelu_tanh_scale=2.0)),
    "quadratic": ("jumprelu", dict(jumprelu_sparsity_loss_mode="quadratic", target_l0=3.5)),
    "to the input": ("jumprelu", dict(jumprelu_ste_to_input=True)),
    "tanh, to the input": ("jumprelu", dict(jumprelu_sparsity_loss_mode="tanh", jumprelu_ste_to_input=True)),
    "quadratic, to the input": (
        "jumprelu", dict(jumprelu_sparsity_loss_mode="quadratic", target_l0=7.0, jumprelu_ste_to_input=True)
    ),
    "topk by π": ("topk", dict(rescale_acts_by_decoder_norm=False)),
    "sparse activations": ("topk", dict(use_sparse_activations=True, rescale_acts_by_decoder_norm=False)),
    "half the auxiliary loss": ("topk", dict(aux_loss_coefficient=0.5)),
    "no auxiliary loss": ("matryoshka_batchtopk", dict(aux_loss_coefficient=0.0)),
    "batchtopk by π": ("batchtopk", dict(rescale_acts_by_decoder_norm=False)),
    "less than one a row": ("batchtopk", dict(k=0.4)),
    "a whole number a row": ("batchtopk", dict(k=3.0)),
    "one level": ("matryoshka_batchtopk", dict(matryoshka_widths=[150])),
    "levels by π": ("matryoshka_batchtopk", dict(matryoshka_widths=[1, 9, 149, 150], rescale_acts_by_decoder_norm=False)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:WARNING. You have only set one matryoshka level")
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_steps_as_saelens_own(option):
    kind, config = OPTIONS[option]
    judge = Judge()
    for seed in range(4):
        x, *saes = problem(kind, 60, 20, 150, seed=seed, density=0.03, **config)
        dead, rows = dead_features(kind, x, 150), x.clone().requires_grad_()
        with Seen() as seen:
            out = saes[2].training_forward_pass(step_input(x, dead))
        assert seen.count("sae_fast.encode") == 1 and seen.count("sae_fast.outer") >= 2
        assert out.feature_acts.is_sparse or not getattr(saes[2].cfg, "use_sparse_activations", False)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                again = saes[2].training_forward_pass(step_input(rows, dead))
            for name, loss in out.losses.items():
                torch.testing.assert_close(again.losses[name].detach(), loss.detach())
        odd_objective(again, x).backward()
        of_x, asked = [rows.grad], saes[1::-1] if option != "sparse activations" else ()  # which torch cannot take back
        for sae in saes:
            sae.zero_grad()
        if kind in BATCH_TOPK:
            saes[2].topk_threshold.zero_()
        for sae in asked:
            rows = x.to(sae.dtype, copy=True).requires_grad_()
            odd_objective(copy.deepcopy(sae).training_forward_pass(step_input(rows, dead)), rows.detach()).backward()
            of_x.append(rows.grad)
        if asked:
            judge.add("gradient of x", *of_x)
        judge_step(judge, kind, x, saes, 60)
    judge.verdict()


def test_thresholds_below_zero_go_back_as_in_saelens():
    x, _, theirs, ours = problem("jumprelu", 64, 20, 100)
    for sae in (theirs, ours):
        sae.threshold.data[::3] = -0.05
        sae.training_forward_pass(step_input(x)).loss.backward()
    assert torch.equal(ours.threshold, theirs.threshold) and ours.threshold.min() == 0
    torch.testing.assert_close(ours.threshold.grad, theirs.threshold.grad, rtol=1e-4, atol=1e-5)


def test_jumprelu_steps_densely_while_more_than_a_tenth_of_the_features_is_active(caplog):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    theirs, ours = new("jumprelu", False), new("jumprelu", True)
    with Seen() as seen, caplog.at_level(logging.WARNING):
        out = ours.training_forward_pass(step_input(x))
    assert seen.count("sae_fast.encode") == 1 and not seen.count("sae_fast.outer") and not caplog.records
    assert whole(out.feature_acts).count_nonzero() > 0.3 * 64 * 64
    wanted = theirs.training_forward_pass(step_input(x)).loss
    torch.testing.assert_close(out.loss, wanted)
    for loss in (out.loss, wanted):
        loss.backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_signatures_are_saelens(kind):
    (theirs, theirs_config), (ours, our_config) = classes(kind, False), classes(kind, True)
    assert inspect.signature(our_config) == inspect.signature(theirs_config)
    pairs = [(theirs, ours)] + [(f, getattr(ours, name)) for name, f in inspect.getmembers(theirs, inspect.isfunction)]
    for own, new in pairs:
        wanted, got = (inspect.signature(f).parameters.values() for f in (own, new))
        assert [(p.name, p.kind, p.default) for p in got] == [(p.name, p.kind, p.default) for p in wanted], own


@pytest.mark.parametrize("norm", [0.1, None])
def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alike(kind, norm):
    theirs = new(kind, ours=False, seed=3, decoder_init_norm=norm)
    after = torch.rand(3)
    ours = new(kind, ours=True, seed=3, decoder_init_norm=norm)
    assert torch.equal(torch.rand(3), after)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for name, parameter in theirs.named_parameters():
        assert_same_bits(ours.get_parameter(name), parameter)


def test_a_batch_on_which_nothing_fires(kind):
    x, _, theirs, ours = problem(kind, 40, 16, 64)
    trainers = []
    for sae in (theirs, ours):
        bias_of(sae).data.fill_(-100)
        trainers.append(trainer_of(sae, 40))
        out = trainers[-1].step(x)
    assert out.feature_acts._nnz() == 0
    assert float(trainers[1].n_forward_passes_since_fired.min()) == 1
    torch.testing.assert_close(ours.b_dec, theirs.b_dec)
    torch.testing.assert_close(ours.W_dec, theirs.W_dec)


def test_a_nan_is_a_nan(kind):
    x, _, theirs, ours = problem(kind, 40, 16, 64)
    x = x.clone()
    x[3, 2] = float("nan")
    assert all(bool(sae.training_forward_pass(step_input(x)).loss.isnan()) for sae in (theirs, ours))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_in_sixteen_bits(kind, dtype):
    x, _, theirs, ours = problem(kind, 64, 16, 64)
    with Seen() as seen:
        got = ours.training_forward_pass(step_input(x.to(dtype)))
    assert_on_the_engine(seen)
    want = theirs.training_forward_pass(step_input(x.to(dtype)))
    assert got.sae_in.dtype == dtype
    for name, loss in want.losses.items():
        assert got.losses[name].dtype == loss.dtype
        torch.testing.assert_close(got.losses[name], loss)


# ---- What autograd may ask besides the gradient of the loss ---------------------------------------------------------


def odd_objective(out, x: Tensor) -> Tensor:
    """Uses every differentiable output by itself."""
    weights = torch.linspace(0.5, 2, len(out.losses), dtype=x.dtype)
    total = sum(w * loss for w, loss in zip(weights, out.losses.values(), strict=True))
    acts = out.feature_acts.to_dense() if out.feature_acts.is_sparse else out.feature_acts
    return total + 0.3 * (out.sae_out * x).sum() + 0.1 * acts.pow(2).sum() + 0.5 * out.loss


@pytest.mark.parametrize("density", [0.01, 0.2])
@pytest.mark.parametrize("of_x", [False, True], ids=["", "and of x"])
def test_any_output_can_be_differentiated(kind, density, of_x):
    judge = Judge()
    for seed in range(4):
        x, *saes = problem(kind, 50, 20, 200, seed=seed, density=density)
        found = []
        for sae in saes:
            rows = x.to(sae.dtype, copy=True).requires_grad_(of_x)
            out = sae.training_forward_pass(step_input(rows, dead_features(kind, x, 200)))
            odd_objective(out, rows.detach()).backward()
            found.append({name: p.grad for name, p in sae.named_parameters()} | ({"x": rows.grad} if of_x else {}))
        for name in found[0]:
            judge.add(name, found[2][name], found[1][name], found[0][name].double())
    judge.verdict()


def test_a_scaled_loss_a_second_backward_and_frozen_parameters(kind):
    x, _, theirs, ours = problem(kind, 50, 20, 200, density=0.01)
    for sae in (theirs, ours):
        sae.b_dec.requires_grad_(False)
        loss = sae.training_forward_pass(step_input(x)).loss
        (3 * loss).backward(retain_graph=True)
        loss.backward()
        sae.training_forward_pass(step_input(x)).loss.backward()
        assert sae.b_dec.grad is None
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_frozen_encoder_leaves_an_output_that_is_a_constant(kind):
    x, _, theirs, ours = problem(kind, 50, 20, 200, density=0.01, apply_b_dec_to_input=False)
    for sae in (theirs, ours):
        for name, p in sae.named_parameters():
            p.requires_grad_(name in ("W_dec", "b_dec"))
        out = sae.training_forward_pass(step_input(x))
        acts = out.feature_acts.to_dense() if out.feature_acts.is_sparse else out.feature_acts
        (out.loss + acts.sum()).backward()
    for name in ("W_dec", "b_dec"):
        torch.testing.assert_close(ours.get_parameter(name).grad, theirs.get_parameter(name).grad)


def test_an_empty_batch_encodes_to_an_empty_code(kind):
    ours, theirs = new(kind, True), new(kind, False)
    for shape in ((0, 16), (3, 0, 16)):
        assert ours.encode(torch.zeros(shape)).shape == theirs.encode(torch.zeros(shape)).shape


def test_without_gradients_only_losses_are_computed(kind):
    x, _, theirs, ours = problem(kind, 50, 20, 200)
    with torch.no_grad(), Seen() as seen:
        got = ours.training_forward_pass(step_input(x))
    assert_on_the_engine(seen)
    assert not seen.count("sae_fast.outer") and not got.loss.requires_grad
    torch.testing.assert_close(got.loss, theirs.training_forward_pass(step_input(x)).loss.detach())


# ---- encode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_encode_on_the_engine(kind, density):
    judge = Judge()
    for seed in range(3):
        x, *saes = problem(kind, 60, 20, 100, seed=seed, density=density)
        with Seen() as seen, torch.no_grad():
            got = saes[2].encode(x.reshape(3, 20, 20))
        assert_on_the_engine(seen)
        assert got.shape == (3, 20, 100)
        results = [[sae.encode(x.to(sae.dtype))] for sae in saes]
        assert torch.equal(results[2][0].detach(), got.view(60, 100))
        for sae, found in zip(saes, results, strict=True):
            found[0].pow(2).sum().backward()
            assert kind != "gated" or sae.b_gate.grad is None
            found += [p.grad for name, p in sae.named_parameters() if p.grad is not None]
        for i, (truth, theirs, ours) in enumerate(zip(*results, strict=True)):
            judge.add(f"result {i}", ours, theirs, truth.double())
    judge.verdict()


def test_forward_is_saelens_forward(kind):
    x, _, theirs, ours = problem(kind, 60, 20, 100)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.encode(x[0]), theirs.encode(x[0]))  # of one example


# ---- Whole runs -----------------------------------------------------------------------------------------------------

D_IN, D_SAE, BATCH, STEPS, RUNS = 24, 160, 96, 200, 8
START = {  # sparse enough for the engine, and with entries that no rounding brings below the least that is kept
    "jumprelu": dict(jumprelu_init_threshold=1.0, l0_coefficient=1.0, jumprelu_bandwidth=0.2, decoder_init_norm=0.3),
    **{kind: dict(density=0.07) for kind in TOPK},
}
ROUNDING = {"parameters": 2.0**-24, "loss": 4 * 2.0**-24}  # as tests/problems/trajectory.py


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(80, D_IN, generator=g), dim=1)
    shape = (STEPS, BATCH, 80)
    amounts = (torch.rand(shape, generator=g) < 3 / 80) * (1.5 + 3 * torch.rand(shape, generator=g))
    return list(amounts @ directions)


@dataclass
class Run:
    losses: Tensor
    states: Tensor
    acts_per_example: float
    revived: int  # steps with an auxiliary loss
    on_the_engine: int

    def deviation(self, other: Run) -> dict[str, Tensor]:
        return {
            "loss": (self.losses - other.losses).abs() / other.losses,
            "parameters": (self.states - other.states).norm(dim=1) / other.states.norm(dim=1),
        }


def run_of(kind: str, ours: bool, batches: list[Tensor], permutation: int | None = None, **config) -> Run:
    """200 steps of SAELens' trainer from SAELens' own start."""
    sae = new(kind, ours, d_in=D_IN, d_sae=D_SAE, **{**warm_up(kind, 50), **START.get(kind, {}), **config})
    trainer = trainer_of(sae, BATCH, STEPS, lr=3e-3, lr_warm_up_steps=10, lr_decay_steps=40, dead_feature_window=20)
    losses, states, revived, on_the_engine = [], [], 0, 0
    g = None if permutation is None else torch.Generator().manual_seed(permutation)
    for x in batches:
        with Seen() as seen:
            out = trainer.step(x if g is None else x[torch.randperm(BATCH, generator=g)])
        revived += bool(out.losses.get("auxiliary_reconstruction_loss", 0) > 0)
        on_the_engine += seen.count("sae_fast.outer") > 0  # not where half of all features are active
        losses.append(out.loss.detach().double())
        states.append(everything(sae).double())
    acts = float(whole(out.feature_acts).count_nonzero()) / BATCH
    return Run(torch.stack(losses), torch.stack(states), acts, revived, on_the_engine)


def test_two_hundred_steps_stay_within_the_spread_of_saelens_own_permuted_runs(kind, batches):
    torch.set_num_threads(1)
    plain = run_of(kind, False, batches)
    ours = run_of(kind, True, batches)
    assert plain.on_the_engine == 0 and (kind not in START or ours.on_the_engine > STEPS / 2)
    assert ours.revived == plain.revived and (kind not in TOPK or 50 < plain.revived < STEPS)
    assert plain.losses[-1] < 0.8 * plain.losses[0] and plain.acts_per_example < D_SAE / 4, "it trains"
    moved = (plain.states[-1] - plain.states[0]).norm() / plain.states[-1].norm()
    assert moved > 0.1
    spread = [run_of(kind, False, batches, seed).deviation(plain) for seed in range(RUNS)]
    for what, deviation in ours.deviation(plain).items():
        allowed = 2 * torch.stack([s[what] for s in spread]).amax(0) + ROUNDING[what]
        worst = int((deviation / allowed).argmax())
        assert (deviation <= allowed).all(), (
            f"{what}: at step {worst} ours is {deviation[worst]:.2e} from SAELens', allowed {allowed[worst]:.2e}"
        )
        assert allowed.max() < 1e-2, f"{what}: the spread is too wide to tell anything"


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("centred", [True, False], ids=["b_dec applied", "not applied"])
def test_fit_with_the_trainers_normalisations_which_it_folds_in_at_the_end(kind, normalize, centred, batches):
    config = dict(d_in=D_IN, d_sae=D_SAE, normalize_activations=normalize, apply_b_dec_to_input=centred)
    saes = [new(kind, ours, **config) for ours in (False, True)]
    for sae in saes:
        with Seen() as seen:
            trainer_of(sae, BATCH, 5, [2 * x for x in batches], lr=1e-4, n_batches_for_norm_estimate=3).fit()
        assert sae.cfg.normalize_activations == "none"
    assert seen.count("sae_fast.encode") == 5
    for name, parameter in saes[0].named_parameters():
        torch.testing.assert_close(
            saes[1].get_parameter(name), parameter, rtol=1e-3, atol=3e-5, msg=lambda m, n=name: n + m
        )


def test_the_trainers_statistics_and_log_are_saelens(kind):
    x, _, theirs, ours = problem(kind, 300, 16, 512, density=0.008)
    trainers = [trainer_of(sae, 300, lr=0.0, dead_feature_window=1) for sae in (theirs, ours)]
    for trainer in trainers:
        for rows in (x, x.flip(0), x[:100].repeat(3, 1)):
            out = trainer.step(rows)
            trainer.n_training_steps += 1
    assert out.feature_acts.is_sparse
    a, b = trainers
    assert torch.equal(a.act_freq_scores, b.act_freq_scores) and a.act_freq_scores.sum() > 300
    assert torch.equal(a.n_forward_passes_since_fired, b.n_forward_passes_since_fired)
    assert a.n_forward_passes_since_fired.max() > 0 and torch.equal(a.dead_neurons, b.dead_neurons)
    assert a.n_frac_active_samples == b.n_frac_active_samples
    torch.testing.assert_close(a.log_feature_sparsity, b.log_feature_sparsity)
    logs = [t.build_train_step_log_dict(t.step(x), t.n_training_samples) for t in trainers]
    assert logs[0].keys() == logs[1].keys()
    assert logs[0]["metrics/l0"] == logs[1]["metrics/l0"] > 0.5
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_autocast_leaves_the_engine_in_float32(kind):
    x, _, _, ours = problem(kind, 64, 16, 128)
    twin = copy.deepcopy(ours)
    outs = [trainer_of(sae, 64, autocast=on).step(x) for sae, on in ((ours, True), (twin, False))]
    assert torch.equal(outs[0].loss, outs[1].loss) and outs[0].loss.dtype == torch.float32
    assert torch.equal(everything(ours), everything(twin))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.encode(x), twin.encode(x)) and ours.encode(x).dtype == torch.float32


def test_compiled_as_the_runner_compiles_it(kind):
    x, _, _, ours = problem(kind, 64, 16, 128)
    twin = copy.deepcopy(ours)
    twin.training_forward_pass = torch.compile(twin.training_forward_pass, backend="eager")
    outs = [trainer_of(sae, 64).step(x) for sae in (ours, twin)]
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert torch.equal(everything(ours), everything(twin))


# ---- Hooks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_while_a_hook_is_there_every_hook_fires_on_dense_activations(kind, direction):
    B, F = 50, 200
    x, _, theirs, ours = problem(kind, B, 20, F)
    trainer, seen_by_hooks = trainer_of(ours, B), {}
    shapes = {
        "hook_sae_input": (B, 20),
        "hook_sae_acts_pre": (B, F),
        "hook_sae_acts_post": (B, F),
        "hook_sae_recons": (B, 20),
    }
    for name in shapes:
        ours.add_hook(
            name, lambda t, hook: seen_by_hooks.__setitem__(hook.name, t[0] if isinstance(t, tuple) else t), direction
        )
    with pytest.warns(UserWarning, match="dense activations are materialised and training is slow"), Seen() as seen:
        ours.training_forward_pass(step_input(x)).loss.backward()
    assert not seen.count("sae_fast")
    fired = {name for name in shapes if direction == "fwd" or name != "hook_sae_input"}  # x needs no gradient
    assert fired <= set(seen_by_hooks)
    assert all(seen_by_hooks[name].shape == shapes[name] and not seen_by_hooks[name].is_sparse for name in fired)
    theirs.training_forward_pass(step_input(x)).loss.backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        trainer.step(x)
        ours.reset_hooks()
        with Seen() as seen:
            trainer.step(x)
    assert_on_the_engine(seen)


@pytest.mark.parametrize("name", ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_output",
                                  "hook_sae_recons", "hook_sae_error"])  # fmt: skip
def test_a_hook_anywhere_is_seen_and_named(kind, name):
    ours = new(kind, True)
    assert name in ours.hook_dict
    plain = getattr(ours, name).register_forward_hook(lambda *_: None)
    assert ours.why_dense() == f"a hook is registered on {name}"
    plain.remove()
    before = getattr(ours, name).register_forward_pre_hook(lambda *_: None)
    assert ours.why_dense()
    before.remove()
    with ours.hooks(fwd_hooks=[(name, lambda t, hook: None)]):
        assert ours.why_dense()
    assert ours.why_dense() is None


def test_a_hook_may_change_what_it_sees(kind):
    x, _, theirs, ours = problem(kind, 50, 20, 200)

    def halve(acts, hook):
        return acts / 2

    results = [sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", halve)]) for sae in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0])
    _, cache = ours.run_with_cache(x)
    assert cache["hook_sae_acts_post"].shape == (50, 200)


# ---- What the engine does not cover ---------------------------------------------------------------------------------


def float64_input(sae, x):
    return sae, x.double()


def other_attribute(name: str, value):
    def change(sae, x):
        setattr(sae, name, value)
        return sae, x

    return change


class OwnDecode:
    def decode(self, feature_acts):
        return 2 * super().decode(feature_acts)


class OwnAuxiliaryLoss:
    def calculate_aux_loss(self, **kwargs):
        return {name: 2 * loss for name, loss in super().calculate_aux_loss(**kwargs).items()}


class OwnEncode:
    def encode_with_hidden_pre(self, x):
        acts, pre = super().encode_with_hidden_pre(x)
        return acts * 0.5, pre


FALLBACKS = {
    "bfloat16": (dict(dtype="bfloat16"), None, "bfloat16"),
    "float64": (dict(dtype="float64"), None, "float64"),
    "float64 activations": ({}, float64_input, "float64"),
    "a sequence dimension": ({}, lambda sae, x: (sae, x[None]), "not a batch"),
    "layer_norm": (dict(normalize_activations="layer_norm"), None, "layer_norm"),
    "constant_norm_rescale": (dict(normalize_activations="constant_norm_rescale"), None, "constant_norm_rescale"),
    "lp_norm": (dict(lp_norm=2.0), None, "lp_norm"),
    "pre-activation loss": (dict(pre_act_loss_coefficient=3e-6), None, "pre_act_loss_coefficient"),
    "bandwidth": ({}, other_attribute("bandwidth", -1.0), "bandwidth is -1.0"),
    "Matryoshka's auxiliary loss": (dict(use_matryoshka_aux_loss=True), None, "use_matryoshka_aux_loss"),
    "a negative coefficient": (dict(aux_loss_coefficient=-1.0), None, "aux_loss_coefficient is -1.0"),
    "mse_loss_fn": ({}, other_attribute("mse_loss_fn", lambda a, b: (a - b).abs()), "mse_loss_fn"),
    "activation_fn": ({}, other_attribute("activation_fn", nn.LeakyReLU()), "activation_fn"),
    "norm": ({}, other_attribute("run_time_activation_norm_fn_in", lambda x: 2 * x), "run_time_activation_norm_fn_in"),
    "hook point": ({}, other_attribute("hook_sae_acts_post", nn.Dropout(0.0)), "hook_sae_acts_post is a Dropout"),
    "decode": ({}, OwnDecode, "decode"),
    "calculate_aux_loss": ({}, OwnAuxiliaryLoss, "calculate_aux_loss"),
    "encode_with_hidden_pre": ({}, OwnEncode, "encode_with_hidden_pre"),
}

ONLY = {  # what the other classes of SAELens do not take themselves
    "lp_norm": ("standard",),
    "float64 activations": set(KINDS) - {"gated"},
    "pre-activation loss": ("jumprelu",),
    "bandwidth": ("jumprelu",),
    "Matryoshka's auxiliary loss": ("matryoshka_batchtopk",),
    "a negative coefficient": TOPK,
    **dict.fromkeys(("a sequence dimension", "layer_norm", "constant_norm_rescale"), set(KINDS) - {"matryoshka_batchtopk"}),
}


@pytest.mark.parametrize(
    "kind, case",
    [(k, c) for k in KINDS for c in FALLBACKS if k in ONLY.get(c, KINDS)],
)
def test_what_the_engine_does_not_cover_is_saelens_own_pass_with_the_reason_once(kind, case, caplog):
    config, change, reason = FALLBACKS[case]
    results = []
    for ours in (False, True):
        sae = new(kind, ours, **config)
        if isinstance(change, type):
            sae.__class__ = type(f"{change.__name__}SAE", (change, type(sae)), {})
        x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
        x = x.to(sae.dtype)
        if change is not None and not isinstance(change, type):
            sae, x = change(sae, x)
        with caplog.at_level(logging.WARNING, "sae_fast"), Seen() as seen:
            out = sae.training_forward_pass(step_input(x))
            sae.training_forward_pass(step_input(x))
        assert not seen.count("sae_fast")
        out.loss.backward()
        results.append((out.losses, {n: p.grad for n, p in sae.named_parameters()}, sae.encode(x)))
    said = [r.getMessage() for r in caplog.records if r.name == "sae_fast"]
    assert len(said) == 1 and reason in said[0] and "SAELens' own" in said[0], said
    close = dict(rtol=0.1, atol=0.01) if case == "bfloat16" else {}  # its sums round with W_enc's layout
    for theirs, got in zip(*results, strict=True):
        torch.testing.assert_close(got, theirs, **close)


def test_a_subclass_that_leaves_the_formulas_alone_is_fast(kind):
    ours = new(kind, True)
    ours.__class__ = type("Named", (type(ours),), {"get_name": lambda self: "mine"})
    assert ours.why_dense() is None


# ---- Files ----------------------------------------------------------------------------------------------------------


def trained(kind: str, steps: int = 3, **config):
    x, _, theirs, ours = problem(kind, 64, 20, 100, **config)
    trainer = trainer_of(ours, 64)
    for _ in range(steps):
        trainer.step(x)
    theirs.load_state_dict(ours.state_dict())
    return x, theirs, ours, trainer


def test_an_inference_folder_is_plain_saelens(kind, tmp_path):
    x, theirs, ours, _ = trained(kind)
    ours.save_inference_model(tmp_path / "ours")
    theirs.save_inference_model(tmp_path / "theirs")
    assert (tmp_path / "ours/sae_weights.safetensors").read_bytes() == (
        tmp_path / "theirs/sae_weights.safetensors"
    ).read_bytes()
    configs = [json.loads((tmp_path / who / "cfg.json").read_text()) for who in ("ours", "theirs")]
    for config in configs:
        config["metadata"].pop("training_architecture")
    assert configs[0] == configs[1] and configs[0]["architecture"] == saved_as(kind)
    loaded = SAE.load_from_disk(tmp_path / "ours")
    assert type(loaded) is get_sae_class(saved_as(kind))[0]
    expected = SAE.load_from_disk(tmp_path / "theirs")(x) if kind in BATCH_TOPK else theirs(x)
    torch.testing.assert_close(loaded(x), expected)
    torch.save(x, tmp_path / "x.pt")
    elsewhere = f"""
import sys, torch
from sae_lens import SAE
sae = SAE.load_from_disk({str(tmp_path / "ours")!r})
assert sae.cfg.architecture() == {kind!r}
torch.save(sae(torch.load({str(tmp_path / "x.pt")!r})), {str(tmp_path / "out.pt")!r})
assert not any(name.startswith("sae_fast") for name in sys.modules)
"""
    if kind == "gated":  # once is enough: importing SAELens takes seconds
        # Elsewhere than in the repository, where transformers would take the folder kernels for a package of that name.
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([sys.executable, "-c", elsewhere], check=True, timeout=PATIENCE, cwd=tmp_path, env=alone)
        torch.testing.assert_close(torch.load(tmp_path / "out.pt"), theirs(x).detach())


def test_a_checkpoint_resumes_bit_for_bit(kind, tmp_path):
    x, _, ours, trainer = trained(kind, **warm_up(kind, 20))
    trainer.save_checkpoint("here", tmp_path)
    expected = [trainer.step(x.flip(0)).loss for _ in range(4)]
    for load in ("weights", "class"):
        if load == "weights":
            again = new(kind, True, seed=9, d_in=20, d_sae=100, density=0.05, **warm_up(kind, 20))
            other = trainer_of(again, 64)
            other.load_trainer_state(tmp_path / "here")
            again.load_weights_from_checkpoint(tmp_path / "here")
        else:
            again = TrainingSAE.load_from_disk(tmp_path / "here")
            other = trainer_of(again, 64)
            other.load_trainer_state(tmp_path / "here")
        assert type(again) is type(ours)
        for want in expected:
            with Seen() as seen:
                assert torch.equal(other.step(x.flip(0)).loss, want)
            assert_on_the_engine(seen)
        assert torch.equal(everything(again), everything(ours))
        assert torch.equal(other.act_freq_scores, trainer.act_freq_scores)
        assert again.W_enc.T.is_contiguous()


def test_a_training_checkpoint_loads_for_inference(kind, tmp_path):
    x, theirs, _, trainer = trained(kind)
    trainer.save_checkpoint("here", tmp_path)
    if kind in BATCH_TOPK:
        with pytest.raises(KeyError, match=kind):  # as SAELens has it of its own
            SAE.load_from_disk(tmp_path / "here")
        return
    config = json.loads((tmp_path / "here/cfg.json").read_text())
    assert config["architecture"] == f"sae_fast_{kind}"
    loaded = SAE.load_from_disk(tmp_path / "here")
    assert type(loaded) is get_sae_class(kind)[0]
    torch.testing.assert_close(loaded(x), theirs(x))


def test_folding_and_histograms_are_saelens(kind):
    x, _, theirs, ours = problem(kind, 40, 20, 100, normalize_activations="expected_average_only_in")
    for sae in (theirs, ours):
        sae.fold_activation_norm_scaling_factor(0.7)
        sae.fold_W_dec_norm()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter)
    assert ours.W_enc.T.is_contiguous()
    assert ours.log_histograms().keys() == theirs.log_histograms().keys()
    torch.testing.assert_close(ours.encode(x), theirs.encode(x))


def test_a_parametrized_weight_trains_on_the_engine(kind):
    x, _, theirs, ours = problem(kind, 40, 20, 100)

    class Halved(nn.Module):
        def forward(self, W):
            return W / 2

    for sae in (theirs, ours):
        parametrize.register_parametrization(sae, "W_enc", Halved())
        with Seen() as seen:
            sae.training_forward_pass(step_input(x)).loss.backward()
    assert_on_the_engine(seen)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_weight_that_was_replaced_is_laid_out_again(kind):
    x, _, theirs, ours = problem(kind, 40, 20, 100)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert not ours.W_enc.T.is_contiguous()
    out = ours.training_forward_pass(step_input(x))
    assert ours.W_enc.T.is_contiguous() and ours.W_enc.shape == (20, 100)
    torch.testing.assert_close(out.loss, theirs.training_forward_pass(step_input(x)).loss)
    ours.to(torch.float64)
    assert "float64" in ours.why_dense()
    ours.to(torch.float32)
    assert ours.why_dense() is None
    assert torch.equal(ours.training_forward_pass(step_input(x)).loss, out.loss)


# ---- The runner -----------------------------------------------------------------------------------------------------


def test_the_language_model_runner_trains_our_class(kind, tmp_path):
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=16, n_ctx=16, d_head=8, n_heads=2, d_mlp=32, act_fn="relu", d_vocab=50, device="cpu"
        )
    )
    tokens = torch.randint(0, 50, (128, 16), generator=torch.Generator().manual_seed(1))
    final = []
    for ours in (False, True):
        sae_class, config_class = classes(kind, ours)
        folder = tmp_path / ("ours" if ours else "theirs")
        cfg = LanguageModelSAERunnerConfig(
            sae=config_class(d_in=16, d_sae=64, **KINDS[kind][2](64, 0.1), **warm_up(kind, 5)),
            model_name="tiny", hook_name="blocks.0.hook_resid_post", dataset_path="none", context_size=16,
            is_dataset_tokenized=True, prepend_bos=False, training_tokens=640, train_batch_size_tokens=64,
            n_batches_in_buffer=4, store_batch_size_prompts=4, lr=1e-4, device="cpu", n_checkpoints=1,
            checkpoint_path=str(folder / "checkpoints"), output_path=str(folder / "output"), verbose=False,
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        torch.manual_seed(0)
        runner = LanguageModelSAETrainingRunner(
            cfg, override_model=model, override_dataset=Dataset.from_dict({"tokens": tokens.tolist()})
        )
        assert type(runner.sae) is sae_class
        with Seen() as seen:
            final.append(runner.run())
        assert seen.count("sae_fast.encode") == (10 if ours else 0)
    for name, parameter in final[0].named_parameters():
        torch.testing.assert_close(final[1].get_parameter(name), parameter, rtol=1e-3, atol=1e-5)
    assert list((tmp_path / "ours/checkpoints").rglob("sae_weights.safetensors"))
    loaded = SAE.load_from_disk(tmp_path / "ours/output")
    assert loaded.cfg.architecture() == saved_as(kind)
    if kind not in TOPK:  # they fold the norms
        torch.testing.assert_close(loaded.W_enc, final[1].W_enc, rtol=0, atol=0)


# ---- The benchmark --------------------------------------------------------------------------------------------------


def test_the_benchmark_of_the_loop_runs_and_times_nothing_that_is_wrong(tmp_path):
    from typer.testing import CliRunner

    from benchmarks.peers import saelens_loop

    result = CliRunner().invoke(
        saelens_loop.app, ["--quick", "--kind", "gated", "--kind", "standard", "--out", str(tmp_path / "f")]
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "f").read_text())["results"]
    assert [(r["kind"], r["start"]) for r in found] == list(
        itertools.product(("gated", "standard"), (saelens_loop.OWN, saelens_loop.CALIBRATED))
    )
    assert all(len(r["ratios"]) == 2 and min(r["ratios"]) > 0 for r in found)
    assert found[0]["l0"][0] > 300 > 64 > found[1]["l0"][0], "of 1024: dense, and calibrated to 16"

    task = saelens_loop.synthetic_task(saelens_loop.QUICK, 1, 1)
    theirs = saelens_loop.sae_of(task, "gated", saelens_loop.CALIBRATED)
    ours = saelens_loop.with_our_class(theirs, "gated")
    ours.add_hook("hook_sae_input", lambda t, hook: None)
    with pytest.raises(ValueError, match="not on the engine"):
        saelens_loop.check(theirs, ours, task.batches[0], task.l1)
    ours.reset_hooks()
    ours.b_gate.data += 0.1
    with pytest.raises(ValueError, match=r"(mse|l1)_loss"):
        saelens_loop.check(theirs, ours, task.batches[0], task.l1)


# ---- The module -----------------------------------------------------------------------------------------------------


def test_reloading_registers_the_new_classes(kind):
    name = f"sae_fast_{kind}"
    ours, config = classes(kind, True)
    module = sys.modules[ours.__module__]
    before, registered = dict(vars(module)), [dict(names) for names in REGISTRIES]
    try:
        importlib.reload(module)
        assert get_sae_training_class(name)[0] is getattr(module, ours.__name__) is not ours
        assert get_sae_training_class(kind)[0] is classes(kind, False)[0], "SAELens' own stay"
    finally:
        vars(module).update(before)
        for names, own in zip(REGISTRIES, registered, strict=True):
            names.update(own)
    assert get_sae_training_class(name) == (ours, config)


def test_without_saelens_the_import_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "sae_fast.interop.saelens")
    for name in [name for name in sys.modules if name.partition(".")[0] == "sae_lens"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(MissingExtra, match=r"sae_lens.*pip install 'sae-fast\[saelens\]'"):
        importlib.import_module("sae_fast.interop.saelens")


def test_the_dense_route_of_a_step_is_what_the_tests_above_force(monkeypatch):
    """That `route` reaches this module's two passes."""
    x, _, _, ours = problem("gated", 64, 20, 100)
    for crossover, outers in ((-1.0, 0), (float("inf"), 2)):
        monkeypatch.setitem(crossovers.CROSSOVER, "step", crossover)
        with Seen() as seen:
            ours.training_forward_pass(step_input(x))
        assert min(seen.count("sae_fast.outer"), 2) == outers
