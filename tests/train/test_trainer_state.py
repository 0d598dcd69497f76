"""What a Trainer holds together: frozen, replaced and foreign parameters, writes behind its back, interrupts, saves."""

from __future__ import annotations

import copy
import json
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits, randn
from problems.trainer import CLASSES, D_IN, D_SAE, PlainTrainer, batches, everything, make, weights_of

import sae_fast as sf
from sae_fast import ops, use_backend
from sae_fast.ops import crossovers
from sae_fast.signals import leaving, noticing, uninterrupted

classes = pytest.mark.parametrize("cls", CLASSES)
SETTINGS = dict(lr=1e-2, l1_coefficient=0.4)


@pytest.fixture(autouse=True)
def one_thread_and_the_lazy_route(monkeypatch):
    torch.set_num_threads(1)
    for op in crossovers.CROSSOVER:
        monkeypatch.setitem(crossovers.CROSSOVER, op, float("inf"))


def trained(steps: int = 3, cls=sf.GatedSAE, **settings) -> sf.Trainer:
    trainer = sf.Trainer(make(cls), **{**SETTINGS, **settings})
    for x in batches(steps):
        trainer.step(x)
    return trainer


# ---- The weight of the sparsity -------------------------------------------------------------------------------------


def test_the_sparsity_coefficient_has_to_be_given():
    with pytest.raises(ValueError, match=r"^l1_coefficient: got None, want λ ≥ 0.*raise it where L0"):
        sf.Trainer(make())


# ---- Frozen ---------------------------------------------------------------------------------------------------------

NAMES = {
    sf.GatedSAE: ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
    sf.ReluSAE: ("W_enc", "W_dec", "b_dec", "b_enc"),
}


@pytest.mark.parametrize("cls, name", [(cls, name) for cls, names in NAMES.items() for name in names])
@pytest.mark.parametrize("dialect", ["paper", "saelens"])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)], ids=str)
def test_a_frozen_parameter_keeps_its_bits_and_the_rest_trains_as_in_torch(cls, name, dialect, betas):
    settings = dict(lr=3e-3, l1_coefficient=0.4, betas=betas, dialect=dialect, grad_clip=0.5)
    sae = make(cls, torch.float64)
    plain, trainer = PlainTrainer(sae, **settings), sf.Trainer(sae, **settings)
    plain.p[name].requires_grad_(False)
    plain.adam = torch.optim.Adam([p for p in plain.p.values() if p.requires_grad], lr=3e-3, betas=betas)
    sae.get_parameter(name).requires_grad_(False)
    sae.get_parameter(name).grad = torch.ones_like(sae.get_parameter(name))  # stale
    before = weights_of(sae)
    for x in batches(8, torch.float64):
        trainer.step(x)
        plain.adam.zero_grad()
        plain.loss(x).total.backward()
        torch.nn.utils.clip_grad_norm_([p for p in plain.p.values() if p.requires_grad], 0.5)
        W = plain.p["W_dec"]
        with torch.no_grad():
            if dialect == "paper" and W.grad is not None:
                W.grad = ops.project_rows(W.grad, W.detach())
            plain.adam.step()
        if W.requires_grad:
            plain.normalise()
    for n, p in sae.named_parameters():
        if n == name:
            assert_same_bits(p.detach(), before[n])
        else:
            torch.testing.assert_close(
                p.detach(), plain.p[n].detach(), rtol=1e-9, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}"
            )
            assert not torch.equal(p.detach(), before[n])


@pytest.mark.parametrize("route", ["sparse", "dense"], indirect=True)
@classes
def test_frozen_rows_of_any_norm_and_a_frozen_bias_are_not_touched_by_the_first_step(cls, route):
    sae = cls(D_IN, D_SAE, seed=0)
    bias, *others = sae.per_feature
    with torch.no_grad():
        sae.W_dec.mul_(3)
    for name in ("W_dec", bias):
        sae.get_parameter(name).requires_grad_(False)
    before = weights_of(sae)
    trainer = sf.Trainer(sae, **SETTINGS, init_l0=5)
    for x in batches(2):
        trainer.step(x)
    assert_same_bits([before["W_dec"], before[bias]], [sae.W_dec.detach(), sae.get_parameter(bias).detach()])
    if "b_mag" in others:
        thawed = cls(D_IN, D_SAE, seed=0)
        thawed.get_parameter("b_mag").requires_grad_(False)
        trainer = sf.Trainer(thawed, **SETTINGS, init_l0=5)
        assert trainer.step(batches(1)[0]).l0 + 2 > 3 and bool((thawed.get_parameter("b_mag") == 0).all())


