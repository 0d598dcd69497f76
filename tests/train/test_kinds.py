"""Training by every kind of objective: what a step leaves behind, resuming, counting, refusals."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from helpers import assert_same_bits, randn
from problems.objectives import CASES

import sae_fast as sf
from sae_fast.objectives import L0, L1, AuxK, Gated, Matryoshka, Prefixes, TopK, describe, rebuild
from sae_fast.ops import checks, dense_gradient

B, D, F = 64, 16, 50
KINDS = {
    "gated aux": (sf.GatedSAE, Gated(0.3, aux=AuxK()), {}),
    "relu p": (sf.ReluSAE, L1(0.3, p=0.5), {}),
    "jumprelu": (sf.JumpReluSAE, L0(1.0, target=5, bandwidth=0.1, aux=AuxK()), {}),
    "topk": (sf.TopKSAE, TopK(aux=AuxK()), {"k": 4}),
    "batchtopk": (sf.BatchTopKSAE, TopK(threshold_start=3, aux=AuxK()), {"k": 4}),
    "matryoshka": (sf.BatchTopKSAE, Matryoshka(TopK(threshold_start=3, aux=AuxK()), (5, 15, 30)), {"k": 4}),
    "random prefixes": (sf.BatchTopKSAE, Matryoshka(random=3), {"k": 4}),
}
each = pytest.mark.parametrize("kind", KINDS)
momentum = pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)], ids=["no momentum", "momentum"])


def trainer_of(kind: str, dead_after: int | None = 3 * B, **settings) -> sf.Trainer:
    cls, objective, options = KINDS[kind]
    sae = cls(D, F, seed=0, **options)
    if objective.aux is not None:
        with torch.no_grad():
            sae.encoder_bias[::5] = -1.5  # some features are dead for a while
    init_l0 = None if isinstance(sae, sf.nn.GroupedSAE) or objective.aux is not None else 5
    return sf.Trainer(sae, lr=1e-2, objective=objective, dead_after=dead_after, init_l0=init_l0, **settings)


def batches(n: int, first: int = 0) -> list[torch.Tensor]:
    return [randn(B, D, seed=first + i) for i in range(n)]


def everything(trainer: sf.Trainer) -> list[torch.Tensor]:
    kept = [sorted(trainer.optimizer.state[p].items()) for p in trainer.sae.parameters()]
    states = [t for state in kept for _, t in state if isinstance(t, torch.Tensor)]
    return [*trainer.sae.state_dict().values(), *states, trainer.state.since_fired]


@momentum
@each
def test_a_training_goes_on_bit_for_bit_from_its_checkpoint(kind, betas, tmp_path):
    trainer = trainer_of(kind, betas=betas, grad_clip=1.0)
    for x in batches(8):
        trainer.step(x)
    trainer.save(tmp_path / "checkpoint")
    again, copied = sf.Trainer.load(tmp_path / "checkpoint"), copy.deepcopy(trainer)
    assert again.settings == trainer.settings
    for x in batches(8, first=100):
        logs = [t.step(x) for t in (trainer, again, copied)]
        assert len({(log.loss, log.l0, log.dead) for log in logs}) == 1
    assert_same_bits(everything(trainer), everything(again))
    assert_same_bits(everything(trainer), everything(copied))


def test_a_dialect_with_an_aid_resumes(tmp_path):
    trainer = sf.Trainer(sf.GatedSAE(D, F, seed=0), l1_coefficient=0.3, dialect="saelens", dead_after=B, aux=1 / 32)
    trainer.step(randn(B, D))
    trainer.save(tmp_path / "checkpoint")
    assert sf.Trainer.load(tmp_path / "checkpoint").state.objective == trainer.state.objective


@each
def test_training_lowers_the_loss(kind):
    trainer = trainer_of(kind)
    x = randn(B, D, seed=1)
    losses = [trainer.step(x) for _ in range(30)]
    assert losses[-1].loss < 0.8 * losses[0].loss


def test_a_feature_is_dead_after_so_many_examples_without_firing():
    trainer = trainer_of("topk", dead_after=2 * B)
    since = torch.zeros(F, dtype=torch.int64)
    for x in batches(12):
        f = trainer.sae.encode(x)
        since = torch.where((f > 0).any(0), 0, since + B)
        log = trainer.step(x)
        assert torch.equal(trainer.state.since_fired, since)
        assert log.dead == int((since >= 2 * B).sum())
    assert log.dead > 0


def test_an_aid_revives_dead_features():
    data, dead = batches(150), {}
    for aux in (None, 1 / 32):
        sae = sf.TopKSAE(D, F, k=4, seed=0)
        with torch.no_grad():
            sae.b_enc[::5] = -2.5
        trainer = sf.Trainer(sae, lr=3e-3, dead_after=2 * B, aux=aux)
        for x in data:
            log = trainer.step(x)
        dead[aux] = log.dead
    assert dead[1 / 32] < 0.7 * dead[None]


def test_the_threshold_follows_the_smallest_that_each_batch_keeps():
    trainer, wanted = trainer_of("batchtopk"), -1.0
    for index, x in enumerate(batches(9)):
        f = trainer.sae.encode(x, use_threshold=False)
        smallest = float(f.detach()[f > 0].min())
        trainer.step(x)
        if index > 3:
            wanted = smallest if wanted < 0 else 0.999 * wanted + 0.001 * smallest
        assert float(trainer.sae.threshold) == pytest.approx(wanted, rel=1e-6)
    assert trainer.sae.has_threshold()
    assert (trainer.sae.encode(x) > 0).sum() != B * 4  # by the threshold now


def test_thresholds_stay_positive():
    sae = sf.JumpReluSAE(D, F, seed=0)
    with torch.no_grad():
        sae.threshold -= 0.1
    trainer = sf.Trainer(sae, lr=1e-1, objective=L0(1e-3, bandwidth=0.5))
    for x in batches(5):
        trainer.step(x)
        assert bool((sae.threshold >= 0).all())
    trainer = sf.Trainer(sae, lr=1e-1, objective=L0(1e-3, bandwidth=0.5, positive=False))
    for x in batches(30):
        trainer.step(x)
    assert bool((sae.threshold < 0).any())


def test_a_step_that_fails_counts_nothing():
    trainer = trainer_of("matryoshka")
    for x in batches(6):
        trainer.step(x)
    before = [t.clone() for t in everything(trainer)]
    with pytest.raises(FloatingPointError, match=r"^step 6: the "):
        trainer.step(torch.full((B, D), 1e30))
    assert_same_bits(before, everything(trainer))


def test_gradients_are_clipped_as_projected():
    """As dictionary_learning does it: off the decoder's rows, then to a norm."""
    sae, x = sf.TopKSAE(D, F, k=4, seed=0), randn(B, D, seed=1)
    grads = {
        name: dense_gradient(sae.get_parameter(name), g) for name, g in sae.row_gradients(x, TopK())[0].by_name.items()
    }
    grads["W_dec"] = sf.ops.project_rows(grads["W_dec"], sae.W_dec)
    norm = float(torch.stack([g.detach().norm() for g in grads.values()]).norm())
    trainer = sf.Trainer(sae, betas=(0.9, 0.99), grad_clip=norm / 3)
    trainer.step(x)
    for name, g in grads.items():
        moved = trainer.optimizer.state[sae.get_parameter(name)]["exp_avg"]
        torch.testing.assert_close(moved, 0.1 * g / 3, rtol=1e-4, atol=1e-8)


