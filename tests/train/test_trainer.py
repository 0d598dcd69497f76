"""Trainer: the fused step against autograd with torch's Adam, schedules, the loop, and what an error leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from helpers import Judge, assert_same_bits, raises_and_changes_nothing, same_bits
from problems.trainer import CLASSES, D_IN, D_SAE, RECORD, PlainTrainer, batches, everything, make, weights_of
from torch import Tensor
from torch.nn import functional as F

import sae_fast as sf
from sae_fast.train import schedules

classes = pytest.mark.parametrize("cls", CLASSES)
dialects = pytest.mark.parametrize("dialect", ["paper", "saelens"])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # these problems are small: threads would only wait for each other


def assert_like(sae, plain: PlainTrainer, tolerance: float = 1e-9) -> None:
    for name, p in sae.named_parameters():
        torch.testing.assert_close(
            p.detach(), plain.p[name].detach(), rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---- The step -------------------------------------------------------------------------------------------------------


@pytest.mark.slow(but=8)
@classes
@dialects
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)], ids=str)
@pytest.mark.parametrize("l0", [4.0, None], ids=["sparse", "half dense"])
def test_sixty_steps_are_those_of_autograd_and_torchs_adam_in_float64(cls, dialect, betas, l0):
    sae = make(cls, torch.float64, l0=l0)
    settings = dict(lr=3e-3, l1_coefficient=0.4, betas=betas, dialect=dialect)
    plain, trainer = PlainTrainer(sae, **settings), sf.Trainer(sae, **settings)
    start = weights_of(sae)
    for i, x in enumerate(batches(60, torch.float64)):
        log = trainer.step(x)
        losses, _ = plain.step(x)
        assert log.step == i
        for name, ours in zip(("loss", *losses._fields[1:]), losses, strict=True):
            assert getattr(log, name) == pytest.approx(float(ours), rel=1e-9, abs=1e-12), name
    assert_like(sae, plain)
    for name, p in sae.named_parameters():
        assert (p - start[name]).abs().max() > 1e-3, f"{name} was trained"


def test_saelens_settings_with_clipping_are_those_of_autograd_and_torchs_adam():
    sae = make(dtype=torch.float64, l0=None)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
    settings = dict(lr=3e-3, l1_coefficient=0.4, betas=(0.9, 0.999), dialect="saelens", grad_clip=1.0)
    plain, trainer = PlainTrainer(sae, **settings), sf.Trainer(sae, **settings)
    norms = []
    for x in batches(80, torch.float64):
        trainer.step(x)
        norms.append(plain.step(x)[1])
    assert max(norms) > 1, "some gradients were clipped"
    assert_like(sae, plain)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() > 0.1, "no norm constraint"


@classes
@dialects
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)], ids=str)
def test_grad_clip_is_torchs_clipping_of_the_global_norm(cls, dialect, betas):
    # With a large eps, Adam does not hide a factor on the gradient.
    settings = dict(lr=3e-2, l1_coefficient=0.4, betas=betas, eps=0.5, dialect=dialect)
    sae = make(cls, torch.float64)
    free = PlainTrainer(sae, **settings)
    norms = [free.step(x)[1] for x in batches(20, torch.float64)]
    between = sorted(norms)[10]
    plain, trainer = PlainTrainer(sae, **settings, grad_clip=between), sf.Trainer(sae, **settings, grad_clip=between)
    clipped = 0
    for x in batches(20, torch.float64):
        trainer.step(x)
        clipped += plain.step(x)[1] > between
    assert 0 < clipped < 20, "on some steps only"
    assert_like(sae, plain)
    assert any((p - free.p[name]).abs().max() > 1e-4 for name, p in sae.named_parameters()), "clipping matters here"


@classes
@dialects
@pytest.mark.parametrize("clip", [None, 0.5], ids=["free", "clipped"])
def test_a_step_of_the_engine_is_as_close_to_float64_as_torchs_own(cls, dialect, clip, route):
    settings = dict(lr=3e-2, l1_coefficient=0.4, betas=(0.0, 0.999), eps=1e-2, dialect=dialect, grad_clip=clip)
    trials = Judge()
    for seed in range(8):
        sae = make(cls, seed=seed)
        own, exact = PlainTrainer(sae, **settings), PlainTrainer(sae, **settings, dtype=torch.float64)
        trainer, start = sf.Trainer(sae, **settings), weights_of(sae)
        for x in batches(3, seed=seed):
            trainer.step(x)
            own.step(x)
            exact.step(x.double())
        for name, p in sae.named_parameters():
            trials.add(name, p, own.p[name], exact.p[name])
            assert (p - start[name]).abs().max() > 1e-4, f"{name} was trained"
    trials.verdict()


def test_a_log_describes_the_batch_before_its_update():
    sae = make()
    trainer = sf.Trainer(sae, lr=0.1, l1_coefficient=0.4)
    for i, x in enumerate(batches(3)):
        before = copy.deepcopy(sae)
        log = trainer.step(x)
        losses = before.loss(x, 0.4)
        assert (log.step, log.lr, log.l1_coefficient) == (i, 0.1, 0.4)
        assert log.reconstruction == pytest.approx(float(losses.reconstruction.detach()), rel=1e-6)
        assert log.sparsity == pytest.approx(float(losses.sparsity.detach()), rel=1e-6)
        assert log.auxiliary == pytest.approx(float(losses.auxiliary.detach()), rel=1e-6)
        assert log.loss == pytest.approx(float(losses.total.detach()), rel=1e-6)
        assert log.l0 == pytest.approx(float(before.encode_sparse(x).l0().double().mean()))
        assert log.losses.grad_fn is None
    assert trainer.step_count == 3


@dialects
def test_the_decoder_rows_have_unit_norm_in_the_paper_dialect_whatever_they_started_from(dialect):
    scaled, unit = make(), make()
    with torch.no_grad():
        scaled.W_dec.mul_(torch.logspace(-2, 2, D_SAE)[:, None])
        unit.W_dec.copy_(F.normalize(scaled.W_dec, dim=1))
    trainers = [sf.Trainer(sae, lr=1e-3, l1_coefficient=0.4, dialect=dialect) for sae in (scaled, unit)]
    for x in batches(10):
        losses = [trainer.step(x).losses for trainer in trainers]
        if dialect == "paper":
            assert same_bits(*losses)
            torch.testing.assert_close(scaled.W_dec.norm(dim=1), torch.ones(D_SAE))
    if dialect == "paper":
        assert_same_bits(everything(trainers[0]), everything(trainers[1]))
    else:
        torch.testing.assert_close(scaled.W_dec.norm(dim=1), torch.logspace(-2, 2, D_SAE), rtol=0, atol=0.05)


def test_any_shape_stride_and_dtype_of_a_batch_trains_like_its_rows():
    def trained(view) -> list[Tensor]:
        trainer = sf.Trainer(make(), lr=1e-2, l1_coefficient=0.4)
        for x in batches(4):
            trainer.step(view(x.bfloat16()))
        return everything(trainer)

    rows = trained(lambda x: x.float())
    assert_same_bits(rows, trained(lambda x: x))
    assert_same_bits(rows, trained(lambda x: x.reshape(2, 3, 8, D_IN)))
    assert_same_bits(rows, trained(lambda x: x.t().contiguous().t()))
    assert_same_bits(rows, trained(lambda x: x.float().requires_grad_()))


def test_two_runs_have_the_same_bits_and_global_random_numbers_stay_untouched():
    def run():
        trainer = sf.Trainer(make(l0=None), lr=1e-2, l1_coefficient=0.8, init_l0=5, grad_clip=1.0)
        before = torch.get_rng_state()
        for x in batches(20):
            trainer.step(x)
        assert torch.equal(before, torch.get_rng_state())
        return everything(trainer)

    assert_same_bits(run(), run())


def test_stale_gradients_on_the_parameters_do_not_take_part():
    clean, stale = (sf.Trainer(make(), lr=1e-2, l1_coefficient=0.4) for _ in range(2))
    for p in stale.sae.parameters():
        p.grad = torch.full_like(p, 1e3)
    for x in batches(3):
        clean.step(x)
        stale.step(x)
    assert_same_bits(everything(clean), everything(stale))


def test_training_lowers_the_loss_and_the_error():
    data = batches(400)
    for cls in CLASSES:
        sae = cls(D_IN, D_SAE, seed=0)
        history = sf.Trainer(sae, lr=1e-2, l1_coefficient=0.1, init_l0=6).fit(data, log_every=399, progress=False)
        assert history[-1]["fvu"] < 0.3 < history[0]["fvu"] and history[-1]["loss"] < 0.5 * history[0]["loss"], cls


# ---- Schedules and initialisation -----------------------------------------------------------------------------------


def test_warmup_rises_linearly_from_zero_at_the_first_step():
    assert [schedules.warmup(s, 4) for s in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [schedules.warmup(s, 0) for s in (0, 1, 100)] == [1, 1, 1]
    assert [schedules.warmup(s, 1) for s in (0, 1, 2)] == [0, 1, 1]


def test_decay_falls_linearly_to_zero_at_the_last_step():
    assert [schedules.decay(s, 4, 8) for s in (0, 3, 4, 5, 6, 7, 8, 100)] == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert schedules.decay(10**9, None, None) == 1
    assert [schedules.decay(s, 5, 5) for s in (4, 5, 6)] == [1, 0, 0]
    assert [schedules.decay(s, 0, 2) for s in (0, 1, 2)] == [1, 0.5, 0]


def test_the_trainer_follows_its_schedules():
    trainer = sf.Trainer(
        make(), lr=2e-3, l1_coefficient=0.8, lr_warmup_steps=4, l1_warmup_steps=5, lr_decay_start=7, total_steps=10
    )
    logs = [trainer.step(x) for x in batches(11)]
    factors = [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 2 / 3, 1 / 3, 0]
    assert [log.lr for log in logs] == pytest.approx([2e-3 * f for f in factors])
    assert [log.l1_coefficient for log in logs] == pytest.approx([0.8 * min(i / 5, 1) for i in range(11)])
    assert logs[0].sparsity == 0 and logs[1].sparsity > 0


def test_scheduled_training_is_that_of_torch_with_the_same_values():
    sae = make(dtype=torch.float64)
    plain = PlainTrainer(sae, 1.0, 1.0)
    trainer = sf.Trainer(
        sae, lr=2e-2, l1_coefficient=0.8, lr_warmup_steps=4, l1_warmup_steps=5, lr_decay_start=12, total_steps=20
    )
    for i, x in enumerate(batches(20, torch.float64)):
        plain.adam.param_groups[0]["lr"] = 2e-2 * min(i / 4, 1, (20 - i) / 8)
        plain.l1 = 0.8 * min(i / 5, 1)
        trainer.step(x)
        plain.step(x)
    assert_like(sae, plain)


def test_other_settings_hold_from_the_next_step_on():
    trainer, twin = (sf.Trainer(make(), lr=2e-3, l1_coefficient=0.8) for _ in range(2))
    first, second = batches(2)
    trainer.step(first)
    trainer.settings = dataclasses.replace(trainer.settings, lr=1e-3, l1_coefficient=0.2)
    twin.step(first)
    assert trainer.step(second).lr == 1e-3
    twin.step(second, lr=1e-3, l1_coefficient=0.2)
    assert_same_bits(everything(trainer), everything(twin))


def test_a_step_at_learning_rate_zero_moves_no_weight():
    sae = make()
    trainer = sf.Trainer(sae, l1_coefficient=0.4, lr_warmup_steps=10)
    before = weights_of(sae)
    trainer.step(batches(1)[0])
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-6)
    trainer.step(batches(1)[0])
    assert (sae.b_gate - before["b_gate"]).abs().max() > 0


@classes
def test_init_l0_calibrates_on_the_first_batch_and_never_again(cls):
    data = batches(4)
    trainer = sf.Trainer(cls(D_IN, D_SAE, seed=0), lr=1e-4, l1_coefficient=0.4, init_l0=6)
    by_hand = cls(D_IN, D_SAE, seed=0)
    by_hand.calibrate_(data[0], 6)
    other = sf.Trainer(by_hand, lr=1e-4, l1_coefficient=0.4)
    assert trainer.step(data[0]).l0 == pytest.approx(6, rel=0.05)
    other.step(data[0])
    for x in data[1:]:
        trainer.step(x)
        other.step(x)
    assert_same_bits(everything(trainer), everything(other))


def test_without_init_l0_the_biases_stay_as_given():
    assert sf.Trainer(make(l0=None), lr=0.0, l1_coefficient=1.0).step(batches(1)[0]).l0 > 0.3 * D_SAE


# ---- fit ------------------------------------------------------------------------------------------------------------


def test_fit_records_every_so_many_steps_and_the_last():
    data = batches(24)
    trainer, twin = (sf.Trainer(make(), lr=1e-2, l1_coefficient=0.4) for _ in range(2))
    history = trainer.fit(data, log_every=10, progress=False)
    assert [r["step"] for r in history] == [0, 10, 20, 23]
    for i, x in enumerate(data):
        before = copy.deepcopy(twin.sae)
        log = twin.step(x)
        if i in (0, 10, 20, 23):
            record = history.pop(0)
            assert set(record) == RECORD
            for key in RECORD - {"fvu", "seconds"}:
                assert record[key] == getattr(log, key), key
            with torch.no_grad():
                assert record["fvu"] == pytest.approx(sf.metrics.fvu(x, before(x)), rel=1e-4)
            assert all(isinstance(value, (int, float)) for value in record.values())
    assert_same_bits(everything(trainer), everything(twin))


def test_fit_takes_exactly_the_steps_it_is_given_and_goes_on_from_there():
    trainer, stream = sf.Trainer(make(), lr=1e-2, l1_coefficient=0.4), itertools.cycle(batches(3))
    taken = []
    counted = (taken.append(x) or x for x in stream)
    first = trainer.fit(counted, steps=7, log_every=3, progress=False)
    assert len(taken) == trainer.step_count == 7 and [r["step"] for r in first] == [0, 3, 6]
    second = trainer.fit(counted, steps=4, log_every=3, progress=False)
    assert len(taken) == trainer.step_count == 11 and [r["step"] for r in second] == [9, 10]
    assert second[0]["seconds"] <= second[1]["seconds"]


def test_fit_ends_with_its_batches():
    trainer = sf.Trainer(make(), l1_coefficient=0.4)
    assert [r["step"] for r in trainer.fit(batches(3), steps=100, progress=False)] == [0, 2]
    assert [r["step"] for r in trainer.fit(iter(batches(2)), log_every=1, progress=False)] == [3, 4]
    assert trainer.fit([], progress=False) == [] and trainer.step_count == 5
    assert trainer.fit(batches(3), steps=0, progress=False) == [] and trainer.step_count == 5


def test_fit_of_a_batch_without_variance_has_no_fvu():
    history = sf.Trainer(make(), l1_coefficient=0.4).fit([torch.ones(4, D_IN)], progress=False)
    assert math.isnan(history[0]["fvu"]) and history[0]["loss"] > 0


def test_fit_prints_only_if_asked(capfd):
    sf.Trainer(make(), l1_coefficient=0.4).fit(batches(3), progress=False)
    assert capfd.readouterr() == ("", "")
    sf.Trainer(make(), l1_coefficient=0.4).fit(batches(3), steps=3, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "training" in err and "3/3" in err and "l0=" in err


def test_fit_refuses_to_log_every_zero_steps():
    trainer = sf.Trainer(make(), l1_coefficient=1.0)
    with raises_and_changes_nothing("steps: got 2.5, want a whole number ≥ 0", everything(trainer)):
        trainer.fit([], steps=2.5)
    with raises_and_changes_nothing("log_every: got 0, want ≥ 1", everything(trainer)):
        trainer.fit(batches(1), log_every=0)


def test_an_error_in_fit_leaves_the_weights_of_the_last_good_step():
    data = batches(5)
    data[3][2, 1] = float("nan")
    trainer, twin = (sf.Trainer(make(), lr=1e-2, l1_coefficient=0.4) for _ in range(2))
    with pytest.raises(ValueError, match=r"^step 3: x: got nan at index \(2, 1\) of shape \(48, 12\)"):
        trainer.fit(data, progress=False)
    for x in data[:3]:
        twin.step(x)
    assert_same_bits(everything(trainer), everything(twin))


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_a_jumprelu_layer_wants_an_objective():
    with pytest.raises(ValueError, match=r"^objective: got None for a JumpReluSAE, want one such as"):
        sf.Trainer(sf.JumpReluSAE(4, 8))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(dialect="papers"), "dialect: got 'papers'"),
        (dict(lr=-1e-3), "lr: got -0.001"),
        (dict(lr=float("nan")), "lr: got nan"),
        (dict(l1_coefficient=-1), "l1_coefficient: got -1"),
        (dict(l1_coefficient=float("nan")), "l1_coefficient: got nan"),
        (dict(betas=(0.0, 1.0)), "betas: got"),
        (dict(eps=-1.0), "eps: got -1.0"),
        (dict(lr_warmup_steps=-1), "lr_warmup_steps: got -1"),
        (dict(l1_warmup_steps=-5), "l1_warmup_steps: got -5"),
        (dict(lr_decay_start=5), "lr_decay_start, total_steps"),
        (dict(total_steps=5), "lr_decay_start, total_steps"),
        (dict(grad_clip=0.0), "grad_clip: got 0.0"),
        (dict(grad_clip=float("nan")), "grad_clip: got nan"),
    ],
)
def test_settings_out_of_range_are_refused_when_the_trainer_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        sf.Trainer(make(), **{"l1_coefficient": 1.0, **settings})


BAD_BATCHES = {
    "NaN": (float("nan"), r"x: got nan at index \(1, 2\) of shape \(48, 12\)"),
    "inf": (float("inf"), r"x: got inf at index \(1, 2\) of shape \(48, 12\)"),
    "shape": (torch.zeros(3, 11), r"x: got shape \(3, 11\), want \[\.\.\., d_in\] with d_in = 12"),
    "dtype": (torch.zeros(3, 12, dtype=torch.int64), r"x: got torch.int64"),
    "empty": (torch.zeros(0, 12), r"x: got shape \(0, 12\), want at least one example"),
}


@classes
@pytest.mark.parametrize("good_steps", [0, 5])
@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_batch_is_a_value_error_that_names_the_step_and_changes_nothing(cls, good_steps, case):
    what, message = BAD_BATCHES[case]
    trainer = sf.Trainer(make(cls), lr=1e-2, l1_coefficient=0.4, init_l0=6, grad_clip=1.0, lr_warmup_steps=2)
    with torch.no_grad():
        trainer.sae.W_dec.mul_(3)  # what the first step would normalise
    data = batches(good_steps + 1)
    for x in data[:good_steps]:
        trainer.step(x)
    if not isinstance(what, Tensor):
        bad = data[-1].clone()
        bad[1, 2] = what
    else:
        bad = what
    before = everything(trainer)
    with pytest.raises(ValueError, match=f"^step {good_steps}: {message}"):
        trainer.step(bad)
    assert_same_bits(before, everything(trainer))


def test_a_first_batch_too_small_to_calibrate_on_is_refused_and_changes_nothing():
    trainer = sf.Trainer(make(), l1_coefficient=1.0, init_l0=6)
    with raises_and_changes_nothing(r"^step 0: x: got 1 examples, want at least 2", list(trainer.sae.parameters())):
        trainer.step(batches(1)[0][:1])
    assert trainer.step_count == 0
    trainer.step(batches(1)[0])


@classes
@dialects
@pytest.mark.parametrize("good_steps", [0, 5])
@pytest.mark.parametrize("huge", [1e25, 1e30])
def test_a_loss_that_overflows_names_the_step_and_leaves_the_last_good_weights(cls, dialect, good_steps, huge):
    def build():
        trainer = sf.Trainer(make(cls), lr=1e-2, l1_coefficient=0.4, init_l0=6, dialect=dialect)
        with torch.no_grad():
            trainer.sae.W_dec.mul_(3)
        return trainer

    trainer, twin = build(), build()
    *good, last = batches(good_steps + 1)
    for x in good:
        trainer.step(x)
        twin.step(x)
    before = everything(trainer)
    with pytest.raises(
        FloatingPointError, match=rf"^step {good_steps}: the \w+.* is not finite; the weights are unchanged"
    ):
        trainer.step(last * huge)
    assert_same_bits(before, everything(trainer))
    trainer.step(last)
    twin.step(last)
    assert_same_bits(everything(trainer), everything(twin))


def test_a_nan_among_the_weights_stops_training_with_the_step():
    trainer = sf.Trainer(make(), lr=1e-2, l1_coefficient=0.4)
    trainer.step(batches(1)[0])
    for name in ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"):
        spoiled = copy.deepcopy(trainer)
        with torch.no_grad():
            spoiled.sae.get_parameter(name).view(-1)[:5] = float("nan")
        before = everything(spoiled)
        with pytest.raises(FloatingPointError, match=r"^step 1: "):
            spoiled.step(batches(1)[0])
        assert_same_bits(before, everything(spoiled))


def test_a_gradient_that_overflows_while_the_loss_is_finite_leaves_the_last_good_weights():
    sae = sf.ReluSAE(1, 1)
    with torch.no_grad():
        sae.W_enc.fill_(1.5)
        sae.W_dec.fill_(1.0)
    trainer = sf.Trainer(sae, l1_coefficient=0.0)
    x = torch.full((1, 1), 2.2e19)
    loss = sae.loss(x, 0.0).total
    loss.backward()
    assert loss.isfinite() and sae.W_enc.grad is not None and sae.W_enc.grad.isinf().all()
    before = everything(trainer)
    with pytest.raises(FloatingPointError, match=r"^step 0: the gradient of W_enc is not finite"):
        trainer.step(x)
    assert_same_bits(before, everything(trainer))


def test_a_zero_decoder_row_trains_in_the_saelens_dialect():
    sae = sf.GatedSAE(8, 32, seed=0)
    with torch.no_grad():
        sae.W_dec[3] = 0
    log = sf.Trainer(sae, l1_coefficient=1.0, dialect="saelens", betas=(0.9, 0.999)).step(torch.randn(64, 8))
    assert log.l0 > 0 and all(bool(p.isfinite().all()) for p in sae.parameters())