def test_a_decoder_that_is_thawed_later_starts_as_in_a_trainers_first_step():
    trainer = sf.Trainer(make(), **SETTINGS)
    with torch.no_grad():
        trainer.sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
    trainer.sae.W_dec.requires_grad_(False)
    for x in batches(3):
        trainer.step(x)
    trainer.sae.W_dec.requires_grad_(True)
    log, x = trainer.step(batches(1)[0]), batches(1)[0]
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    twin = copy.deepcopy(trainer)
    for t in (trainer, twin):
        t.step(x)
    assert log.step == 3 and trainer.optimizer.state[trainer.sae.W_dec]["step"] == 2
    assert_same_bits(everything(trainer), everything(twin))


def test_a_parameter_that_missed_a_step_takes_the_steps_from_the_device_and_they_go_back():
    pytest.importorskip("triton")
    with use_backend("triton"):
        trainer = sf.Trainer(sf.GatedSAE(6, 20, seed=0), **SETTINGS, init_l0=3)
        x = 0.8 * randn(5, 6, seed=7)
        trainer.step(x)
        assert trainer._device.graphs is not None and trainer._device.refuses() is None
        trainer.sae.b_dec.requires_grad_(False)
        before = trainer.sae.b_dec.detach().clone()
        assert trainer._device.refuses() is None
        trainer.step(x)
        trainer.wait()
        assert torch.equal(before, trainer.sae.b_dec)
        trainer.sae.b_dec.requires_grad_(True)
        assert trainer._device.refuses() is not None, "b_dec has missed a step"
        trainer.optimizer.state[trainer.sae.b_dec]["step"] = 2
        assert trainer._device.refuses() is None
        trainer.optimizer.param_groups[1].update(betas=(0.0, 0.9))
        assert trainer._device.refuses() is not None


# ---- Replaced -------------------------------------------------------------------------------------------------------


def assign(sae):
    sae.load_state_dict({k: v.clone() for k, v in sae.state_dict().items()}, assign=True)


def new_parameter(sae):
    sae.b_dec = torch.nn.Parameter(sae.b_dec.detach().clone())


def overwriting_to(sae):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        sae.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


REPLACED = {
    "load_state_dict(assign=True)": (assign, r"W_enc: got a Parameter that the optimizer does not hold"),
    "a new Parameter": (new_parameter, r"b_dec: got a Parameter that the optimizer does not hold"),
    "to() that replaces": (overwriting_to, r"W_enc: got a Parameter that the optimizer does not hold"),
    "half()": (lambda sae: sae.half(), r"W_enc: got torch.float16"),
    "double()": (
        lambda sae: sae.double(),
        r"W_enc: got torch.float64 \(70, 12\) on cpu, but the optimizer's state is torch.f",
    ),
    "meta": (lambda sae: sae.to("meta"), r"W_enc: got a Parameter that the optimizer does not hold"),
    "another shape": (lambda sae: setattr(sae.b_dec, "data", torch.zeros(3)), r"b_dec: got torch.float32 \(3,\)"),
    "strides": (lambda sae: setattr(sae.W_dec, "data", torch.zeros(D_IN, D_SAE).T), r"W_dec: got torch.float32, strides"),
}


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("what", ["step", "save"])
def test_a_parameter_that_was_replaced_is_named_by_the_next_step_and_save(how, what, tmp_path):
    change, message = REPLACED[how]
    trainer = trained()
    change(trainer.sae)
    before = everything(trainer) if how != "meta" else []
    where = "^step 3: " if what == "step" else "^"
    with pytest.raises(ValueError, match=where + message):
        trainer.step(batches(1)[0]) if what == "step" else trainer.save(tmp_path / "run")
    assert not (tmp_path / "run").exists() and (
        how == "meta" or not any((a != b).any() for a, b in zip(before, everything(trainer), strict=True))
    )


def test_parameters_beside_the_saes_in_the_optimizer_are_refused():
    trainer = trained()
    trainer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match=r"^step 3: optimizer: got 1 parameters that are not the SAE's"):
        trainer.step(batches(1)[0])


def test_values_that_are_copied_in_train_on():
    trainer, twin = trained(), trained()
    trainer.sae.load_state_dict({k: v.clone() for k, v in trainer.sae.state_dict().items()})
    for t in (trainer, twin):
        t.step(batches(1)[0])
    assert_same_bits(everything(trainer), everything(twin))


