"""sae_fast.interop.dictionary_learning against the package itself: one step, 200 steps, its own trainSAE, its files.

Runs where the package is: the environment that `make test` builds for the peers.
"""

from __future__ import annotations

import copy
import inspect
import json
import signal
import warnings

import pytest
import torch
from helpers import Judge, assert_same_bits
from problems.trajectory import BATCH, D_IN, D_SAE, ROUNDING, superposition
from torch import Tensor

pytest.importorskip("dictionary_learning", reason="the peers are in an environment of their own: make test-peers builds it")

from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder
from dictionary_learning.trainers import gdm, standard
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

import sae_fast as sf
from sae_fast.interop import dictionary_learning as ours

PAIRS = {"gated": (gdm.GatedSAETrainer, ours.GatedSAETrainer), "standard": (standard.StandardTrainer, ours.StandardTrainer)}
pairs = pytest.mark.parametrize("kind", PAIRS)
FIXED = dict(layer=3, lm_name="a-model", device="cpu", warmup_steps=0, sparsity_warmup_steps=None)


def make(cls, d: int = D_IN, F: int = D_SAE, steps: int = 1000, **kwargs):
    arguments = dict(steps=steps, activation_dim=d, dict_size=F, seed=0, lr=3e-3, l1_penalty=2.0)
    return cls(**{**arguments, **FIXED, **kwargs})


def state(trainer) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in trainer.ae.state_dict().items()}


# ---- The same from outside ------------------------------------------------------------------------------------------


@pairs
def test_the_constructor_takes_what_the_packages_takes_and_gives_the_same_weights_config_and_random_numbers(kind):
    theirs_cls, ours_cls = PAIRS[kind]
    for name, parameter in inspect.signature(theirs_cls.__init__).parameters.items():
        if parameter.default is not inspect.Parameter.empty and name not in ("seed", "device"):
            make(ours_cls, **{name: parameter.default} if name not in FIXED else {})
    torch.manual_seed(5)
    theirs, after = make(theirs_cls, seed=None), torch.get_rng_state()
    torch.manual_seed(5)
    mine = make(ours_cls, seed=None)
    assert torch.equal(torch.get_rng_state(), after), "what is drawn next is what it was"
    assert isinstance(mine, theirs_cls) and type(mine.ae) is type(theirs.ae)
    assert list(state(mine)) == list(state(theirs))
    assert_same_bits(list(state(mine).values()), list(state(theirs).values()))
    assert mine.config == theirs.config
    positional = (5000, D_IN, D_SAE, 3, "a-model", type(theirs.ae), 1e-4)
    assert ours_cls(*positional, device="cpu").config == theirs_cls(*positional, device="cpu").config


@pairs
def test_the_signatures_are_the_packages(kind):
    theirs, mine = PAIRS[kind]
    *own, new = inspect.signature(mine).parameters.values()
    assert own == list(inspect.signature(theirs).parameters.values())
    assert (new.name, new.kind, new.default) == ("init_l0", inspect.Parameter.KEYWORD_ONLY, None)
    with pytest.raises(TypeError, match=r"missing .*'steps'"):
        mine()
    for name, function in inspect.getmembers(theirs, inspect.isfunction):
        wanted, got = (inspect.signature(f).parameters.values() for f in (function, getattr(mine, name)))
        if name != "__init__":
            assert [(p.name, p.kind, p.default) for p in got] == [(p.name, p.kind, p.default) for p in wanted], name


@pairs
def test_the_schedules_are_the_packages(kind):
    schedule = dict(steps=60, warmup_steps=7, sparsity_warmup_steps=11, decay_start=40)
    theirs, mine = (make(cls, d=8, F=16, **schedule) for cls in PAIRS[kind])
    for step in range(60):
        x = torch.randn(9, 8, generator=torch.Generator().manual_seed(step))
        assert set(mine.scheduler.get_last_lr()) == set(theirs.scheduler.get_last_lr())
        assert {g["lr"] for g in mine.optimizer.param_groups} == {g["lr"] for g in theirs.optimizer.param_groups}
        for trainer in (theirs, mine):
            trainer.update(step, x)
    assert mine.scheduler.get_last_lr()[0] == 0


