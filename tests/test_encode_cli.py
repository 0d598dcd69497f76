"""`sae-fast encode`: a run, any SAE with a model and a text, any SAE with a file of activations."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_tiny_model
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast import demo, encoding
from sae_fast.analysis import FeatureStore
from sae_fast.cli import app
from sae_fast.demo import Recipe
from sae_fast.train.activations import ActivationStore

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")

TEXT = "The gate opens when its sum is above zero . A sum of the gate and zero . " * 40
D, F = 16, 32


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, a text, the cache, and the run that was trained on them."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("made")
    save_tiny_model(transformers, "bert", folder / "model")
    (folder / "text.txt").write_text(TEXT)
    recipe = Recipe(d_sae=F, batch_size=64, steps=20, init_l0=4, l1=0.5, lr=1e-3, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_FAST_CACHE", str(folder / "cache"))
        demo.run(folder / "model", 1, TEXT, folder / "run", recipe, 16, text_from=folder / "text.txt")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of the run, and the cache, to spoil."""
    for name in ("run", "cache"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.setenv("SAE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["encode", *map(str, arguments)], env={"COLUMNS": "100"})


def done(*arguments) -> str:
    outcome = run(*arguments)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout.strip().splitlines()[-1]


def refused(*arguments) -> str:
    outcome = run(*arguments)
    assert outcome.exit_code == 1, outcome.output
    assert "Traceback" not in outcome.output
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def assert_encoded(store: FeatureStore, sae, x: torch.Tensor):
    found = store.sql("SELECT * FROM activations").fetchnumpy()
    out = np.zeros((store.n_tokens, store.d_sae), dtype=np.float32)
    out[found["token"], found["feature"]] = found["activation"]
    assert np.array_equal(out, sae.encode(x).detach().numpy())


def activations_of(folder) -> ActivationStore:
    (stored,) = (folder / "cache" / "activations").iterdir()
    return ActivationStore.open(stored)


def test_a_run_needs_nothing_more(here):
    said = done("run")
    sae, activations = sf.load("run/checkpoint"), activations_of(here)
    store = FeatureStore.open("run/store", sae)
    assert_encoded(store, sae, torch.tensor(activations.activations))
    assert store.context_length == 16 and store.info["layer"] == 1
    ids, pieces = store.pieces
    assert TEXT.startswith("".join(pieces[i] for i in ids))
    assert said.startswith(f"{store.n_activations:,} activations of {store.n_tokens:,} tokens (L0 ")
    assert said.endswith("tokens/s, into run/store")


def test_a_run_whose_cache_is_gone_is_harvested_again(here):
    done("run", "--out=first")
    shutil.rmtree("cache")
    done("run", "--out=second")
    for name in ("activations/00000000.parquet", "features.parquet", "tokens.parquet", "store.json"):
        assert (here / "first" / name).read_bytes() == (here / "second" / name).read_bytes()


def test_the_text_of_a_run_that_has_changed(here, made):
    shutil.rmtree("cache")
    metrics = json.loads((here / "run" / "metrics.json").read_text())
    (here / "text.txt").write_text(TEXT + "The gate opens . " * 20)
    metrics["source"]["text"] = str(here / "text.txt")
    (here / "run" / "metrics.json").write_text(json.dumps(metrics))
    assert "has changed since" in refused("run")
    (here / "text.txt").unlink()
    assert "does not exist" in refused("run")
    metrics["source"]["text"] = None
    (here / "run" / "metrics.json").write_text(json.dumps(metrics))
    assert "no longer in the cache, want --model, --layer and --text" in refused("run")
    done("run", f"--model={made / 'model'}", "--layer=2", f"--text={made / 'text.txt'}", "--context-length=16")
    assert not (here / "run" / ".store").exists()


@pytest.mark.parametrize("metrics", ["{}", "[]", "{", '{"source": {}}'])
def test_a_run_that_does_not_say_what_it_was_trained_on(here, metrics):
    (here / "run" / "metrics.json").write_text(metrics)
    assert "does not say what the SAE was trained on" in refused("run")


def test_any_sae_with_a_model_and_a_text(here, made):
    sae = sf.TopKSAE(D, F, k=3, seed=0)
    sf.interop.save(sae, here / "sparsify", "sparsify")
    asked = ["sparsify", f"--model={made / 'model'}", "--layer=1", f"--text={made / 'text.txt'}"]
    assert refused(*asked) == "error: context_length: got 128, want at most 30, what the model takes"
    assert done(*asked, "--context-length=16").endswith("into out/store")
    assert FeatureStore.open("out/store").n_activations <= 3 * FeatureStore.open("out/store").n_tokens
    FeatureStore.open("out/store", sf.load("sparsify"))


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_any_sae_with_a_file_of_activations(here, kind):
    x, sae = torch.randn(200, D), sf.load("run/checkpoint")
    if kind == "npy":
        np.save("x.npy", x.numpy())
    else:
        save_file({"anything": x}, "x.safetensors")
    done("run/checkpoint", f"--activations=x.{kind}", "--context-length=10", "--out=store", "--batch-size=64")
    store = FeatureStore.open("store", sae)
    assert_encoded(store, sae, x)
    assert store.context_length == 10 and not store.has_text


def test_a_store_is_replaced_only_when_asked(here):
    done("run")
    before = {file: file.read_bytes() for file in (here / "run" / "store").rglob("*.parquet")}
    assert "holds a feature store already; overwrite=True (--overwrite) replaces it" in refused("run")
    np.save("x.npy", np.full((5, D), np.nan, dtype=np.float32))
    assert "activations: got nan at token 0" in refused("run", "--activations=x.npy", "--overwrite")
    assert {file: file.read_bytes() for file in (here / "run" / "store").rglob("*.parquet")} == before
    done("run", "--overwrite")
    assert not [name for name in (here / "run").iterdir() if name.name.startswith(".")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run/checkpoint"], "is not the folder of a run; want --model, --layer and --text, or --activations"),
        (["run/checkpoint", "--layer=2"], "got --layer"),
        (["run", "--layer=2"], "want --model, --layer and --text, or --activations; got --layer"),
        (["run", "--activations=x.npy", "--layer=2"], "--activations: got --layer too"),
        (["run", "--activations=missing.npy"], "activations: missing.npy does not exist"),
        (["run", "--activations=run/metrics.json"], "want a .npy or .safetensors file"),
        (["run", "--activations=pickle.npy"], "pickle.npy is damaged or holds no numbers"),
        (["run", "--activations=short.npy"], "short.npy is damaged or holds no numbers"),
        (["run", "--activations=ints.npy"], "activations: got int64, want float32 or float16"),
        (["run", "--activations=narrow.npy"], "activations: got 3 dimensions, want d_in = 16"),
        (["run", "--activations=cube.npy"], "activations: got shape (2, 2, 16), want [N, d_in]"),
        (["run", "--activations=two.safetensors"], "two.safetensors holds 2 tensors, want one of [N, d_in]"),
        (["run", "--activations=short.safetensors"], "short.safetensors is truncated or damaged"),
        (["run", "--batch-size=0"], "batch_size: got 0"),
        (["run", "--out=run"], "run is there and is not a feature store"),
        (["./nowhere"], "nowhere"),
    ],
    ids=range(16),
)
def test_a_mistake_is_one_line(here, arguments, message):
    np.save("pickle.npy", np.array([{}], dtype=object))
    np.save("ints.npy", np.ones((4, D), dtype=np.int64))
    np.save("narrow.npy", np.ones((4, 3), dtype=np.float32))
    np.save("cube.npy", np.ones((2, 2, D), dtype=np.float32))
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, "two.safetensors")
    for name in ("ints.npy", "two.safetensors"):
        data = (here / name).read_bytes()
        (here / name.replace("ints", "short").replace("two", "short")).write_bytes(data[: len(data) // 2])
    assert message in refused(*arguments)
    assert not (here / "out").exists() and not (here / "run" / "store").exists()


def test_a_missing_package_is_named_before_any_work(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused("run") == "error: this needs 'pyarrow', which is not installed: pip install 'sae-fast[store]'"


def test_the_demo_is_found_again_without_a_file(monkeypatch, tmp_path):
    """The demo's text is no file: it is read from this Python again."""
    source = dict(model="m", place={"layer": 2}, context_length=128, text=encoding.STDLIB, activations="key")
    (tmp_path / "metrics.json").write_text(json.dumps({"source": source}))
    monkeypatch.setenv("SAE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "stdlib_documentation", lambda: "the library's")
    asked = []

    def harvest(model, text, layer, **options):
        asked.append((model, text, layer, options["context_length"]))
        return ActivationStore(tmp_path, {"key": "key"}, range(0))

    monkeypatch.setattr(encoding, "harvest", harvest)
    encoding.activations_of(tmp_path)
    assert asked == [("m", "the library's", 2, 128)]
