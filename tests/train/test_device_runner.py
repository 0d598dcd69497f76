"""The Trainer on a GPU: steps that the host runs ahead of, and what it does when one of them did not happen.

Without a GPU the kernels run in Triton's interpreter and every step at once; the host still learns of it only when it
polls.  On one, CUDA graphs are captured and replayed.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from helpers import Judge, assert_same_bits, randn
from problems.trainer import RECORD, PlainTrainer
from problems.trajectory import ROUNDING, Run, reference_run
from torch import Tensor

import sae_fast as sf
from sae_fast import ops, use_backend
from sae_fast.ops import crossovers, dispatch

pytest.importorskip("triton")

from problems.device_runner import (
    DEVICE,
    FIELDS,
    STEPS,
    D,
    F,
    assert_within_the_spread,
    batches,
    fields,
    make,
    recoveries_seen,
)

from sae_fast.kernels import _config
from sae_fast.kernels.flag import NOT_FINITE, NOT_FINITE_LOSS, OVERFLOW, STALE
from sae_fast.kernels.round import watch
from sae_fast.train import device_step, device_steps

SETTINGS = dict(lr=1e-2, l1_coefficient=0.4)
LOUD = (0, 0, 1, 0, 3, 5)  # examples of each batch that open half of all gates: steps 2, 4 and 5 have more and more
SMALL = {  # tiles, for the interpreter's sake
    "screen": {"rows": 16, "features": 32, "depth": 32},
    "compact": {"words": 4},
    "sampled_dots": {"entries": 8, "columns": 8, "finish": 16},
    "decode_loss": {"entries": 8, "columns": 8, "finish": 16},
    "transpose": {"entries": 16, "chunks": 2},
    "outer": {"columns": 8},
    "weight_step": {"columns": 2},
}

# The interpreter's own; a GPU has none.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Also on a GPU, where such small batches would be taken densely."""
    torch.set_num_threads(1)
    for generation in _config.SHIPPED.values():
        for op, values in SMALL.items():
            monkeypatch.setitem(generation, op, {**generation[op], **values})
    with use_backend("triton"):
        yield


def trainer_of(cls=sf.GatedSAE, seed: int = 0, **settings) -> sf.Trainer:
    return sf.Trainer(make(cls, seed), **{**SETTINGS, **settings})


def everything(trainer: sf.Trainer) -> list[Tensor]:
    """Every bit of a trainer's state, once its steps have happened."""
    trainer.wait()
    out = [torch.tensor(trainer.step_count)]
    for p in trainer.sae.parameters():
        state = trainer.optimizer.state.get(p, {})
        out += [p.detach().cpu().clone(), *(torch.as_tensor(state[key]).cpu().clone() for key in sorted(state))]
    return out


@cache
def told(loud: tuple[int, ...] = ()) -> SimpleNamespace:
    """An undisturbed run on batches(loud=loud) with room for everything: its state after so many steps, its logs, and how
    many candidates each step had."""
    trainer, logs, states = trainer_of(), [], [[]]
    for x in batches(loud=loud):
        logs.append(trainer.step(x))
        states.append(everything(trainer))
    candidates = [int(log.result.report.of("candidates")) for log in logs]
    return SimpleNamespace(states=states, state=states[-1], logs=fields(logs), candidates=candidates)


@pytest.fixture
def recoveries(monkeypatch):
    return recoveries_seen(monkeypatch)


def with_room_for(trainer: sf.Trainer, capacity: int) -> None:
    """The trainer's first buffers hold ``capacity`` candidates."""
    assert trainer._device.refuses() is None
    trainer._device.capacity = capacity


def assert_shadow_is_fresh(trainer: sf.Trainer) -> None:
    trainer.wait()
    W = trainer.sae.W_enc
    assert ops.stale_rows(W, trainer.state.kept.shadow, 0, W.shape[0]) == 0


# ---- The trajectory ---------------------------------------------------------------------------------------------------