def test_the_first_step_of_a_warm_up_changes_nothing_but_rounding():
    mine = make(ours.GatedSAETrainer, warmup_steps=10)
    before = state(mine)
    mine.update(0, torch.randn(64, D_IN))
    for name, after in state(mine).items():
        torch.testing.assert_close(after, before[name], rtol=0, atol=2e-7)


# ---- One step -------------------------------------------------------------------------------------------------------


def wide(trainer, start: dict[str, Tensor]):
    """The package's trainer in float64, from the same weights."""
    trainer.ae.double()
    trainer.ae.load_state_dict({name: t.double() for name, t in start.items()})
    return trainer


@pairs
@pytest.mark.parametrize("size", [(33, 20, 100), (257, 20, 33), (64, 100, 257), (130, 63, 513)], ids=str)
def test_loss_and_gradients_of_one_step_by_the_two_times_rule(kind, size):
    B, d, F = size
    theirs_cls, ours_cls = PAIRS[kind]
    judge = Judge()
    for seed in range(8):
        made = [
            make(cls, d, F, seed=seed, lr=1e-3, l1_penalty=0.3, sparsity_warmup_steps=10) for cls in (theirs_cls, ours_cls)
        ]
        g = torch.Generator().manual_seed(seed)
        start = {name: t + 0.05 * torch.randn(t.shape, generator=g) for name, t in state(made[0]).items()}
        start["gate_bias" if kind == "gated" else "encoder.bias"] -= 0.2 if kind == "standard" else 0.8
        for trainer in made:
            trainer.ae.load_state_dict(start)
        exact = wide(make(theirs_cls, d, F, sparsity_warmup_steps=10, l1_penalty=0.3), start)
        x = torch.randn(B, d, generator=g)
        gradients = []
        for trainer, rows in ((made[1], x), (made[0], x), (exact, x.double())):
            trainer.ae.zero_grad()
            loss = trainer.loss(rows, step=4)
            loss.backward()
            gradients.append({"loss": loss.detach(), **{n: p.grad for n, p in trainer.ae.named_parameters()}})
        for name in gradients[0]:
            judge.add(name, *(g[name] for g in gradients))
    judge.verdict()


@pairs
def test_the_update_of_one_step_by_the_two_times_rule(kind):
    theirs_cls, ours_cls = PAIRS[kind]
    judge = Judge()
    for seed in range(12):
        theirs, mine = (make(cls, seed=seed, lr=1e-3) for cls in (theirs_cls, ours_cls))
        exact = wide(make(theirs_cls, seed=seed, lr=1e-3), state(theirs))
        x = superposition(128, active=4, seed=seed)[0]
        for trainer, rows in ((theirs, x), (mine, x), (exact, x.double())):
            trainer.update(0, rows)
        for name, value in state(mine).items():
            judge.add(name, value, state(theirs)[name], state(exact)[name])
    judge.verdict()


