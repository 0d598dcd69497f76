"""sae_fast.interop.dictionary_learning against the package itself: one step, 200 steps, its own trainSAE, its files.

Runs where the package is: the environment that `make test` builds for the peers.
"""

from __future__ import annotations

import copy
import inspect
import json
import signal
import sys
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import Judge, assert_same_bits
from problems.trajectory import BATCH, D_IN, D_SAE, ROUNDING, superposition
from torch import Tensor

pytest.importorskip("dictionary_learning", reason="the peers are in an environment of their own: make test-peers builds it")

from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder
from dictionary_learning.trainers import batch_top_k, gated_anneal, gdm, jumprelu, p_anneal, standard, top_k
from dictionary_learning.trainers import matryoshka_batch_top_k as matryoshka
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

import sae_fast as sf
from sae_fast.interop import dictionary_learning as ours

THEIRS = {
    "gated": gdm.GatedSAETrainer, "standard": standard.StandardTrainer, "april": standard.StandardTrainerAprilUpdate,
    "topk": top_k.TopKTrainer, "batchtopk": batch_top_k.BatchTopKTrainer,
    "matryoshka": matryoshka.MatryoshkaBatchTopKTrainer, "jumprelu": jumprelu.JumpReluTrainer,
    "p_anneal": p_anneal.PAnnealTrainer, "gated_anneal": gated_anneal.GatedAnnealTrainer,
}  # fmt: skip
PAIRS = {kind: (theirs, getattr(ours, theirs.__name__)) for kind, theirs in THEIRS.items()}
LARGEST = ("topk", "batchtopk", "matryoshka")
kinds = pytest.mark.parametrize("kind", PAIRS)
pairs = pytest.mark.parametrize("kind", ("gated", "standard"))
largest = pytest.mark.parametrize("kind", LARGEST)
FIXED = dict(layer=3, lm_name="a-model", device="cpu", warmup_steps=0)
ANNEAL = dict(anneal_start=165, anneal_end=195, n_sparsity_updates=3, p_end=0.7, initial_sparsity_penalty=2.0)
OWN = {  # arguments that the others lack
    "gated": dict(l1_penalty=2.0), "standard": dict(l1_penalty=2.0), "april": dict(l1_penalty=2.0),
    "topk": dict(k=8), "batchtopk": dict(k=8), "matryoshka": dict(k=8, group_fractions=[0.25, 0.25, 0.5]),
    "jumprelu": dict(bandwidth=0.1, target_l0=8.0), "p_anneal": ANNEAL, "gated_anneal": ANNEAL,
}  # fmt: skip
BIAS = {kind: "encoder.bias" for kind in PAIRS} | {
    "gated": "gate_bias", "gated_anneal": "gate_bias", "matryoshka": "b_enc", "jumprelu": "b_enc"
}  # fmt: skip
KIND = {cls: kind for kind, pair in PAIRS.items() for cls in pair}


def make(cls, d: int = D_IN, F: int = D_SAE, steps: int = 1000, **kwargs):
    own = OWN[KIND[cls]]
    if "sparsity_warmup_steps" in inspect.signature(cls).parameters:
        own = {**own, "sparsity_warmup_steps": None}
    arguments = {**dict(steps=steps, activation_dim=d, dict_size=F, seed=0, lr=3e-3), **FIXED, **own, **kwargs}
    if KIND[cls] == "jumprelu" and arguments["seed"] is not None:
        torch.manual_seed(arguments["seed"])  # its class does not
    return cls(**arguments)


def made(kind: str, **kwargs) -> list:
    """The package's trainer and ours."""
    return [make(cls, **kwargs) for cls in PAIRS[kind]]


def warmed(kind: str, steps: int) -> dict[str, int]:
    return {} if kind in LARGEST else {"sparsity_warmup_steps": steps}


def dying(kind: str, *trainers, by: float = 0.3, every: int = 4, after: int = 300) -> None:
    """Has some features that rarely fire and count as dead, so that AuxK has work."""
    for trainer in trainers:
        trainer.ae.get_parameter(BIAS[kind]).data[::every] -= by
        trainer.dead_feature_threshold = after
        trainer.num_tokens_since_fired[::every] = after


def state(trainer) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in trainer.ae.state_dict().items()}


def weights(trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.ae.named_parameters()}


# ---- The same from outside ------------------------------------------------------------------------------------------