SCHEDULES = dict(lr_warmup_steps=2, l1_warmup_steps=3, lr_decay_start=2, total_steps=5)


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("cls", [sf.GatedSAE, sf.ReluSAE])
@pytest.mark.parametrize("dialect", ["paper", "saelens"])
def test_steps_are_as_close_to_float64_as_torchs_own_and_logged_as_the_cpu_engine_does(cls, dialect):
    """With schedules; half of them clipped.  eps is large, or Adam would hide a factor on the gradient."""
    settings = dict(lr=3e-2, l1_coefficient=0.4, betas=(0.0, 0.999), eps=1e-2, dialect=dialect)
    data, start = batches(4), make(cls, device="cpu")
    free, clip = PlainTrainer(start, **settings), None
    if (cls is sf.GatedSAE) == (dialect == "saelens"):
        clip = sorted(free.step(x.cpu())[1] for x in data)[1]
    with use_backend("cpu"):
        twin = sf.Trainer(make(cls, device="cpu"), grad_clip=clip, **SCHEDULES, **settings)
        wanted = [twin.step(x.cpu()) for x in data]
    trainer = sf.Trainer(make(cls), grad_clip=clip, **SCHEDULES, **settings)
    logs = [trainer.step(x) for x in data]
    assert trainer._device.graphs is not None
    for got, want in zip(fields(logs), fields(wanted), strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-7)
        assert got[4:] == want[4:], "L0, rates and the step to the last bit"
    norms = assert_within_the_spread(trainer.sae, data, start, logs, clip, **settings)
    assert clip is None or max(norms) > clip


@pytest.mark.slow
def test_the_trajectory_stays_within_the_spread_of_the_permuted_reference():
    """At the paper's eps, where rounding becomes steps of full size: DESIGN.md's band."""
    trainer, ours = trainer_of(), Run()
    start = {name: p.detach().cpu().clone() for name, p in trainer.sae.named_parameters()}
    for x in batches():
        log = trainer.step(x)
        ours.record(log.loss, {name: p.cpu() for name, p in trainer.sae.named_parameters()})
    data = [x.cpu() for x in batches()]
    plain, *permuted = (reference_run(start, data, *SETTINGS.values(), seed) for seed in (None, *range(8)))
    spread = [run.deviation(plain) for run in permuted]
    for what, deviation in ours.deviation(plain).items():
        allowed = 2 * torch.stack([s[what] for s in spread]).amax(0) + ROUNDING[what]
        assert (deviation <= allowed).all(), f"{what}: {deviation} of {allowed}"


@pytest.mark.slow
def test_at_precision_bf16_the_product_decides_and_training_is_nearly_the_same():
    trainer = sf.Trainer(make(precision="bf16"), **SETTINGS)
    logs = [trainer.step(x) for x in batches()[:2]]
    assert trainer._device.graphs is not None
    for got, want in zip(fields(logs), told().logs, strict=False):
        assert got[:4] == pytest.approx(want[:4], rel=5e-3) and abs(got[4] - want[4]) <= 0.5


# ---- Nothing is dropped -----------------------------------------------------------------------------------------------


def test_a_run_repeats_bit_for_bit_whatever_room_there_is(recoveries):
    trainer, capacity = trainer_of(), max(told(LOUD).candidates)
    with_room_for(trainer, capacity)
    logs = [trainer.step(x) for x in batches(loud=LOUD)]
    assert_same_bits(everything(trainer), told(LOUD).state)
    assert fields(logs) == told(LOUD).logs and trainer._device.capacity == capacity and not recoveries


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("case", ["last", "three", "every"])
def test_a_step_that_found_too_little_room_is_repeated_with_more(case, recoveries, monkeypatch):
    monkeypatch.setattr(device_steps, "GRAIN", 1)
    c = told(LOUD).candidates
    quiet = max(c[0], c[1], c[3])
    assert quiet < c[2] and 1.25 * c[2] < c[4] and 1.25 * c[4] < c[5], f"more and more: {c}"
    capacity, steps = {"last": (c[4], [5]), "three": (quiet, [2, 4, 5]), "every": (1, [0, 1, 2, 3, 4, 5])}[case]
    trainer, logs = trainer_of(), []
    with_room_for(trainer, capacity)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in batches(loud=LOUD):
            if case == "every":
                trainer.wait()
                trainer._device.capacity = 1
            logs.append(trainer.step(x))
            x.fill_(float("nan"))  # what is repeated is not the caller's
        assert_same_bits(everything(trainer), told(LOUD).state)
    assert fields(logs) == told(LOUD).logs
    assert recoveries == [(step, OVERFLOW) for step in steps]
    assert not [w for w in caught if "W_enc" in str(w.message)]
    assert_shadow_is_fresh(trainer)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("cls", [sf.GatedSAE, sf.ReluSAE])