@pairs
def test_the_log_of_a_step_is_the_packages(kind):
    theirs, mine = (make(cls) for cls in PAIRS[kind])
    x = superposition(128, active=4, seed=1)[0]
    wanted, got = (trainer.loss(x, step=3, logging=True) for trainer in (theirs, mine))
    assert got._fields == wanted._fields and set(got.losses) == set(wanted.losses)
    assert all(isinstance(value, float) for value in got.losses.values())
    for name, value in wanted.losses.items():
        assert got.losses[name] == pytest.approx(value, rel=1e-5), name
    torch.testing.assert_close(got.f, wanted.f.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.x_hat, wanted.x_hat.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(got.x, x)


# ---- 200 steps ------------------------------------------------------------------------------------------------------


def run(trainer, batches: list[Tensor], permutation: int | None = None) -> Tensor:
    """[steps, parameters] of a run, the rows of each batch permuted."""
    g = None if permutation is None else torch.Generator().manual_seed(permutation)
    states = []
    for step, x in enumerate(batches):
        trainer.update(step, x if g is None else x[torch.randperm(len(x), generator=g)])
        states.append(torch.cat([t.flatten() for t in state(trainer).values()]))
    return torch.stack(states).double()


@pairs
def test_two_hundred_updates_stay_within_the_spread_of_the_permuted_package(kind):
    torch.set_num_threads(1)
    theirs_cls, ours_cls = PAIRS[kind]
    batches = superposition(128, active=4, seed=0)[:200]
    arguments = dict(lr=5e-3, l1_penalty=8.0 if kind == "gated" else 2.0, warmup_steps=10, sparsity_warmup_steps=20)
    plain = run(make(theirs_cls, **arguments), batches)
    scale = plain.norm(dim=1)
    spread = [(run(make(theirs_cls, **arguments), batches, seed) - plain).norm(dim=1) / scale for seed in range(8)]
    allowed = 2 * torch.stack(spread).amax(0) + 2 * ROUNDING["parameters"]  # where permuted runs agree, both still round
    mine = make(ours_cls, **arguments)
    deviation = (run(mine, batches) - plain).norm(dim=1) / scale
    worst = int((deviation / allowed).argmax())
    assert (deviation <= allowed).all(), f"step {worst}: {deviation[worst]:.2e}, allowed {allowed[worst]:.2e}"
    moved = (plain[-1] - plain[0]).norm() / scale[-1]
    assert moved > 0.1, "it trains"
    assert allowed.max() < moved / 10, "the spread is too wide to tell anything"
    assert mine.engine.trainer.step_count == 200, "the engine took the steps"


# ---- The package's own loop -----------------------------------------------------------------------------------------


def config(cls, **more):
    arguments = dict(activation_dim=D_IN, dict_size=D_SAE, seed=0, lr=3e-3, l1_penalty=2.0, steps=60)
    schedule = dict(warmup_steps=5, sparsity_warmup_steps=10, layer=3, lm_name="a-model", device="cpu")
    return {"trainer": cls, **arguments, **schedule, **more}


@pairs
@pytest.mark.parametrize("normalize", [False, True], ids=["as they are", "normalised"])
def test_it_runs_in_trainSAE_and_leaves_the_packages_files(kind, normalize, tmp_path, capsys):
    batches = superposition(128, active=4, seed=0)
    for name, cls in zip(("theirs", "ours"), PAIRS[kind], strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainSAE(
                [x * 3 for x in batches], [config(cls), config(cls, lr=1e-3)], steps=60, save_dir=str(tmp_path / name),
                save_steps=[20, 40], log_steps=30, verbose=True, device="cpu", normalize_activations=normalize,
            )  # fmt: skip
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Step")]
    assert len(printed) == 8 and all("frac_variance_explained" in line for line in printed)
    files = {
        name: sorted(str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*.*"))
        for name in ("theirs", "ours")
    }
    assert files["ours"] == files["theirs"] and len(files["ours"]) == 8
    for i in range(2):
        configs = [json.loads((tmp_path / name / f"trainer_{i}" / "config.json").read_text()) for name in files]
        assert configs[0] == configs[1]
        (a, _), (b, _) = (load_dictionary(str(tmp_path / name / f"trainer_{i}"), "cpu") for name in files)
        for (name, wanted), got in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert (got - wanted).norm() <= 2e-3 * max(1.0, wanted.norm()), name
        x = batches[-1] * 3
        torch.testing.assert_close(b(x), a(x), rtol=0.05, atol=0.05)
        loaded = sf.load(tmp_path / "ours" / f"trainer_{i}")
        torch.testing.assert_close(loaded(x), b(x).detach(), rtol=1e-4, atol=1e-4)
    early = [torch.load(tmp_path / name / "trainer_0/checkpoints/ae_20.pt") for name in files]
    for name, wanted in early[0].items():
        assert (early[1][name] - wanted).norm() <= 1e-3 * max(1.0, wanted.norm()), name


def test_calibration_starts_sparse():
    mine = make(ours.GatedSAETrainer, init_l0=8)
    x = superposition(128, active=4, seed=0)[0]
    assert (mine.loss(x, 0, logging=True).f != 0).float().sum(-1).mean() > 60
    mine.update(0, x)
    assert (mine.loss(x, 0, logging=True).f != 0).float().sum(-1).mean() < 16


# ---- Resampling -----------------------------------------------------------------------------------------------------


def test_dead_neurons_are_counted_and_resampled_as_in_the_package(capsys):
    arguments = dict(resample_steps=10, l1_penalty=0.5, lr=1e-3, warmup_steps=5)
    theirs, mine = (make(cls, **arguments) for cls in PAIRS["standard"])
    for trainer in (theirs, mine):
        trainer.ae.encoder.bias.data[::3] = -50.0  # dead
    for step, x in enumerate(superposition(128, active=4, seed=3)[:25]):
        x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(step))  # no example is 0
        for trainer in (theirs, mine):
            torch.manual_seed(step)
            trainer.update(step, x)
        assert torch.equal(mine.steps_since_active, theirs.steps_since_active), step
        for name, value in state(theirs).items():
            assert (state(mine)[name] - value).norm() <= 1e-3 * value.norm(), (step, name)
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= 2 and said[0] == said[1] and said[0].startswith("resampling 8")
    moments = {tuple(v["exp_avg"].shape): v["exp_avg"] for v in theirs.optimizer.state.values()}
    ours_moment = mine.optimizer.state[mine.engine.sae.W_dec]["exp_avg"]
    torch.testing.assert_close(ours_moment, moments[(D_IN, D_SAE)].T, rtol=1e-3, atol=1e-6)


def test_resampling_takes_activations_in_sixteen_bits(capsys):
    mine = make(ours.StandardTrainer, resample_steps=10, lr=1e-3, warmup_steps=5)
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(0))
    mine.update(0, x.bfloat16())
    deads = torch.arange(D_SAE) < 7
    mine.resample_neurons(deads, x.bfloat16())
    assert "resampling 7 neurons" in capsys.readouterr().out
    torch.testing.assert_close(mine.ae.decoder.weight[:, :7].norm(dim=0), torch.ones(7))


def test_no_resampling_without_dead_neurons_or_when_all_examples_are_fewer(capsys):
    mine = make(ours.StandardTrainer, resample_steps=10, lr=1e-3, warmup_steps=5)
    mine.resample_neurons(torch.zeros(D_SAE, dtype=torch.bool), torch.randn(5, D_IN))
    assert capsys.readouterr().out == ""
    mine.update(0, torch.randn(5, D_IN))
    before = state(mine)
    deads = torch.zeros(D_SAE, dtype=torch.bool)
    deads[:20] = True
    mine.resample_neurons(deads, torch.randn(5, D_IN))
    changed = (state(mine)["encoder.weight"] != before["encoder.weight"]).any(1)
    assert changed.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4], "as many as there are examples"