def test_a_training_has_the_same_bits_on_any_number_of_threads():
    threads, found = torch.get_num_threads(), []
    x = [randn(600, 64, seed=i) for i in range(3)]
    try:
        for n in (1, 4):
            torch.set_num_threads(n)
            sae = sf.BatchTopKSAE(64, 400, k=8, seed=0)
            with torch.no_grad():
                sae.b_enc[::3] = -4.0
            trainer = sf.Trainer(sae, objective=Matryoshka(TopK(aux=AuxK()), (100, 300)), dead_after=600)
            logs = [trainer.step(rows) for rows in x]
            found.append((everything(trainer), [(log.loss, log.squared_error) for log in logs], logs[-1].dead))
    finally:
        torch.set_num_threads(threads)
    (one, logs, dead), (four, again, _) = found
    assert dead > 0 and logs == again
    assert_same_bits(one, four)


def test_an_aid_touches_the_dead_features_that_it_has_chosen():
    sae, x, dead = sf.TopKSAE(D, F, k=4, seed=0), randn(B, D, seed=1), torch.arange(F) < 5
    with torch.no_grad():
        sae.b_enc[dead] = torch.tensor([-100.0, -1.0, -100.0, -1.0, -100.0])
    for chosen in ([1, 3], []):
        done, _ = sae.row_gradients(x, TopK(aux=AuxK()), dead=lambda code: dead)
        for name in ("W_enc", "W_dec"):
            touched = sf.ops.touched(done.by_name[name].csc)
            assert touched[touched < 5].tolist() == chosen, name
            assert bool(dense_gradient(sae.W_dec, done.by_name[name])[chosen].any(1).all()), name
        assert done.losses[2] > 0
        with torch.no_grad():
            sae.b_enc[dead] = -100.0


