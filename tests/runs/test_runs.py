"""Runs of `sae-fast train`: what is kept when, of what is said, and what is never replaced without being asked."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time

import pytest
import torch
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast import files
from sae_fast.cli import app
from sae_fast.data.activations import ActivationStore
from sae_fast.data.transformer import HiddenStates
from sae_fast.nn.scale import INPUT_SCALE, scale_
from sae_fast.runs import train as training
from sae_fast.runs.folder import claimed

STEPS = 20


def files_of(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def after_step(monkeypatch, number, act):
    """Calls `act` when step `number` (from 0) has been taken."""
    step = sf.Trainer.step

    def stepped(self, *arguments, **options):
        log = step(self, *arguments, **options)
        if log.step == number:
            act()
        return log

    monkeypatch.setattr(sf.Trainer, "step", stepped)


# ---- What is kept (U4, U5, F5) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_training_keeps_it_and_says_how_to_go_on(train, here, made, monkeypatch, number, code):
    whole = train(out="whole")
    assert whole.exit_code == 0, whole.output
    with monkeypatch.context() as patch:
        after_step(patch, 6, lambda: os.kill(os.getpid(), number))
        outcome = train()
    assert outcome.exit_code == code
    kept = "the SAE so far is in out/checkpoint, from which sae_fast.Trainer.load goes on"
    assert outcome.stderr == f"interrupted after step 7 of {STEPS}; {kept}\n"
    trainer = sf.Trainer.load("out/checkpoint")
    (stored,) = (made / "cache" / "activations").iterdir()
    part, _ = ActivationStore.open(stored).split()
    scale = trainer.sae.metadata[INPUT_SCALE]
    # The SAE that loads takes activations as they are.
    sae, x = sf.load("out"), torch.tensor(part.activations[:200])
    torch.testing.assert_close(sae.encode(x), scale * trainer.sae.encode(x / scale))
    assert INPUT_SCALE not in sae.metadata
    # And training goes on to the bits of the one that was not interrupted.
    for batch in part.batches(64, steps=STEPS, start_step=trainer.step_count):
        trainer.step(batch / scale)
    scale_(trainer.sae, scale)
    for name, value in sf.load("whole").state_dict().items():
        assert torch.equal(trainer.sae.state_dict()[name], value), name


def test_a_signal_in_the_harvest_leaves_nothing_and_says_so(train, here, monkeypatch):
    monkeypatch.setenv("SAE_FAST_CACHE", str(here / "cache"))
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with monkeypatch.context() as patch:
            patch.setattr(HiddenStates, "__call__", lambda self, ids, number=number: os.kill(os.getpid(), number))
            outcome = train()
        assert outcome.exit_code == code and "Traceback" not in outcome.output
        assert outcome.stderr.startswith("interrupted in the harvest, of which nothing is kept")
        assert not (here / "out").exists() and not list((here / "cache" / "activations").iterdir())


def test_before_the_first_step_there_is_nothing_to_keep(train, here, monkeypatch):
    monkeypatch.setattr(sf.Trainer, "fit", lambda self, batches, **_: os.kill(os.getpid(), signal.SIGINT) or [])
    outcome = train()
    assert outcome.exit_code == 130 and "after step 0 of 20; nothing is kept" in outcome.stderr
    assert not (here / "out").exists()


def test_the_checkpoint_is_there_from_the_first_step_on_and_follows(train, here, monkeypatch):
    seen = []
    step = sf.Trainer.step

    def look(self, x):
        seen.append(sf.Trainer.load("out/checkpoint").step_count if (here / "out/checkpoint").exists() else None)
        return step(self, x)

    monkeypatch.setattr(sf.Trainer, "step", look)
    assert train(save_every=0, steps=4).exit_code == 0
    assert seen == [None, 1, 2, 3] and sf.Trainer.load("out/checkpoint").step_count == 4
    seen.clear()
    assert train(save_every=60, steps=4, out="slow").exit_code == 0
    assert sf.Trainer.load("slow/checkpoint").step_count == 4


def test_a_disk_that_is_full_is_said_after_one_step(train, here, monkeypatch):
    resource = pytest.importorskip("resource")
    assert train(out="first").exit_code == 0  # its activations are kept
    steps = []
    after_step(monkeypatch, 1, lambda: steps.append(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        outcome = train(d_sae=512)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.exit_code == 1 and outcome.stderr.count("\n") == 1
    assert "File too large" in outcome.stderr and "out/checkpoint/" in outcome.stderr and not steps
    assert not (here / "out").exists()


def test_a_first_save_that_was_killed_is_no_run(train, here):
    (here / "out" / "checkpoint" / files.ROOM.format("killed")).mkdir(parents=True)
    assert train().exit_code == 0


@pytest.mark.parametrize("name, bad", dict(d_sae=0, lr="nan", l1=-1, init_l0=0, steps=0, seed=2**70).items())
def test_settings_that_do_not_fit_are_found_before_the_harvest(train, here, monkeypatch, name, bad):
    monkeypatch.setattr(training, "harvest", lambda *_, **__: pytest.fail("harvested"))
    outcome = train(**{name: bad})
    assert outcome.exit_code == 1 and outcome.stderr.startswith(f"error: {name}") and not (here / "out").exists()


def test_a_disk_that_fills_costs_no_sae(train, here, monkeypatch):
    """Between the first step and the last it is a note; at the end an error, and the checkpoint before stays."""
    save, fails = sf.Trainer.save, set()

    def full(self, path):
        if self.step_count in fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/checkpoint/weights")
        save(self, path)

    monkeypatch.setattr(sf.Trainer, "save", full)
    fails.update([2, 3])
    outcome = train(save_every=0, steps=4)
    assert outcome.exit_code == 0 and outcome.stderr.count("note: no checkpoint of step") == 2
    fails.add(4)
    outcome = train("--overwrite", save_every=0, steps=4)
    assert outcome.exit_code == 1 and "No space left on device: 'out/checkpoint/weights'" in outcome.stderr
    assert sf.Trainer.load("out/checkpoint").step_count == 1


def test_the_comparison_is_on_request_and_kills_no_run(train, here, monkeypatch):
    def no_memory(*_):
        assert sf.Trainer.load("out/checkpoint").step_count == STEPS, "the SAE is on the disk before"
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr(training, "measure_speedup", no_memory)
    assert train("--compare", "--quiet").stderr == (
        "note: no comparison with dense PyTorch: DefaultCPUAllocator: can't allocate memory\n"
    )
    assert json.loads((here / "out/metrics.json").read_text())["step"] == {}
    monkeypatch.undo()


# ---- What is not replaced (F7, U6, U13) ------------------------------------------------------------------------------


def test_a_run_is_overwritten_only_when_asked_and_then_nothing_of_it_stays(train, here, monkeypatch):
    pytest.importorskip("pyarrow")
    pytest.importorskip("duckdb")
    assert train().exit_code == 0
    assert CliRunner().invoke(app, ["report", "out", "--quiet"]).output == ""
    (here / "out" / "notes.txt").write_text("mine")
    before = files_of(here / "out")
    assert {"report.html", "store/store.json"} <= set(before)
    with monkeypatch.context() as patch:
        patch.setattr(HiddenStates, "__call__", lambda *_: pytest.fail("ran the model"))
        outcome = train(layer=0)
    assert outcome.exit_code == 1
    held = "checkpoint, metrics.json, training.png, features.md, store, report.html"
    assert outcome.stderr == (
        f"error: out: out holds {held} already; want another folder, or overwrite=True (--overwrite)\n"
    )
    assert train("--overwrite", batch_size=10**6).exit_code == 1, "a mistake that is found before the first step"
    assert files_of(here / "out") == before
    assert train("--overwrite", layer=0, steps=3).exit_code == 0
    assert {f.name for f in (here / "out").iterdir()} == {
        *("checkpoint", "metrics.json", "training.png", "features.md", "notes.txt")
    }
    assert sf.load("out").metadata["layer"] == 0


@pytest.mark.parametrize(
    "name, contents",
    [
        ("checkpoint/config.json", '{"model_type": "gpt2"}'),
        ("metrics.json", '{"accuracy": 1}'),
        ("features.md", "# My notes"),
        ("training.png", "x"),
        ("report.html", "<!doctype html>\nmine"),
        ("store/x.parquet", "x"),
    ],
)
def test_what_is_no_run_is_not_overwritten_at_all(train, here, name, contents):
    file = here / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text(contents)
    outcome = train("--overwrite")
    assert outcome.exit_code == 1 and outcome.stderr.startswith("error: ") and "Traceback" not in outcome.output
    assert files_of(here / "out") == {name: contents.encode()}


def test_two_at_once_into_one_folder(train, here):
    with claimed(here / "out"):
        outcome = train()
        assert outcome.exit_code == 1 and "another process is writing a run into out" in outcome.stderr
    assert train().exit_code == 0


@pytest.mark.parametrize("command", ["train", "encode", "convert"])
def test_a_file_where_a_folder_is_wanted(train, here, command):
    (here / "code.txt").write_text("precious")
    sf.save(sf.ReluSAE(16, 32), "sae")
    outcome = {
        "train": lambda: train(out="code.txt"),
        "encode": lambda: CliRunner().invoke(app, ["encode", "sae", "--out=code.txt", "--activations=x.npy"]),
        "convert": lambda: CliRunner().invoke(app, ["convert", "sae", "code.txt", "--to=saelens"]),
    }[command]()
    assert outcome.exit_code == 1 and outcome.stderr.startswith("error: ") and "code.txt" in outcome.stderr
    assert "want a folder" in outcome.stderr and (here / "code.txt").read_text() == "precious"


# ---- What is said (U2, U7) -------------------------------------------------------------------------------------------


def test_a_checkpoint_says_what_it_was_trained_on_and_how(train, here, made):
    assert train().exit_code == 0
    said = sf.load("out/checkpoint").metadata
    assert {name: said[name] for name in ("model_name", "hook_name", "layer", "context_size", "prepend_bos", "dtype")} == {
        "model_name": str(made / "model"),
        "hook_name": "blocks.1.hook_resid_post",
        "layer": 1,
        "context_size": 16,
        "prepend_bos": True,
        "dtype": "float32",
    }
    assert said["dataset_path"] == str(made / "text.txt") and len(said["source"]["text_sha256"]) == 64
    assert {name: said["training"][name] for name in ("l1", "lr", "steps", "batch_size", "init_l0", "seed", "version")} == {
        **dict(l1=0.5, lr=1e-3, steps=STEPS, batch_size=64, init_l0=4.0, seed=0, version=sf.__version__)
    }
    assert said["training"]["tokens"] == 656
    assert train(layer=2, out="last").exit_code == 0
    assert sf.load("last").metadata["hook_name"] == "blocks.2.hook_resid_post"


def test_other_formats_are_filled_from_it_and_a_contradiction_is_an_error(train, here, made):
    assert train(l1=0.1, d_sae=64).exit_code == 0

    def convert(to, *options):
        return CliRunner().invoke(app, ["convert", "out", to, f"--to={to}", "--overwrite", *options])

    assert convert("saelens").exit_code == 0
    config = json.loads((here / "saelens" / "cfg.json").read_text())["metadata"]
    model = str(made / "model")
    assert (config["hook_name"], config["model_name"], config["context_size"]) == ("blocks.1.hook_resid_post", model, 16)
    assert config["prepend_bos"] is True and config["dataset_path"] == str(made / "text.txt")
    assert convert("saebench").exit_code == 0
    trainer = json.loads((here / "saebench" / "config.json").read_text())["trainer"]
    assert (trainer["layer"], trainer["lm_name"]) == (1, model)
    assert sf.load("saelens").metadata["source"] == sf.load("out").metadata["source"]
    assert convert("saebench", "--layer=1", f"--model-name={model}").exit_code == 0
    for option, said in [
        ("--layer=2", "layer: got 2, but the SAE's metadata says 1"),
        ("--hook-name=blocks.2.hook_resid_post", "hook_name: got 'blocks.2.hook_resid_post', but the SAE's metadata says"),
    ]:
        outcome = convert("saebench", option)
        assert outcome.exit_code == 1 and said in outcome.stderr


def test_another_site_is_trained_on_by_its_name(train, here, made):
    for hook, said in (("blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out"), ("transformer.h.1.attn", "h.1.attn")):
        assert train("--overwrite", hook=hook, layer=None, steps=3).exit_code == 0
        assert sf.load("out").metadata["hook_name"] == said
    for changes in (dict(layer=None), dict(hook="h.1")):
        outcome = train("--overwrite", **changes)
        assert outcome.exit_code == 1 and "layer, hook: got" in outcome.stderr and "want one of them" in outcome.stderr


# ---- The options of all (U13, U18) -----------------------------------------------------------------------------------


def test_the_version_and_a_device_that_is_not_here(train, here):
    assert CliRunner().invoke(app, ["--version"]).output == f"{sf.__version__}\n"
    for outcome in (train("--device=cuda:77"), CliRunner().invoke(app, ["demo", "--device=cuda:77"])):
        assert outcome.exit_code == 1
        assert outcome.stderr.startswith("error: --device: got 'cuda:77', want one that is here: cpu")
    with pytest.raises(ValueError, match="device: got 'gpu', want one that is here"):
        training.Recipe(device="gpu")


def test_quiet_says_nothing(train, here):
    assert train("--quiet").output == ""
    assert CliRunner().invoke(app, ["convert", "out", "lens", "--to=saelens", "--quiet"]).output == ""


def test_the_cache_is_listed_and_cleared(train, here, monkeypatch):
    monkeypatch.setenv("SAE_FAST_CACHE", str(here / "cache"))
    for layer in (0, 1):
        assert train("--quiet", layer=layer, steps=2, out=f"out{layer}").exit_code == 0
    folder = here / "cache" / "activations"
    first, second = sorted(folder.iterdir(), key=lambda path: json.loads((path / "store.json").read_text())["layer"])
    (folder / "f00").mkdir()
    (folder / ".sae_fast-dead.tmp").mkdir()  # the room of a harvest that was killed
    (folder / ".key-abc").mkdir()  # as former versions left it

    def cache(*options):
        outcome = CliRunner().invoke(app, ["cache", *options])
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout

    os.utime(first, (0, time.time() - 10 * 86400))
    said = cache().splitlines()
    assert said[0].startswith(first.name) and "blocks.0.hook_resid_post of " in said[0] and "on text.txt" in said[0]
    assert sum("damaged" in line for line in said) == 1 and sum("left by a killed harvest" in line for line in said) == 1
    assert said[-1].endswith(f" MB in {folder}") and not (folder / ".sae_fast-dead.tmp").exists()
    outcome = CliRunner().invoke(app, ["cache", "--clear=nothing"])
    assert outcome.exit_code == 1 and "there is no 'nothing'" in outcome.stderr and len(list(folder.iterdir())) == 4
    assert cache("--older-than=5").startswith("removed 1,")
    assert not first.exists() and second.exists()
    cache("--clear=f00", "--clear=.key-abc")
    assert list(folder.iterdir()) == [second]
    assert "removed 1," in cache("--clear=all") and not list(folder.iterdir())
    assert train("--quiet", layer=0, steps=2, out="again").exit_code == 0


def test_a_corpus_is_encoded_once_for_the_list_of_features(train, here, monkeypatch):
    encoded = []
    encode = sf.GatedSAE.encode_sparse

    def counted(self, x):
        encoded.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(sf.GatedSAE, "encode_sparse", counted)
    assert train().exit_code == 0
    assert sum(encoded) == 64 + 720  # the held-out part for what is measured and for the choice, all for the contexts


# ---- Kills (F16) -----------------------------------------------------------------------------------------------------


def killed(here, number, delay, run) -> None:
    """Runs in a process that is sent a signal after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            run()
        finally:
            os._exit(0)
    time.sleep(delay)
    os.kill(child, number)
    os.waitpid(child, 0)


@pytest.mark.parametrize("moments", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads_and_nothing_that_stays(train, here, moments):
    pytest.importorskip("pyarrow")
    assert train("--quiet").exit_code == 0
    draw = random.Random(moments)
    for moment in range(moments):
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[moment % 3]
        delay = draw.uniform(0, 0.6)
        killed(here, number, delay, lambda: train("--quiet", "--overwrite", steps=200, save_every=0))
        torch.testing.assert_close(sf.load("out").encode(torch.zeros(1, 16)).shape, (1, 32))
        assert sf.Trainer.load("out/checkpoint").step_count >= 1
        killed(here, number, delay / 4, lambda: CliRunner().invoke(app, ["encode", "out", "--overwrite"]))
    assert train("--quiet", "--overwrite").exit_code == 0
    assert CliRunner().invoke(app, ["encode", "out", "--quiet"]).exit_code == 0
    assert {f.name for f in (here / "out").iterdir()} == {
        *("checkpoint", "metrics.json", "training.png", "features.md", "store")
    }
    assert len(list((here / "out" / "checkpoint").iterdir())) == 3