# ---- The dictionary is the memory that is trained -------------------------------------------------------------------


@pairs
def test_what_is_done_to_the_dictionary_is_done_to_what_is_trained(kind):
    theirs, mine = (make(cls) for cls in PAIRS[kind])
    batches = superposition(128, active=4, seed=2)
    changes = [
        lambda ae: ae.scale_biases(1.5),
        lambda ae: ae.load_state_dict({n: t * 1.01 for n, t in ae.state_dict().items()}),
        lambda ae: setattr(ae.decoder.weight, "data", (ae.decoder.weight.data * 0.99).contiguous()),
        torch.no_grad()(lambda ae: ae.encoder.weight.mul_(1.03)),
        lambda ae: ae.to(torch.float64).to(torch.float32),
    ]
    for step, change in enumerate(changes):
        for trainer in (theirs, mine):
            trainer.update(step, batches[step])
            change(trainer.ae)
    for trainer in (theirs, mine):
        for step in range(20):
            trainer.update(step, batches[10 + step])
    for name, value in state(theirs).items():
        assert (state(mine)[name] - value).norm() <= 5e-3 * value.norm(), name  # 2e-3 without any of the changes


def test_a_copy_trains_by_itself():
    mine = make(ours.GatedSAETrainer)
    batches = superposition(128, active=4, seed=2)
    mine.update(0, batches[0])
    other = copy.deepcopy(mine)
    before = state(mine)
    other.update(1, batches[1])
    assert_same_bits(list(before.values()), list(state(mine).values()))
    mine.update(1, batches[1])
    assert_same_bits(list(state(other).values()), list(state(mine).values()))


