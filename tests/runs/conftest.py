"""`sae-fast train` on a tiny model."""

from __future__ import annotations

import pytest
from problems.tiny_models import save_tiny_model
from typer.testing import CliRunner

from sae_fast.cli import app
from sae_fast.runs import train as training

TEXT = "The gate opens when its sum is above zero . A sum of the gate and zero . " * 40


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A model, a text, and the cache of their activations."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("made")
    save_tiny_model(transformers, "gpt2", folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_FAST_CACHE", str(made / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        training.plots, "plot_training", lambda *arguments: arguments[2].write_text("")
    )  # it takes its time
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(made, here):
    """Runs `sae-fast train` with small settings, of which any can be replaced; flags by themselves."""

    def run(*flags, **changes):
        settings = dict(model=made / "model", layer=1, text=made / "text.txt", out="out", d_sae=32, steps=20)
        settings |= dict(batch_size=64, context_length=16, init_l0=4, l1=0.5, lr=1e-3) | changes
        options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
        return CliRunner().invoke(app, ["train", *options, *flags], env={"COLUMNS": "200"})

    return run