@kinds
def test_the_constructor_takes_what_the_packages_takes_and_gives_the_same_weights_config_and_random_numbers(kind):
    theirs_cls, ours_cls = PAIRS[kind]
    for name, parameter in inspect.signature(theirs_cls.__init__).parameters.items():
        if parameter.default is not inspect.Parameter.empty and name not in ("seed", "device"):
            make(ours_cls, **{"steps": 5000, name: parameter.default})
    torch.manual_seed(5)
    theirs, after = make(theirs_cls, seed=None), torch.get_rng_state()
    torch.manual_seed(5)
    mine = make(ours_cls, seed=None)
    assert torch.equal(torch.get_rng_state(), after), "what is drawn next is what it was"
    assert isinstance(mine, theirs_cls) and type(mine.ae) is type(theirs.ae)
    assert list(state(mine)) == list(state(theirs))
    assert_same_bits(list(state(mine).values()), list(state(theirs).values()))
    assert mine.config == theirs.config
    names = list(inspect.signature(theirs_cls).parameters)
    given = dict(steps=5000, activation_dim=D_IN, dict_size=D_SAE, dict_class=type(theirs.ae), group_weights=None)
    given |= FIXED | OWN[kind]
    positional = [given[name] for name in names[: names.index("dict_class") + 1]]
    assert ours_cls(*positional, device="cpu").config == theirs_cls(*positional, device="cpu").config


@kinds
def test_the_signatures_are_the_packages(kind):
    theirs, mine = PAIRS[kind]
    own = list(inspect.signature(mine).parameters.values())
    if kind not in LARGEST:  # which have nothing to calibrate
        new = own.pop()
        assert (new.name, new.kind, new.default) == ("init_l0", inspect.Parameter.KEYWORD_ONLY, None)
    assert own == list(inspect.signature(theirs).parameters.values())
    with pytest.raises(TypeError, match=r"missing .*'steps'"):
        mine()
    for name, function in inspect.getmembers(theirs, inspect.isfunction):
        wanted, got = (inspect.signature(f).parameters.values() for f in (function, getattr(mine, name)))
        if name != "__init__":
            assert [(p.name, p.kind, p.default) for p in got] == [(p.name, p.kind, p.default) for p in wanted], name


@kinds
def test_the_schedules_are_the_packages(kind):
    theirs, mine = made(kind, d=8, F=16, steps=60, warmup_steps=7, decay_start=40, **warmed(kind, 11))
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
    trainer.ae.load_state_dict(start)
    return trainer


def without_parallel(W: Tensor, grad: Tensor, *_) -> Tensor:
    """The package's projection of a gradient, without the 1e-6 that it adds to the norms of W's columns, which leaves 2e-6
    of what it is to remove: where an element of the gradient is as small, Adam's first step is another."""
    unit = W / W.norm(dim=0, keepdim=True)
    return grad.sub_((grad * unit).sum(0) * unit)