# ---- Written behind torch's back ------------------------------------------------------------------------------------


def resample_data(W, rows, new):
    W.data[rows] = new


def resample_numpy(W, rows, new):
    W.detach().numpy()[rows] = new.numpy()


def scale_data(W, rows, new):
    W.data[rows] *= 3


def zero_data(W, rows, new):
    W.data[rows] = 0


@pytest.mark.parametrize("change", [resample_data, resample_numpy, scale_data, zero_data], ids=lambda f: f.__name__)
@pytest.mark.parametrize("d", [24, 40])
def test_rows_that_are_changed_by_data_are_screened_anew_from_the_next_step_on(change, d, screened):
    """The usual idiom of resampling dead features."""
    F = 300
    trainer, told = (sf.Trainer(sf.GatedSAE(d, F, seed=0), **SETTINGS, init_l0=9) for _ in range(2))
    for i in range(40):
        x = randn(90, d, seed=i)
        if i in (1, 5, 22):
            for t in (trainer, told):
                change(t.sae.W_enc, [i, 100 + i, 250 + i], randn(3, d, seed=1000 + i))
            told.state.kept = ops.KeptShadow()
            with pytest.warns(UserWarning, match=f"^step {i}: W_enc has been changed"):
                log = trainer.step(x)
            assert log.l0 == told.step(x).l0
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert trainer.step(x).l0 == told.step(x).l0
    assert_same_bits(everything(trainer), everything(told))


@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_columns_take_turns_and_subnormals_and_nans_are_no_change(name):
    with use_backend(name):
        W = randn(7, 40, seed=1)
        W[2] = 1e-40
        W[3, 5] = float("nan")
        shadow = ops.make_shadow(W)
        assert [bool(ops.stale_columns(W, shadow, turn)) for turn in range(4)] == [False] * 4
        W[1, 33:] += 1
        assert [bool(ops.stale_columns(W, shadow, turn)) for turn in range(6)] == [False, False, True] * 2


# ---- Interrupted ----------------------------------------------------------------------------------------------------


@contextmanager
def interrupt_at(line: int, seen: list[str]):
    """Sends SIGINT before the ``line``-th line that runs in this package's files on the host."""

    def trace(frame, event, _):
        if "sae_fast" not in frame.f_code.co_filename or "kernels" in frame.f_code.co_filename:  # which are interpreted
            return None
        if event == "line":
            seen.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(seen) == line + 1:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(run) -> int:
    seen: list[str] = []
    with interrupt_at(-2, seen):
        run()
    return len(seen)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)], ids=str)