def test_saelens_aid_moves_what_is_at_0():
    sae, x, dead = sf.TopKSAE(D, F, k=4, seed=0), randn(B, D, seed=1), torch.arange(F) < 5
    x[::2] = 0  # π is 0 there, and no ReLU is behind the aid's values
    found = []
    for aux in (None, AuxK(1.0, k=5, dialect="saelens")):
        done, _ = sae.row_gradients(x, TopK(aux=aux), dead=lambda code: dead)
        found.append(done.by_name["b_enc"])
    z = (x @ sae.W_enc[:5].T).detach().requires_grad_()
    (-done.residual - z @ sae.W_dec[:5]).pow(2).sum(1).mean().backward()
    torch.testing.assert_close((found[1] - found[0])[:5], z.grad.sum(0))


def test_a_frozen_threshold_keeps_its_bits():
    sae = sf.JumpReluSAE(D, F, seed=0)
    with torch.no_grad():
        sae.threshold -= 0.1
    before = sae.threshold.clone()
    sae.threshold.requires_grad_(False)
    trainer = sf.Trainer(sae, objective=L0(0.1, bandwidth=0.5))
    for x in batches(2):
        trainer.step(x)
    assert torch.equal(sae.threshold, before)


def test_counting_begins_and_ends_in_mid_run_with_its_settings(tmp_path):
    trainer = trainer_of("jumprelu")
    with_aid = trainer.settings
    trainer.step(batches(1)[0])
    trainer.settings = replace(with_aid, dead_after=None, objective=replace(with_aid.objective, aux=None))
    assert trainer.step(batches(1)[0]).dead is None and trainer.step_count == 2
    trainer.settings = with_aid
    trainer.save(tmp_path / "checkpoint")
    again = sf.Trainer.load(tmp_path / "checkpoint")
    assert [t.step(batches(1)[0]).dead for t in (trainer, again)] == [0, 0]
    assert_same_bits(everything(trainer), everything(again))
    for wrong, message in (
        (TopK(), "objective: got TopK"),
        (replace(with_aid.objective, unit_rows=False), "objective: got unit"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            trainer.settings = replace(with_aid, objective=wrong)
    assert trainer.settings == with_aid


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": ["TopK"]}, "objective.name: got"),
        ({"surprise": 1}, "objective: .*surprise"),
        ({"prefixes": 5}, "objective: prefixes: got 5"),
        ({"prefixes": {"surprise": 1}}, "objective.prefixes: .*surprise"),
        ({"prefixes": {"fractions": "ab"}}, "objective.prefixes: fractions: got 'ab'"),
        ({"prefixes": {"group_sizes": [25, 25], "weights": [1, "a"]}}, "objective.prefixes: weights: got"),
        ({"aux": "x"}, "objective: aux: got 'x'"),
        ({"aux": {"coefficient": None}}, "objective.aux: aux: coefficient: got None"),
        ({"threshold_beta": "x"}, "objective: threshold_beta: got 'x'"),
        ({"unit_rows": 1}, "objective: unit_rows: got 1"),
    ],
)
def test_a_checkpoints_objective_names_what_is_wrong(changes, message):
    about = describe(TopK(aux=AuxK()))
    assert rebuild(about) == TopK(aux=AuxK())
    with pytest.raises(ValueError, match=f"^{message}"):
        rebuild(about | changes)


def test_random_prefixes_differ_by_step_and_repeat_by_seed():
    prefixes = Prefixes(random=3)
    ends = [prefixes.drawn(F, step).ends(F) for step in range(20)]
    assert all(len(e) == 3 and e[-1] == F for e in ends) and len(set(ends)) > 10
    assert ends == [prefixes.drawn(F, step).ends(F) for step in range(20)]
    assert ends != [Prefixes(random=3, seed=1).drawn(F, step).ends(F) for step in range(20)]