def test_a_step_too_dense_for_gathering_is_taken_densely_and_the_rest_is_not(cls, monkeypatch, recoveries):
    settings, limit, data = dict(SETTINGS, eps=1e-2), 30, batches(5, loud=(0, 0, 5))
    monkeypatch.setattr(crossovers, "gpu_rejects", lambda nnz, rows, features: "it is dense" if nnz > limit else None)
    trainer = sf.Trainer(make(cls), **settings)
    with_room_for(trainer, limit)
    logs = [trainer.step(x) for x in data]
    trainer.wait()
    assert recoveries == [(2, OVERFLOW)] and trainer._device.capacity == limit, "no larger buffer for it"
    assert [log.result.report.by_ops for log in logs] == [False, False, True, False, False]
    assert {int(s["step"]) for s in trainer.optimizer.state.values()} == {5}
    assert_within_the_spread(trainer.sae, data, make(cls, device="cpu"), logs, **settings)
    assert logs[2].l0 > logs[1].l0 and logs[2].losses.dtype == torch.float32
    assert_shadow_is_fresh(trainer)


def test_which_way_a_batch_takes_does_not_hang_on_those_before_it(monkeypatch):
    """However much room an earlier batch was given."""
    monkeypatch.setattr(
        crossovers, "gpu_rejects", lambda nnz, rows, features: "dense" if nnz > 0.25 * rows * features else None
    )
    monkeypatch.setattr(crossovers, "GPU_DENSE", 0.25)
    data = batches(2, loud=(0, 5))
    for first in (data[0], data[0].repeat(20, 1)):
        trainer = trainer_of()
        trainer._device._ready(first)
        trainer.step_count = 1
        for state in trainer.optimizer.state.values():
            state["step"] = 1
        log = trainer.step(data[1])
        assert log.l0 > 0 and log.result.report.by_ops


def test_after_a_dense_step_the_host_waits_for_each_until_one_is_sparse(monkeypatch):
    trainer = trainer_of()
    data = batches(4)
    trainer.step(data[0])
    monkeypatch.setattr(crossovers, "gpu_rejects", lambda *_: "it is dense")
    trainer._device.capacity = 1
    trainer.step(data[1])
    assert not trainer._device.dense and len(trainer._device.under_way) == 1
    trainer.wait()
    assert trainer._device.dense and not trainer._device.under_way
    trainer.step(data[2])
    assert not trainer._device.under_way, "waited for"
    monkeypatch.undo()
    trainer._device.capacity = 100
    trainer.step(data[2])
    assert not trainer._device.dense
    trainer.step(data[3])
    assert len(trainer._device.under_way) == 1


# ---- What must not happen ---------------------------------------------------------------------------------------------