def test_an_interrupt_at_any_line_leaves_the_step_whole_or_not_begun_and_the_count_says_which(betas):
    data = batches(3)
    base = sf.Trainer(make(), **SETTINGS, betas=betas, init_l0=5, grad_clip=1.0)
    if betas[0] == 0:
        base.step(data[0])
    first = base.step_count
    states, twin = [everything(base)], copy.deepcopy(base)
    for x in data[:2]:
        twin.step(x)
        states.append(everything(twin))
    counted = copy.deepcopy(base)
    total, taken = lines_of(lambda: counted.step(data[0])), set()
    for line in [*range(0, total, max(1, total // 40)), total - 2, total - 1]:
        trainer = copy.deepcopy(base)
        with pytest.raises(KeyboardInterrupt), interrupt_at(line, []):
            trainer.step(data[0])
        done = trainer.step_count - first
        taken.add(done)
        assert_same_bits(everything(trainer), states[done])
        for x in data[done:2]:
            trainer.step(x)
        assert_same_bits(everything(trainer), states[2])
    assert taken == {0, 1}


@pytest.mark.slow
def test_an_interrupt_on_the_devices_path_is_no_different():
    pytest.importorskip("triton")
    with use_backend("triton"):
        data = [0.8 * randn(5, 6, seed=i) for i in range(4)]
        base = sf.Trainer(sf.GatedSAE(6, 20, seed=0), **SETTINGS, init_l0=3)
        for x in data[:2]:
            base.step(x)
        base.wait()
        twin = copy.deepcopy(base)
        states = [everything(base)]
        for x in data[2:]:
            twin.step(x)
            twin.wait()
            states.append(everything(twin))

        def run(trainer):
            trainer.step(data[2])
            trainer.wait()

        counted = copy.deepcopy(base)
        total = lines_of(lambda: run(counted))
        for line in range(7, total, total // 5):
            trainer = copy.deepcopy(base)
            with pytest.raises(KeyboardInterrupt), interrupt_at(line, []):
                run(trainer)
            trainer.wait()
            assert_same_bits(everything(trainer), states[trainer.step_count - 2])
            for x in data[trainer.step_count :]:
                trainer.step(x)
            trainer.wait()
            assert_same_bits(everything(trainer), states[2])


def test_fit_ends_between_steps_when_it_is_interrupted():
    data = batches(6)
    total = lines_of(lambda: sf.Trainer(make(), **SETTINGS).fit(data, progress=False))
    for line in range(50, total, total // 8):
        trainer, twin = (sf.Trainer(make(), **SETTINGS) for _ in range(2))
        with pytest.raises(KeyboardInterrupt), interrupt_at(line, []):
            trainer.fit(data, progress=False)
        for x in data[: trainer.step_count]:
            twin.step(x)
        assert_same_bits(everything(trainer), everything(twin))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_handler_gets_its_signal_at_the_end_and_stays(number):
    seen = []
    before = signal.getsignal(number)
    try:
        for handler in (lambda *_: seen.append(len(seen)), signal.SIG_IGN):
            signal.signal(number, handler)
            with uninterrupted(), uninterrupted():
                assert (signal.getsignal(number) is handler) == (handler is signal.SIG_IGN)
                signal.raise_signal(number)
                assert seen == ([] if handler is not signal.SIG_IGN else [0])
            assert seen == [0] and signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    with pytest.raises(KeyboardInterrupt) as caught, uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of the block")
    assert isinstance(caught.value.__context__, ValueError)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with leaving(), noticing() as signalled, uninterrupted():
            signal.raise_signal(signal.SIGTERM)
        assert not signalled() and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- What a checkpoint keeps ----------------------------------------------------------------------------------------


@classes
@pytest.mark.parametrize("precision", ["exact", "fp32", "tf32", "bf16"])
def test_every_precision_resumes_bit_for_bit(cls, precision, tmp_path):
    sae = make(cls)
    sae.precision = precision
    trainer = sf.Trainer(sae, **SETTINGS)
    for x in batches(3):
        trainer.step(x)
    trainer.save(tmp_path)
    loaded = sf.Trainer.load(tmp_path)
    assert loaded.sae.precision == sf.load(tmp_path).precision == precision
    for x in batches(6, seed=1):
        assert trainer.step(x).losses.tolist() == loaded.step(x).losses.tolist()
    assert_same_bits(everything(trainer), everything(loaded))


def test_a_precision_that_there_is_not_is_named_and_an_old_manifest_says_exact(tmp_path):
    sf.save(make(), tmp_path)
    manifest = json.loads((tmp_path / "config.json").read_text())
    for value, message in (("fp8", "precision: got 'fp8'"), (3, r"config.json: sae.precision: got 3, want str")):
        manifest["sae"]["precision"] = value
        (tmp_path / "config.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=message):
            sf.load(tmp_path)
    del manifest["sae"]["precision"]
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    assert sf.load(tmp_path).precision == "exact"


def test_frozen_parameters_and_changed_groups_resume_bit_for_bit(tmp_path):
    trainer = sf.Trainer(make(), **SETTINGS)
    trainer.sae.W_dec.requires_grad_(False)
    trainer.sae.b_mag.requires_grad_(False)
    for i, x in enumerate(batches(9)):
        if i == 3:
            trainer.sae.b_mag.requires_grad_(True)  # saved without a step of its own
        if i in (2, 3, 6):
            trainer.save(tmp_path)
            other = sf.Trainer.load(tmp_path)
            assert [p.requires_grad for p in other.sae.parameters()] == [p.requires_grad for p in trainer.sae.parameters()]
            assert [{**g, "params": 0, "lr": 0} for g in other.optimizer.param_groups] == [
                {**g, "params": 0, "lr": 0} for g in trainer.optimizer.param_groups
            ]
        if i == 5:
            for group in trainer.optimizer.param_groups:
                group.update(betas=(0.0, 0.9), eps=1e-3)
        trainer.step(x)
        if i >= 2:
            if i == 5:
                for group in other.optimizer.param_groups:
                    group.update(betas=(0.0, 0.9), eps=1e-3)
            other.step(x)
            assert_same_bits(everything(trainer), everything(other))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update(frozen=["W_other"]), "trainer.frozen: got 'W_other', want one of"),
        (lambda t: t.update(frozen=3), "frozen: got 3, want list"),
        (lambda t: t.update(groups=[{}]), "trainer.groups: got {}, want"),
        (lambda t: t["groups"].pop(), "trainer.groups: got None, want .* of group 1"),
        (lambda t: t["groups"][1].update(betas="x"), "trainer.groups: got"),
        (lambda t: t["groups"][0].update(eps=-1), "eps: got -1, want ≥ 0"),
    ],
)
def test_a_damaged_part_of_these_is_named(change, message, tmp_path):
    trained().save(tmp_path)
    manifest = json.loads((tmp_path / "config.json").read_text())
    change(manifest["trainer"])
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        sf.Trainer.load(tmp_path)


def test_a_checkpoint_of_before_has_neither_and_loads(tmp_path):
    trainer = trained()
    trainer.save(tmp_path)
    manifest = json.loads((tmp_path / "config.json").read_text())
    for key in ("frozen", "groups"):
        del manifest["trainer"][key]
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    assert_same_bits(everything(trainer), everything(sf.Trainer.load(tmp_path)))


class Own(sf.GatedSAE):
    pass


Named = type("GatedSAE", (sf.GatedSAE,), {})


@pytest.mark.parametrize("cls", [Own, Named])
def test_a_subclass_is_refused_by_every_save_before_anything_is_written(cls, tmp_path):
    trainer = sf.Trainer(cls(D_IN, D_SAE, seed=0), **SETTINGS, init_l0=4)
    trainer.step(batches(1)[0])
    for save in (trainer.save, lambda path: sf.save(trainer.sae, path)):
        with pytest.raises(ValueError, match=rf"^sae: got {cls.__name__}, want one of .* itself"):
            save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    trainer = trained()
    trainer.sae.metadata["where"] = tmp_path
    for save in (trainer.save, lambda path: sf.save(trainer.sae, path)):
        with pytest.raises(ValueError, match=r"^sae\.metadata: .*PosixPath.*want what JSON can hold"):
            save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- What a save leaves alone ---------------------------------------------------------------------------------------

OTHERS = {
    "a model of transformers": {"config.json": '{"model_type": "gpt2"}'},
    "a config without braces": {"config.json": "[]"},
    "a damaged config": {"config.json": '{"format": "sae_f'},
    "an empty config": {"config.json": ""},
    "SAELens": {"cfg.json": '{"architecture": "gated"}', "sae_weights.safetensors": "x"},
    "dictionary_learning": {"ae.pt": "x", "config.json": '{"trainer": {}}'},
    "sparsify": {"cfg.json": "{}", "sae.safetensors": "x"},
}


@pytest.mark.parametrize("who", OTHERS)
@pytest.mark.parametrize("how", ["sf.save", "overwriting", "Trainer.save", "interop.save"])
def test_another_programs_folder_is_refused_and_left_as_it_was(who, how, tmp_path):
    contents = {**OTHERS[who], "weights-00001.safetensors": "precious", "optimizer-0123abcd.safetensors": "precious"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    sae = make()
    save = {
        "sf.save": lambda path: sf.save(sae, path),
        "overwriting": lambda path: sf.save(sae, path, overwrite=True),
        "Trainer.save": sf.Trainer(sae, **SETTINGS).save,
        "interop.save": lambda path: sf.interop.save(sae, path, overwrite=True),
    }[how]
    with pytest.raises(FileExistsError, match="want a folder of its own"):
        save(tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == contents


def test_beside_a_checkpoint_only_our_own_tensor_files_go(tmp_path):
    foreign = [
        "weights-00001.safetensors",
        "optimizer-0123abcd.safetensors",
        "model-00001-of-2.safetensors",
        "config.json.bak",
    ]
    trainer = trained()
    trainer.save(tmp_path / "other")
    for name in foreign:
        (tmp_path / name).write_text("precious")
    for _ in range(2):
        for file in (tmp_path / "other").glob("*.safetensors"):  # what a killed save leaves
            (tmp_path / file.name).write_bytes(file.read_bytes())
        trainer.save(tmp_path)
        named = json.loads((tmp_path / "config.json").read_text())["files"].values()
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted([*foreign, "config.json", *named])
    assert all((tmp_path / name).read_text() == "precious" for name in foreign)
    manifest = json.loads((tmp_path / "config.json").read_text())
    manifest["files"] |= {"weights": "../elsewhere.safetensors", "more": "weights-00001.safetensors"}
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    (tmp_path.parent / "elsewhere.safetensors").write_text("precious")
    trainer.save(tmp_path)
    assert (tmp_path / foreign[0]).exists() and (tmp_path.parent / "elsewhere.safetensors").exists()