def test_the_logged_fvu_is_of_all_features():
    trainer = trainer_of("matryoshka")
    x = randn(B, D, seed=1)
    x_hat = trainer.sae(x)
    (record,) = trainer.fit([x], progress=False)
    assert record["fvu"] == pytest.approx(float((x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()), rel=1e-4)


@pytest.mark.parametrize("case", ["gated p", "target", "matryoshka aux", "relu"])
def test_a_loss_has_the_steps_gradients(case):
    cls, objective = CASES[case]
    sae = cls(D, F, seed=0, **({"k": 4} if issubclass(cls, sf.nn.GroupedSAE) else {}))
    x, dead = randn(2, B // 2, D, seed=1), torch.zeros(F, dtype=torch.bool)
    dead[::7] = True
    loss = sae.loss(x, objective, dead=dead)
    (2 * loss.total).backward()
    done, _ = sae.row_gradients(x.reshape(B, D), objective, dead=lambda code: dead)
    assert loss.total.item() == pytest.approx(float(done.losses.sum()))
    for name, g in done.by_name.items():
        parameter = sae.get_parameter(name)
        torch.testing.assert_close(parameter.grad, 2 * dense_gradient(parameter, g))
    with pytest.raises(ValueError, match=r"^x: got a tensor that requires a gradient"):
        sae.loss(x.requires_grad_(), objective)


@pytest.mark.parametrize(
    "x, objective, dead, message",
    [
        ((3, D), 0.5, None, "objective: got 0.5"),
        ((3, D), Matryoshka(random=3), None, "prefixes: got 3 random ones"),
        ((0, D), TopK(), None, r"x: got shape \(0, 16\)"),
        ((3, D), TopK(aux=AuxK()), torch.ones(F - 1, dtype=torch.bool), "dead: got shape"),
        ((3, D), TopK(aux=AuxK()), torch.ones(F), "dead: got torch.float32"),
    ],
)
def test_a_loss_of_what_does_not_go_together_is_refused(x, objective, dead, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sf.TopKSAE(D, F, k=4).loss(randn(*x), objective, dead)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: L0(target=0), "target: got 0, want a number > 0"),
        (lambda: L0(target=5, bandwidth=0), "bandwidth: got 0, want a number > 0"),
        (lambda: L0(form="quadratic"), "target: got None with form 'quadratic'"),
        (lambda: L0(form="cubic"), "form: got 'cubic'"),
        (lambda: L0(window="f", ste_to_input=True), "ste_to_input: got True"),
        (lambda: Gated(-1), "coefficient: got -1"),
        (lambda: Gated(1, "papers"), "dialect: got 'papers'"),
        (lambda: L1(1, p=0), "p: got 0"),
        (lambda: L1(1, decoder_norms=True, p=0.5), "p: got 0.5 with a penalty on decoder norms"),
        (lambda: AuxK(0), "aux: coefficient: got 0"),
        (lambda: AuxK(k=0), "aux: k: got 0"),
        (lambda: Prefixes(random=-3), "random: got -3"),
        (lambda: Prefixes(5), "group_sizes: got 5"),
        (lambda: L1(None), "coefficient: got None"),
        (lambda: sf.Trainer(sf.ReluSAE(4, 8), objective=L1(torch.ones(3))), "objective: got a coefficient of shape"),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2), objective=TopK), "objective: got <class"),
        (lambda: TopK(threshold_beta=1), "threshold_beta: got 1"),
        (lambda: TopK(threshold_start=2.5), "threshold_start: got 2.5, want a whole number of steps ≥ 0"),
        (lambda: AuxK(k=2.5), "aux: k: got 2.5, want a positive int or None"),
        (lambda: AuxK(dialect="saelens", by_norm="no"), "aux: by_norm: got 'no', want True or False"),
        (lambda: L0(form=""), "form: got '', want one of"),
        (lambda: Prefixes((2.5, 5.5)), r"group_sizes: got (2.5, 5.5), want positive ints"),
        (lambda: Prefixes(()), r"group_sizes: got (), want positive ints"),
        (lambda: Matryoshka(5), "over: got 5, want one of sae_fast.objectives, or None"),
        (lambda: Matryoshka(group_sizes=5), "group_sizes: got 5, want positive ints"),
        (lambda: sf.Trainer(5, l1_coefficient=1.0), "sae: got 5, want one of sae_fast's layers"),
        (lambda: sf.TopKSAE(4, 8, k=2.5), "k: got 2.5, want an int"),
        (lambda: sf.TopKSAE(4, 8, k=2).calibrate_(torch.ones(3, 4), "2"), "l0: got '2', want 0 < l0"),
        *(
            (lambda name=name, value=value: sf.Trainer(sf.TopKSAE(4, 8, k=2), **{name: value}), f"{name}: got {said}")
            for name, value, said in (
                ("betas", 0.9, "0.9, want two numbers in [0, 1)"),
                ("betas", (0.9, "a"), "(0.9, 'a'), want two"),
                ("betas", (0.9, 0.9, 0.9), "(0.9, 0.9, 0.9), want two"),
                ("lr", None, "None, want a number ≥ 0"),
                ("eps", "a", "'a', want a number ≥ 0"),
                ("l1_coefficient", "a", "'a', want a number ≥ 0 or None"),
                ("grad_clip", "a", "'a', want a number > 0 or None"),
                ("init_l0", True, "True, want a number > 0 or None"),
                ("lr_warmup_steps", 2.5, "2.5, want a whole number of steps ≥ 0"),
                ("total_steps", "9", "'9', want a whole number of steps ≥ 0 or None"),
                ("dead_after", 2.5, "2.5, want a whole number of examples > 0 or None"),
                ("unit_start", "no", "'no', want True or False"),
            )
        ),
        (lambda: sf.optim.RowAdam([torch.nn.Parameter(torch.ones(2))], betas=0.9), "betas: got 0.9, want two numbers"),
        (lambda: sf.optim.RowAdam([torch.nn.Parameter(torch.ones(2))], lr="a"), "lr: got 'a', want ≥ 0"),
        (lambda: Prefixes(), "group_sizes, fractions, random: got none"),
        (lambda: Prefixes((1, 2), random=2), "group_sizes, fractions, random: got"),
        (lambda: Prefixes((1, 0)), "group_sizes: got"),
        (lambda: Prefixes(fractions=(0.5, 0.6)), "fractions: got"),
        (lambda: Prefixes((1, 2), weights=(1.0,)), "weights: got"),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=9)), "k: got 9"),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2), l1_coefficient=1.0), "l1_coefficient: got 1.0 for a TopKSAE"),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2), objective=Gated(1)), "objective: got Gated for activation 'relu'"),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2), objective=L1(1)), "objective: got L1 for a TopKSAE"),
        (lambda: sf.Trainer(sf.ReluSAE(4, 8), objective=TopK()), "objective: got TopK for a ReluSAE"),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2), objective=Matryoshka(None, (3, 4))), "group_sizes: got a sum of 7"),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2), aux=1 / 32), "dead_after: got None with an aid"),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2), dead_after=0), "dead_after: got 0"),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2), init_l0=4), "init_l0: got 4"),
        (lambda: sf.Trainer(sf.JumpReluSAE(4, 8), objective=L0(target=9)), "target: got 9, want at most d_sae = 8"),
        (lambda: sf.Trainer(sf.GatedSAE(4, 8), objective=Gated(1), dialect="saelens"), "dialect: got 'saelens' beside"),
        (lambda: sf.Trainer(sf.GatedSAE(4, 8), objective="x", dead_after=1, aux=0.1), "objective: got 'x'"),
        (lambda: sf.GatedSAE(4, 8).loss(torch.ones(1, 4), Gated(1), "saelens"), "dialect, target: got one"),
        (lambda: sf.ReluSAE(4, 8).loss(torch.ones(1, 4), TopK()), "objective: got TopK for a ReluSAE"),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2), betas=(1.0, 0.9)), "betas: got"),
        (lambda: sf.Trainer(sf.GatedSAE(4, 8), l1_coefficient=1.0, objective=Gated(1)), "l1_coefficient: got 1.0 beside"),
        (
            lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2, group_sizes=(4, 4)), objective=Matryoshka(group_sizes=(2, 6))),
            "objective: got prefixes of groups",
        ),
        (lambda: sf.Trainer(sf.TopKSAE(4, 8, k=2, group_sizes=(4, 4), active_groups=1)), "sae: got active_groups = 1"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()


@each
def test_a_step_does_not_check_the_codes_that_it_made(kind, monkeypatch):
    looked = []
    monkeypatch.setattr(checks, "_native", lambda *tensors: looked.append(tensors))
    trainer = trainer_of(kind)
    trainer.step(randn(B, D, seed=1))
    with pytest.raises(ValueError, match="x: got nan"):
        trainer.step(torch.full((B, D), torch.nan))
    assert not looked
    code = trainer.sae.encode_sparse(randn(B, D, seed=1))
    with pytest.raises(ValueError, match="indices: got values from"):
        sf.ops.transpose(replace(code, indices=code.indices + F))
    assert looked