class Other(GatedAutoEncoder):
    def encode(self, x, **kwargs):
        return super().encode(x * 2, **kwargs)


class Same(GatedAutoEncoder):
    pass


def test_a_dictionary_of_another_kind_is_refused_by_name():
    with pytest.raises(ValueError, match=r"dict_class: got .*AutoEncoder.*want GatedAutoEncoder"):
        make(ours.GatedSAETrainer, dict_class=AutoEncoder)
    with pytest.raises(ValueError, match=r"dict_class: Other has its own encode, want GatedAutoEncoder's"):
        make(ours.GatedSAETrainer, dict_class=Other)
    with pytest.raises(ValueError, match=r"dict_class: got .*want AutoEncoder"):
        make(ours.StandardTrainer, dict_class=GatedAutoEncoder)
    assert type(make(ours.GatedSAETrainer, dict_class=Same).ae) is Same


def test_bad_batches_are_named_with_their_step():
    mine = make(ours.GatedSAETrainer)
    mine.update(0, torch.randn(8, D_IN))
    before = state(mine)
    bad = torch.randn(8, D_IN)
    bad[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"step 1: x: got nan at index \(3, 4\)"):
        mine.update(1, bad)
    with pytest.raises(ValueError, match=r"step 1: x: got shape \(8, 5\)"):
        mine.update(1, torch.randn(8, 5))
    assert_same_bits(list(before.values()), list(state(mine).values()))
    assert BATCH > 8


# ---- Frozen, interrupted ---------------------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("at", ["decoder.weight", "encoder.weight", "encoder.bias", "decoder_bias", "r_mag"])
def test_a_frozen_parameter_of_the_dictionary_keeps_its_bits(kind, at):
    mine = make(PAIRS[kind][1], warmup_steps=5, **dict(resample_steps=10) if kind == "standard" else {})
    frozen = dict(mine.ae.named_parameters()).get(at)
    if frozen is None:
        at = {"encoder.bias": "gate_bias", "decoder_bias": "bias", "r_mag": "encoder.bias"}[at]
        frozen = mine.ae.get_parameter(at)
    batches = superposition(128, active=4, seed=2)
    for step in range(14):
        if step == 2:
            frozen.requires_grad_(False)
            before = state(mine)
        if step == 12:
            frozen.requires_grad_(True)
            assert_same_bits(before[at], state(mine)[at])
            assert all((t != state(mine)[name]).any() for name, t in before.items() if name != at)
        if step == 9 and kind == "standard":
            mine.steps_since_active[:5] = 100
        mine.update(step, batches[step])
    assert (before[at] != state(mine)[at]).any(), "and goes on when it is thawed"


@pairs
def test_an_interrupt_waits_for_the_end_of_an_update(kind, monkeypatch):
    mine, twin = (make(PAIRS[kind][1]) for _ in range(2))
    batches = superposition(128, active=4, seed=2)
    for step, x in enumerate(batches[:4]):
        twin.update(step, x)
        taken = mine.engine.trainer.step

        def interrupted(*args, taken=taken, **kwargs):
            signal.raise_signal(signal.SIGINT)
            return taken(*args, **kwargs)

        monkeypatch.setattr(mine.engine.trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mine.update(step, x)
        monkeypatch.undo()
        assert mine.scheduler.get_last_lr() == twin.scheduler.get_last_lr()
        assert_same_bits(list(state(mine).values()), list(state(twin).values()))