BAD = {
    "nan": (float("nan"), r"^step 2: x: got nan at index \(4, 3\) of shape \(5, 6\), want finite values"),
    "huge": (1e25, "step 2: the reconstruction is not finite; the weights are unchanged"),
}


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_stops_the_run_where_it_was(case, recoveries):
    value, message = BAD[case]
    error = FloatingPointError if case == "huge" else ValueError
    data = batches()
    good, bad = data[2], data[2].clone()
    bad[4, 3] = value
    trainer = trainer_of()
    trainer.step(data[0])
    logs = [trainer.step(x) for x in (data[1], bad, data[3], data[4])]
    assert trainer.step_count == 5, "the host knows of nothing"
    with pytest.raises(error, match=message):
        trainer.wait()
    assert [(i, bool(flag & NOT_FINITE)) for i, flag in recoveries] == [(2, case == "nan")]
    assert trainer.step_count == 2 and not trainer._device.under_way
    assert_same_bits(everything(trainer), told().states[2])
    assert_shadow_is_fresh(trainer)
    assert fields(logs[:1]) == told().logs[1:2], "what had happened can be read"
    for log in logs[1:]:
        with pytest.raises(error, match=r"^step 2: "):
            _ = log.loss
    for x in (good, *data[3:]):
        trainer.step(x)
    assert_same_bits(everything(trainer), told().state)


def test_a_bad_batch_is_found_by_the_step_that_needs_its_place():
    data = batches(8)
    data[1][0, 0] = float("nan")
    trainer, taken = trainer_of(), 0
    with pytest.raises(ValueError, match=r"^step 1: x: got nan"):
        for taken, x in enumerate(data):  # noqa: B007
            trainer.step(x)
    assert taken == 1 + device_steps.AHEAD and trainer.step_count == 1
    assert_same_bits(everything(trainer), told().states[1])


def test_a_bad_index_is_that_of_the_batch_as_it_was_given():
    data = batches(2)
    trainer, bad = trainer_of(), data[1][:4].half().reshape(2, 2, D)
    bad[1, 0, 5] = float("-inf")
    trainer.step(data[0])
    trainer.step(bad)
    with pytest.raises(ValueError, match=r"^step 1: x: got -inf at index \(1, 0, 5\) of shape \(2, 2, 6\)"):
        trainer.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b_dec", "r_mag"])
def test_weights_that_make_a_loss_overflow_stop_the_run_where_it_was(name, recoveries):
    data, trainer = batches(), trainer_of()
    for x in data[:2]:
        trainer.step(x)
    trainer.wait()
    p = trainer.sae.get_parameter(name)
    sound = p.detach().clone()
    with torch.no_grad():
        p.copy_(p.sign() * 1e30 if p.dim() == 2 else torch.full_like(p, 100.0 if name == "r_mag" else 1e30))
    before = everything(trainer)
    for x in data[2:4]:
        trainer.step(x)
    with pytest.raises(FloatingPointError, match=r"^step 2: .*not finite; the weights are unchanged"):
        trainer.wait()
    assert recoveries and recoveries[-1][0] == 2 and recoveries[-1][1] & (NOT_FINITE_LOSS | NOT_FINITE)
    assert_same_bits(everything(trainer), before)
    with torch.no_grad():
        p.copy_(sound)
    trainer.step(data[2])
    assert_same_bits(everything(trainer), told().states[3])


@pytest.mark.slow
@pytest.mark.parametrize("unit", [True, False], ids=["unit rows", "any rows"])
def test_a_bad_first_batch_leaves_the_trainer_as_new(unit):
    """Calibration and unit rows undone.  On a GPU the host does not look at the values of x before the step."""

    def fresh():
        trainer = trainer_of(init_l0=3)
        if not unit:
            with torch.no_grad():
                trainer.sae.W_dec.mul_(3.3)
        trainer.sae.check_input = lambda x, name="x": x.to(torch.float32).reshape(-1, D)
        return trainer

    data, trainer, clean = batches(2), fresh(), fresh()
    before = everything(trainer)
    bad = data[0].clone()
    bad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^step 0: x: got nan at index \(0, 0\)"):
        trainer.step(bad)
    assert_same_bits(everything(trainer), before)
    for x in data:
        trainer.step(x)
        clean.step(x)
    assert_same_bits(everything(trainer), everything(clean))