@contextmanager
def wide_throughout():
    """In the block the package's ``.float()`` rounds nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda t: t if t.is_floating_point() else t.double())
        yield


START = {"gated": -0.8, "standard": -0.2, "april": -0.2, "p_anneal": -0.2, "gated_anneal": -0.8, "jumprelu": -0.5}


@kinds
@pytest.mark.parametrize("size", [(33, 20, 100), (257, 20, 33), (64, 100, 257), (130, 63, 513)], ids=str)
def test_loss_and_gradients_of_one_step_by_the_two_times_rule(kind, size):
    B, d, F = size
    judge = Judge()
    arguments = dict(d=d, F=F, lr=1e-3, **warmed(kind, 10), **(dict(k=4) if kind in LARGEST else {}))
    arguments |= dict(l1_penalty=0.3) if "l1_penalty" in OWN[kind] else {}
    for seed in range(8):
        theirs, mine = made(kind, seed=seed, **arguments)
        g = torch.Generator().manual_seed(seed)
        noise = {name: 0.05 * torch.randn(t.shape, generator=g) for name, t in weights(theirs).items()}
        start = state(theirs) | {name: t + noise[name] for name, t in weights(theirs).items()}
        start[BIAS[kind]] += START.get(kind, 0)
        for trainer in (theirs, mine):
            trainer.ae.load_state_dict(start)
        exact = wide(make(PAIRS[kind][0], seed=seed, **arguments), start)
        if kind in LARGEST:
            dying(kind, theirs, mine, exact, by=3.0 if F < 100 else 2.0)
        if kind in ("p_anneal", "gated_anneal"):
            for trainer in (theirs, mine, exact):
                trainer.p = 0.6
        x = torch.randn(B, d, generator=g)
        gradients = []
        for trainer, rows in ((mine, x), (theirs, x), (exact, x.double())):
            trainer.ae.zero_grad()
            with wide_throughout() if trainer is exact else nullcontext():
                loss = trainer.loss(rows, step=4)
                loss.backward()
            gradients.append({"loss": loss.detach(), **{n: p.grad for n, p in trainer.ae.named_parameters()}})
        for name in gradients[0]:
            judge.add(name, *(g[name] for g in gradients))
        if kind in LARGEST:
            assert mine.dead_features == theirs.dead_features > 0 and mine.pre_norm_auxk_loss > 0
    judge.verdict()


@kinds
def test_the_update_of_one_step_by_the_two_times_rule(kind, monkeypatch):
    judge, module = Judge(), sys.modules[PAIRS[kind][0].__module__]
    if kind in (*LARGEST, "jumprelu"):
        monkeypatch.setattr(module, "remove_gradient_parallel_to_decoder_directions", torch.no_grad()(without_parallel))
    for seed in range(12):
        theirs, mine = made(kind, seed=seed, lr=1e-3)
        exact = wide(make(PAIRS[kind][0], seed=seed, lr=1e-3), state(theirs))
        if kind in LARGEST:
            dying(kind, theirs, mine, exact)
        x = superposition(128, active=4, seed=seed)[0]
        losses = []
        for trainer, rows in ((mine, x), (theirs, x), (exact, x.double())):
            with wide_throughout() if trainer is exact else nullcontext():
                losses.append(trainer.update(0, rows))
        assert len({type(loss) for loss in losses}) == 1
        if losses[0] is not None:
            judge.add("loss", *(torch.tensor([loss], dtype=torch.float64) for loss in losses))
        for name, value in weights(mine).items():
            judge.add(name, value, weights(theirs)[name], weights(exact)[name])
    judge.verdict()


@kinds
def test_the_log_of_a_step_is_the_packages(kind):
    theirs, mine = made(kind)
    x = superposition(128, active=4, seed=1)[0]
    x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))  # k positive activations in each row
    if kind in LARGEST:
        dying(kind, theirs, mine)
    wanted, got = (trainer.loss(x, step=3, logging=True) for trainer in (theirs, mine))
    assert getattr(got, "_fields", len(got)) == getattr(wanted, "_fields", len(wanted))
    (x_got, x_hat, f, losses), (_, x_hat_wanted, f_wanted, losses_wanted) = got, wanted
    assert set(losses) == set(losses_wanted)
    for name, value in losses_wanted.items():
        assert type(losses[name]) is type(value), name
        assert losses[name] == (value if value is None else pytest.approx(value, rel=1e-5)), name
    torch.testing.assert_close(f, f_wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat, x_hat_wanted.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(x_got, x)


@kinds
def test_a_loss_of_an_x_that_asks_for_its_gradient_is_the_packages_own(kind):
    theirs, mine = made(kind)
    found = []
    for trainer in (theirs, mine):
        x = superposition(128, active=4, seed=1)[0].requires_grad_()
        trainer.loss(x, step=3).backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])


def test_a_loss_has_no_second_derivative_and_notices_what_has_changed():
    mine = make(ours.TopKTrainer)
    x = superposition(128, active=4, seed=1)[0]
    loss = mine.loss(x, step=3)
    (gradient,) = torch.autograd.grad(3 * loss, [mine.ae.b_dec], create_graph=True, retain_graph=True)
    torch.testing.assert_close(gradient, 3 * torch.autograd.grad(loss, [mine.ae.b_dec], retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()
    with torch.no_grad():
        mine.ae.b_dec.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- 200 steps ------------------------------------------------------------------------------------------------------


def run(trainer, batches: list[Tensor], permutation: int | None = None) -> Tensor:
    """[steps, parameters] of a run, the rows of each batch permuted."""
    g = None if permutation is None else torch.Generator().manual_seed(permutation)
    states = []
    for step, x in enumerate(batches):
        trainer.update(step, x if g is None else x[torch.randperm(len(x), generator=g)])
        states.append(torch.cat([t.flatten() for t in weights(trainer).values()]))
    return torch.stack(states).double()


LR = {"jumprelu": 1e-3, "gated_anneal": 1e-3, **dict.fromkeys(LARGEST, 3e-3)}


@kinds
def test_two_hundred_updates_stay_within_the_spread_of_the_permuted_package(kind):
    torch.set_num_threads(1)
    theirs_cls, ours_cls = PAIRS[kind]
    batches = superposition(128, active=4, seed=0)[:200]
    arguments = dict(lr=LR.get(kind, 5e-3), warmup_steps=10, **warmed(kind, 20))
    arguments |= dict(l1_penalty=8.0) if kind == "gated" else {}

    def start(cls):
        trainer = make(cls, **arguments)
        if kind in LARGEST:
            dying(kind, trainer)
        return trainer

    plain = run(theirs := start(theirs_cls), batches)
    scale = plain.norm(dim=1)
    spread = [(run(start(theirs_cls), batches, seed) - plain).norm(dim=1) / scale for seed in range(8)]
    allowed = 2 * torch.stack(spread).amax(0) + 2 * ROUNDING["parameters"]  # where permuted runs agree, both still round
    if kind in (*LARGEST, "jumprelu"):
        allowed += 2.0**-23  # the package adds that to the norms by which it divides the decoder's rows
    mine = start(ours_cls)
    deviation = (run(mine, batches) - plain).norm(dim=1) / scale
    worst = int((deviation / allowed).argmax())
    assert (deviation <= allowed).all(), f"step {worst}: {deviation[worst]:.2e}, allowed {allowed[worst]:.2e}"
    moved = (plain[-1] - plain[0]).norm() / scale[-1]
    assert moved > 0.1, "it trains"
    assert allowed.max() < moved / 10, "the spread is too wide to tell anything"
    assert mine.engine.trainer.step_count == 200, "the engine took the steps"
    if kind in ("p_anneal", "gated_anneal"):
        assert mine.p == theirs.p < 0.9 and mine.sparsity_coeff == pytest.approx(theirs.sparsity_coeff, rel=1e-3)


# ---- The package's own loop -----------------------------------------------------------------------------------------


def config(cls, **more):
    arguments = dict(activation_dim=D_IN, dict_size=D_SAE, seed=0, lr=3e-3, steps=60) | OWN[KIND[cls]]
    arguments |= dict(threshold_start_step=10) if KIND[cls] in LARGEST else {}
    return {"trainer": cls, **arguments, **FIXED, "warmup_steps": 5, **warmed(KIND[cls], 10), **more}


@kinds
@pytest.mark.parametrize("normalize", [False, True], ids=["as they are", "normalised"])
def test_it_runs_in_trainSAE_and_leaves_the_packages_files(kind, normalize, tmp_path, capsys):
    batches = superposition(128, active=4, seed=0)
    for name, cls in zip(("theirs", "ours"), PAIRS[kind], strict=True):
        torch.manual_seed(0)  # JumpReluTrainer takes no notice of its seed
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
            assert (got - wanted).double().norm() <= 2e-3 * max(1.0, wanted.double().norm()), name
        x = batches[-1] * 3
        torch.testing.assert_close(b(x), a(x), rtol=0.05, atol=0.05)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*norms are not 1")  # of April's
            loaded = sf.load(tmp_path / "ours" / f"trainer_{i}")
        torch.testing.assert_close(loaded(x), b(x).detach(), rtol=1e-4, atol=1e-4)
    early = [torch.load(tmp_path / name / "trainer_0/checkpoints/ae_20.pt") for name in files]
    for name, wanted in early[0].items():
        assert (early[1][name] - wanted).double().norm() <= 1e-3 * max(1.0, wanted.double().norm()), name


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


@kinds
def test_what_is_done_to_the_dictionary_is_done_to_what_is_trained(kind):
    theirs, mine = made(kind)
    batches = superposition(128, active=4, seed=2)
    encoder, decoder = ("W_enc", "W_dec") if kind in ("matryoshka", "jumprelu") else ("encoder.weight", "decoder.weight")
    changes = [
        lambda ae: ae.scale_biases(1.5),
        lambda ae: ae.load_state_dict({n: t * 1.01 if t.is_floating_point() else t for n, t in ae.state_dict().items()}),
        lambda ae: setattr(p := ae.get_parameter(decoder), "data", (p.data * 0.99).contiguous()),
        torch.no_grad()(lambda ae: ae.get_parameter(encoder).mul_(1.03)),
        lambda ae: ae.to(torch.float64).to(torch.float32),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the engine notices
        for step, change in enumerate(changes):
            for trainer in (theirs, mine):
                trainer.update(step, batches[step])
                change(trainer.ae)
        for trainer in (theirs, mine):
            for step in range(20):
                trainer.update(len(changes) + step, batches[10 + step])
    for name, value in weights(theirs).items():
        assert (weights(mine)[name] - value).norm() <= 5e-3 * value.norm(), name  # 2e-3 without any of the changes


@kinds
def test_a_copy_trains_by_itself(kind):
    mine = make(PAIRS[kind][1])
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
    for kind in ("standard", "april", "p_anneal"):
        with pytest.raises(ValueError, match=r"dict_class: got .*want AutoEncoder"):
            make(PAIRS[kind][1], dict_class=GatedAutoEncoder)
    with pytest.raises(ValueError, match=r"dict_class: got .*want BatchTopKSAE, the class that BatchTopKTrainer trains"):
        make(ours.BatchTopKTrainer, dict_class=top_k.AutoEncoderTopK)
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


@kinds
@pytest.mark.parametrize("at", ["encoder", "bias"])
def test_what_is_frozen_in_any_dictionary_keeps_its_bits(kind, at):
    mine = make(PAIRS[kind][1], warmup_steps=2)
    encoder = "W_enc" if kind in ("matryoshka", "jumprelu") else "encoder.weight"
    name = {"encoder": encoder, "bias": BIAS[kind]}[at]
    mine.ae.get_parameter(name).requires_grad_(False)
    before = weights(mine)
    for step, x in enumerate(superposition(128, active=4, seed=2)[:6]):
        mine.update(step, x)
    after = weights(mine)
    assert_same_bits(before[name], after[name])
    assert all((after[other] != t).any() for other, t in before.items() if other not in (name, "threshold"))


@kinds
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


# ---- Thresholds, dead features, schedules of their own --------------------------------------------------------------


def together(kind: str, theirs, mine, steps: int, log_every: int = 7) -> None:
    """Steps of both in float64, and evaluations between them, after each of which all that they count is the same."""
    for trainer in (theirs, mine):
        trainer.ae.double()
    for step, x in enumerate(superposition(128, active=4, seed=3)[:steps]):
        x = x.double() + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        for trainer in (theirs, mine):
            with wide_throughout():
                trainer.update(step, x)
                if step % log_every == 0:
                    trainer.loss(x, step=step, logging=True)
        for counted in ("num_tokens_since_fired", "steps_since_active"):
            if getattr(theirs, counted, None) is not None:
                assert torch.equal(getattr(mine, counted), getattr(theirs, counted)), step
        wanted, got = theirs.get_logging_parameters(), mine.get_logging_parameters()
        for name, value in wanted.items():
            value, found = (v.item() if isinstance(v, Tensor) else v for v in (value, got[name]))
            assert found == (value if value is None else pytest.approx(value, rel=1e-5)), (step, name)
        for name, value in state(theirs).items():
            assert (state(mine)[name] - value).double().norm() <= 1e-6 * max(value.double().norm(), 1), (step, name)


@largest
def test_thresholds_dead_counts_and_auxk_are_the_packages(kind):
    theirs, mine = made(kind, threshold_start_step=10, warmup_steps=5)
    dying(kind, theirs, mine)
    revived = mine.num_tokens_since_fired.clone()
    together(kind, theirs, mine, steps=60)
    assert mine.ae.threshold > 0 and mine.dead_features >= 0
    assert (mine.num_tokens_since_fired[revived > 0] < 300).any(), "AuxK revives"


@largest
def test_settings_that_change_on_the_way_hold_from_the_next_step_on(kind):
    theirs, mine = made(kind)
    dying(kind, theirs, mine)
    together(kind, theirs, mine, steps=3)
    for trainer in (theirs, mine):
        trainer.auxk_alpha, trainer.top_k_aux, trainer.dead_feature_threshold = 0.2, 5, 100
        trainer.ae.k.fill_(5)
        if kind == "matryoshka":
            trainer.ae.active_groups = 2
            trainer.group_weights = [0.2, 0.5, 0.3]
    together(kind, theirs, mine, steps=5)


def test_without_auxk_nothing_is_revived():
    theirs, mine = made("topk", auxk_alpha=0)
    dying("topk", theirs, mine)
    with torch.no_grad():
        for step, x in enumerate(superposition(128, active=4, seed=3)[:4]):
            with torch.enable_grad():
                losses = [trainer.update(step, x) for trainer in (theirs, mine)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert theirs.get_logging_parameters() == mine.get_logging_parameters()
    assert mine.dead_features == -1 and torch.equal(mine.num_tokens_since_fired, theirs.num_tokens_since_fired)


@largest
def test_a_first_step_that_fails_leaves_b_dec_as_it_was(kind):
    mine = make(PAIRS[kind][1])
    before = state(mine)
    bad = torch.randn(8, D_IN)
    bad[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"step 0: x: got nan at index \(3, 4\)"):
        mine.update(0, bad)
    with pytest.raises((ValueError, FloatingPointError)):
        mine.update(0, torch.ones(8, D_IN))  # whose geometric median is 0/0
    assert_same_bits(list(before.values()), list(state(mine).values()))
    mine.update(0, torch.randn(8, D_IN))
    assert mine.engine.trainer.step_count == 1


def test_thresholds_of_jumprelu_may_be_negative():
    theirs, mine = made("jumprelu", lr=3e-3)
    for trainer in (theirs, mine):
        trainer.ae.threshold.data[::3] = -0.4
        trainer.dead_feature_threshold = 200
        trainer.ae.b_enc.data[::5] = -50.0
    x = superposition(128, active=4, seed=1)[0]
    assert (mine.loss(x, 0, logging=True).f < 0).any() and (theirs.loss(x, 0, logging=True).f < 0).any()
    together("jumprelu", theirs, mine, steps=20)
    assert (mine.ae.threshold < 0).any() and mine.dead_features > 20


@pytest.mark.parametrize("kind", ["p_anneal", "gated_anneal"])
@pytest.mark.parametrize("norm", ["Lp", "Lp^p"])
def test_p_its_queue_and_its_coefficient_are_the_packages(kind, norm):
    anneal = dict(anneal_start=8, anneal_end=30, n_sparsity_updates=4, p_end=0.4, initial_sparsity_penalty=0.3)
    theirs, mine = made(kind, lr=1e-3, sparsity_function=norm, warmup_steps=5, sparsity_queue_length=3, **anneal)
    together(kind, theirs, mine, steps=40)
    assert mine.p == theirs.p == pytest.approx(0.4) and len(mine.sparsity_queue) == 3


def test_at_p_0_the_penalty_is_the_number_of_features_and_has_no_gradient():
    anneal = dict(anneal_start=2, anneal_end=6, n_sparsity_updates=3, p_end=0, initial_sparsity_penalty=0.3)
    theirs, mine = made("p_anneal", lr=1e-3, sparsity_function="Lp^p", **anneal)
    together("p_anneal", theirs, mine, steps=12)
    assert mine.p == 0 and mine.lp_loss == D_SAE
    x = superposition(128, active=4, seed=1)[0].double()
    losses = [trainer.loss(x, 12) for trainer in (theirs, mine)]
    torch.testing.assert_close(losses[1], losses[0])
    theirs, mine = made("p_anneal", sparsity_function="Lp", **anneal)
    for step in range(5):
        for trainer in (theirs, mine):
            trainer.update(step, x.float())
    for trainer in (theirs, mine):
        with pytest.raises(ZeroDivisionError):
            trainer.update(5, x.float())
    with pytest.raises(ValueError, match=r"must be 'Lp' or 'Lp\^p'"):
        make(ours.PAnnealTrainer, sparsity_function="L1")


def test_annealed_resampling_does_what_the_packages_does(capsys):
    arguments = dict(resample_steps=5, lr=1e-3, warmup_steps=2)
    theirs, mine = made("p_anneal", **arguments)
    for trainer in (theirs, mine):
        trainer.ae.encoder.bias.data[::3] = -50.0
    for step, x in enumerate(superposition(128, active=4, seed=3)[:8]):
        x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        after = []
        for trainer in (theirs, mine):
            torch.manual_seed(step)
            trainer.update(step, x)
            after.append(torch.get_rng_state())
        assert torch.equal(*after), "as much is drawn"
        assert torch.equal(mine.steps_since_active, theirs.steps_since_active)
        for name, value in state(theirs).items():
            assert (state(mine)[name] - value).norm() <= 1e-4 * value.norm(), (step, name)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0] == said[1] and said[0].startswith("resampling 8")
    for trainer in made("gated_anneal", **arguments):
        trainer.ae.gate_bias.data[::3] = -50.0
        for step in range(4):
            trainer.update(step, x)
        with pytest.raises(TypeError, match="NoneType"):
            trainer.update(4, x)