# ---- Batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_in_16_bits_trains_like_its_numbers():
    x = batches(1)[0].half()
    narrow, wide = trainer_of(), trainer_of()
    narrow.step(x)
    wide.step(x.float())
    assert_same_bits(everything(narrow), everything(wide))


@pytest.mark.slow
def test_batches_of_any_shape_and_dtype_train_like_their_rows():
    x = batches(6, seed=1)
    views = [
        x[0],
        x[1][:4].half().reshape(2, 2, D),
        x[2].half(),
        x[3][:4],
        x[4].t().contiguous().t(),
        x[5].requires_grad_(),
    ]
    plain, other = trainer_of(), trainer_of()
    for view in views:
        plain.step(view.detach().float().reshape(-1, D).contiguous())
        own = view.detach().clone(memory_format=torch.preserve_format).requires_grad_(view.requires_grad)
        other.step(own)
        with torch.no_grad():
            own.fill_(float("nan"))  # as a loader does that has one buffer
    assert_same_bits(everything(plain), everything(other))


# ---- Who else changes the weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [6, 40])
def test_every_row_is_compared_within_16_steps_and_16_columns_of_all_at_once(d):
    W, flag = randn(F, d, seed=1).to(DEVICE), torch.zeros((), dtype=torch.int32, device=DEVICE)
    W[2], W[3, 5] = 1e-40, float("nan")  # which are no changes
    shadow, turns = ops.make_shadow(W), -(-d // 16)
    for index in range(3 * 16):
        step = torch.tensor(index + 1, device=DEVICE)
        watch(W, *shadow, step, flag)
        assert flag == 0
        seen = set()
        for row in range(F):
            changed = W.clone()
            changed[row, :: d - 1] += 1  # in the first column and the last
            watch(changed, *shadow, step, flag)
            if flag == STALE:
                seen.add(row)
            flag.zero_()
        sixteenth = set(range(F * (index % 16) // 16, F * (index % 16 + 1) // 16))
        assert seen == (set(range(F)) if index % turns in (0, turns - 1) else sixteenth)


def watch_later(W: Tensor, rows: Tensor, norms: Tensor, step: Tensor, flag: Tensor) -> None:
    """From step 3 on, as where the columns do not show a change."""
    seen = torch.zeros_like(flag)
    watch(W, rows, norms, step, seen)
    flag.bitwise_or_(torch.where(step > 3, seen, 0))


@pytest.mark.slow
@pytest.mark.parametrize("found", [1, 3], ids=["at once", "later"])
def test_a_change_behind_torchs_back_is_found_and_said_and_what_followed_is_repeated(found, recoveries, monkeypatch):
    """Of a row that no step touches; the twin is told at once."""
    if found == 3:
        monkeypatch.setattr(device_step, "watch", watch_later)
    row, data = F * 3 // 16, batches()
    trainer, twin = trainer_of(), trainer_of()
    for t in (trainer, twin):
        with torch.no_grad():
            t.sae.b_gate[row] = -1000
        t.step(data[0])
    trainer.sae.W_enc.data[row] *= 1.5
    with torch.no_grad():
        twin.sae.W_enc[row] *= 1.5
    assert ops.stale_rows(trainer.sae.W_enc, trainer.state.kept.shadow, row, row + 1) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*W_enc has been changed")
        for x in data[1:5]:
            trainer.step(x)
            twin.step(x)
        twin.wait()
    with pytest.warns(UserWarning, match=rf"^step {found}: W_enc has been changed"):
        trainer.wait()
    assert recoveries == [(found, STALE)]
    assert_shadow_is_fresh(trainer)
    assert_same_bits(everything(trainer), everything(twin))


CHANGES = {
    "in place": lambda sae, W: sae.W_enc.copy_(W),
    "load_state_dict": lambda sae, W: sae.load_state_dict({"W_enc": W}, strict=False),
    "new memory": lambda sae, W: setattr(sae.W_enc, "data", W.clone()),
}


@cache
def told_of_a_change() -> tuple[Tensor, list[Tensor]]:
    """New values of W_enc after a step, every feature's another's, and the state after the next."""
    trainer, data = trainer_of(), batches()
    trainer.step(data[0])
    W = trainer.sae.W_enc.detach().flip(0).clone()
    with torch.no_grad():
        trainer.sae.W_enc.copy_(W)
    trainer.state.kept, trainer._device.graphs = ops.KeptShadow(), None
    trainer.step(data[1])
    return W, everything(trainer)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_torch_counts_is_seen_at_once(change, recoveries):
    """A screen of what W_enc was would miss members."""
    data, trainer = batches(), trainer_of()
    W, wanted = told_of_a_change()
    trainer.step(data[0])
    with torch.no_grad():
        CHANGES[change](trainer.sae, W)
    trainer.step(data[1])
    assert_shadow_is_fresh(trainer)
    assert not recoveries
    assert_same_bits(everything(trainer), wanted)


@pytest.mark.slow
def test_parameters_that_move_to_other_memory_are_followed():
    trainer, data = trainer_of(), batches()
    for i, x in enumerate(data):
        if i == 3:
            trainer.wait()
            kept = [p.data for p in trainer.sae.parameters()]
            for p in trainer.sae.parameters():
                p.data = p.data.clone()
                state = trainer.optimizer.state[p]
                state["exp_avg_sq"] = state["exp_avg_sq"].clone()
            for old in kept:
                old.fill_(float("nan"))
        trainer.step(x)
    assert_same_bits(everything(trainer), told().state)


# ---- Around the steps -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_at_most_so_many_steps_are_under_way_and_wait_ends_them():
    trainer, ahead = trainer_of(), []
    for x in batches():
        trainer.step(x)
        ahead.append(len(trainer._device.under_way))
    assert ahead == [0, 1, 2, 3, 4, 4] and device_steps.AHEAD == 4
    assert {int(s["step"]) for s in trainer.optimizer.state.values()} == {2}, "as far as the host knows"
    trainer.wait()
    assert not trainer._device.under_way
    assert {int(s["step"]) for s in trainer.optimizer.state.values()} == {STEPS} and trainer.step_count == STEPS
    trainer.wait()


def test_reading_a_log_waits_for_its_step_only():
    trainer = trainer_of()
    logs = [trainer.step(x) for x in batches()[:4]]
    assert logs[1].loss == told().logs[1][0] and len(trainer._device.under_way) == 2
    assert fields(logs) == told().logs[:4] and not trainer._device.under_way
    assert fields(logs) == told().logs[:4], "as often as one likes"


READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu")


@pytest.mark.slow
def test_the_host_reads_nothing_from_the_device_in_a_steady_state_step(monkeypatch):
    data, reads = batches(12), []
    trainer = trainer_of()
    for x in data[: 1 + device_steps.AHEAD]:
        trainer.step(x)  # compiles, captures
    trainer.wait()
    enqueue = data[1 + device_steps.AHEAD : 1 + 2 * device_steps.AHEAD]
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            for x in enqueue:
                trainer.step(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def unseen(self, *args, **kwargs):  # the interpreter reads; a device does that for itself
            reads.append(None)
            result = launch(self, *args, **kwargs)
            del reads[reads.index(None) :]
            return result

        monkeypatch.setattr(GridExecutor, "__call__", unseen)
        for name in READS:
            method = getattr(Tensor, name)

            def spy(self, *args, _name=name, _method=method, **kwargs):
                if None not in reads:
                    reads.append(_name)
                return _method(self, *args, **kwargs)

            monkeypatch.setattr(Tensor, name, spy)
        trainer.step(enqueue[0])
        monkeypatch.undo()
        assert reads == []
    assert len(trainer._device.under_way) == (1 if DEVICE == "cpu" else device_steps.AHEAD)
    trainer.wait()


@pytest.mark.slow
def test_copies_and_checkpoints_amid_steps_go_on_bit_for_bit(tmp_path):
    trainer, data = trainer_of(), batches()
    for x in data[:4]:
        trainer.step(x)
    assert trainer._device.under_way
    trainer.save(tmp_path / "saved")
    resumed, other = sf.Trainer.load(tmp_path / "saved", DEVICE), copy.deepcopy(trainer)
    for t in (resumed, other):
        assert_same_bits(everything(t), told().states[4])
    for t in (trainer, resumed, other):
        for x in data[4:]:
            t.step(x)
    assert len({t._device.graphs for t in (trainer, resumed, other)} - {None}) == 3
    for t in (trainer, resumed, other):
        assert_same_bits(everything(t), told().state)


def test_a_copy_waits_for_the_steps_under_way():
    trainer = trainer_of()
    for x in batches()[:2]:
        trainer.step(x)
    assert trainer._device.under_way
    assert_same_bits(everything(copy.deepcopy(trainer)), told().states[2])


def test_the_layer_waits_for_its_trainer():
    trainer, data = trainer_of(), batches()
    for x in data[:3]:
        trainer.step(x)
    assert trainer._device.under_way
    weights = trainer.sae.state_dict()
    assert not trainer._device.under_way
    wanted = dict(zip(dict(trainer.sae.named_parameters()), told().states[3][1::5], strict=True))
    for name, w in weights.items():
        assert_same_bits(w.cpu(), wanted[name])


@pytest.mark.slow
def test_fit_is_the_steps_one_by_one():
    trainer = trainer_of()
    history = trainer.fit(batches(), log_every=4, progress=False)
    assert [r["step"] for r in history] == [0, 4, 5] and not trainer._device.under_way
    assert_same_bits(everything(trainer), told().state)
    for record in history:
        assert set(record) == RECORD
        for field, value in zip(FIELDS, told().logs[record["step"]], strict=True):
            assert record[field] == value


def test_an_error_in_fit_leaves_the_weights_of_the_last_good_step():
    data, trainer = batches(), trainer_of()
    data[3][2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"^step 3: x: got nan at index \(2, 1\) of shape \(5, 6\)"):
        trainer.fit(data, log_every=100, progress=False)
    assert_same_bits(everything(trainer), told().states[3])


def test_a_trainer_goes_on_where_the_device_path_ends():
    """On the host's path, with a Shadow in the form of its engine; and back."""
    data, trainer = batches(), trainer_of(eps=1e-2)
    for i, x in enumerate(data):
        with use_backend("reference" if DEVICE == "cuda" else "cpu") if i in (2, 3) else use_backend("triton"):
            trainer.step(x)
    assert_shadow_is_fresh(trainer)
    assert_within_the_spread(trainer.sae, data, make(device="cpu"), eps=1e-2, **SETTINGS)


def trainer_without_momentum():
    """As after steps at β1 = 0, which are to go on at β1 > 0: the host says why not."""
    trainer = trainer_of()
    trainer.step(batches()[0])
    trainer.settings = trainer_of(betas=(0.9, 0.999)).settings
    for group in trainer.optimizer.param_groups:
        group["betas"] = 0.9, 0.999
    return trainer


REFUSED = {
    "no momentum": (trainer_without_momentum, "a parameter has no momentum from earlier steps"),
    "no eps": (lambda: trainer_of(eps=0.0), r"eps = 0 visits every row"),
    "float64": (lambda: sf.Trainer(make().double(), **SETTINGS), "the weights are torch.float64"),
    "fp32": (lambda: sf.Trainer(make(precision="fp32"), **SETTINGS), "precision 'fp32' takes torch's product"),
    "wide": (lambda: sf.Trainer(sf.ReluSAE(2**15 + 1, 2, device=DEVICE), **SETTINGS), "32769 are wider than 32768"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_device_path_does_not_take_is_logged_with_the_reason(case, caplog, monkeypatch):
    build, reason = REFUSED[case]
    monkeypatch.setattr(dispatch, "_logged", set())
    trainer = build()
    with caplog.at_level(logging.DEBUG, logger="sae_fast"):
        assert trainer._steps() is trainer._host
    (message,) = (r.getMessage() for r in caplog.records)
    assert message.startswith("Trainer: not the GPU's own step: ")
    assert re.search(reason, message)


def test_another_forced_backend_takes_the_host_path():
    trainer = trainer_of()
    with use_backend("reference"):
        trainer.step(batches()[0])
        assert trainer._device.graphs is None
    trainer.step(batches()[0])
    assert trainer._device.graphs is not None and trainer.step_count == 2


MOMENTUM = {  # β of each step
    "all along": [(0.9, 0.99)] * STEPS,
    "changing": [(0.9, 0.99)] * 2 + [(0.5, 0.99)] * 2 + [(0.0, 0.9)] * 2,
    "another decay": [(0.0, 0.99)] * 2 + [(0.0, 0.9)] * 4,
}


def with_betas(trainer: sf.Trainer, betas: tuple[float, float]) -> None:
    trainer.settings = replace(trainer.settings, betas=betas)
    for group in trainer.optimizer.param_groups:
        group["betas"] = betas


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("case", MOMENTUM)
@pytest.mark.parametrize("cls", [sf.GatedSAE, sf.ReluSAE])
def test_with_momentum_and_changing_betas_steps_are_as_close_to_float64_as_the_cpu_engines(cls, case):
    """Half of them clipped; in most a parameter is frozen after a while."""
    judge, clip = Judge(), 2.0 if cls is sf.GatedSAE else None
    found = {}
    for name, backend, double in (("ours", "triton", False), ("engine", "cpu", False), ("exact", "reference", True)):
        device = DEVICE if name == "ours" else "cpu"
        with use_backend(backend):
            sae = make(cls, device=device)
            trainer = sf.Trainer(
                sae.double() if double else sae, **SETTINGS, eps=1e-2, betas=MOMENTUM[case][0], grad_clip=clip
            )
            for i, (x, betas) in enumerate(zip(batches(), MOMENTUM[case], strict=True)):
                with_betas(trainer, betas)
                sae.b_dec.requires_grad_(i < 3 or case == "another decay")
                assert name != "ours" or trainer._steps() is trainer._device
                trainer.step(x.to(device, torch.float64 if double else torch.float32))
            trainer.wait()
        found[name] = {name: p.detach().cpu() for name, p in sae.named_parameters()}
    for name, p in found["ours"].items():
        judge.add(name, p, found["engine"][name], found["exact"][name])
    judge.verdict()


@pytest.mark.parametrize("cls", [sf.GatedSAE, sf.ReluSAE])
def test_dead_features_are_counted_as_on_the_host(cls, recoveries):
    """Also where a step is repeated, and where the host takes one between."""
    data, found = batches(loud=LOUD), []
    for backend in ("triton", "cpu"):
        trainer, logs = sf.Trainer(make(cls, device=DEVICE if backend == "triton" else "cpu"), **SETTINGS, dead_after=7), []
        trainer._device.capacity = max(told(LOUD).candidates[:2])
        for i, x in enumerate(data):
            if i == 3:
                trainer.wait()
            with use_backend("cpu" if i == 3 and DEVICE == "cpu" else backend):
                logs.append(trainer.step(x if backend == "triton" else x.cpu()))
        trainer.wait()
        found.append(([log.dead for log in logs], trainer.state.since_fired.tolist()))
    assert found[0] == found[1] and recoveries
    assert len(set(found[0][0])) > 2, "they die, and come back"


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU, whose kernels take no tensor on the CPU")
def test_a_shadow_is_remade_where_its_form_changes(screened):
    """The kernels' form is not the C++ engine's."""
    W, kept = make(device="cpu").W_enc, ops.KeptShadow()
    assert kept.of(W).of_gpu
    with use_backend("cpu"):
        assert not kept.of(W).of_gpu
    assert kept.of(W).of_gpu
