"""`sae-fast encode`: a run, any SAE with a model and a text, any SAE with a file of activations."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from problems.tiny_models import save_tiny_model
from safetensors.torch import save_file
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast.analysis import FeatureStore
from sae_fast.cli import app
from sae_fast.data.activations import ActivationStore
from sae_fast.data.transformer import HiddenStates
from sae_fast.runs import source, train
from sae_fast.runs.train import Recipe

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
        train.run(folder / "model", 1, TEXT, folder / "run", recipe, 16, text_from=folder / "text.txt")
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


def test_a_run_is_named_by_its_checkpoint_too(here):
    assert done("run/checkpoint").endswith("into run/store")
    assert torch.equal(sf.load("run").W_enc, sf.load("run/checkpoint").W_enc)


def test_a_run_whose_cache_is_gone_is_harvested_again(here):
    done("run", "--out=first")
    shutil.rmtree("cache")
    done("run", "--out=second")
    for name in ("activations/00000000.parquet", "features.parquet", "tokens.parquet", "store.json"):
        assert (here / "first" / name).read_bytes() == (here / "second" / name).read_bytes()


def rewrite(metadata: dict) -> None:
    """Changes what the run's SAE says of itself."""
    manifest = json.loads(Path("run/checkpoint/config.json").read_text())
    manifest["sae"]["metadata"] |= metadata
    Path("run/checkpoint/config.json").write_text(json.dumps(manifest))


def test_the_text_of_a_run_that_has_changed(here, made):
    shutil.rmtree("cache")
    source = sf.load("run").metadata["source"]
    (here / "text.txt").write_text(TEXT + "The gate opens . " * 20)
    rewrite({"source": source | {"text": str(here / "text.txt")}})
    assert "has changed since" in refused("run")
    (here / "text.txt").unlink()
    assert "does not exist" in refused("run")
    rewrite({"source": source | {"text": None}})
    assert "no longer in the cache, want --model, --layer (or --hook) and --text" in refused("run")
    done("run", f"--text={made / 'text.txt'}")  # the rest is in the metadata
    assert not [name for name in (here / "run").iterdir() if name.name.startswith(".")]


@pytest.mark.parametrize("source", [{}, [], 3, {"model": "m"}])
def test_a_run_that_does_not_say_what_it_was_trained_on(here, source):
    rewrite({"source": source})
    assert "does not say" in refused("run")


def test_any_sae_with_a_model_and_a_text(here, made):
    sae = sf.TopKSAE(D, F, k=3, seed=0)
    sf.interop.save(sae, here / "sparsify", "sparsify")
    assert refused("sparsify") == (
        "error: sparsify: its metadata does not say --model and --layer (or --hook) and --text; want that, or --activations"
    )
    asked = ["sparsify", f"--model={made / 'model'}", "--layer=1", f"--text={made / 'text.txt'}"]
    assert refused(*asked) == "error: context_length: got 128, want at most 30, what the model takes"
    folder = done(*asked, "--context-length=16").rpartition(" ")[2]
    assert folder.startswith("out/store/sparsify-")
    store = FeatureStore.open(folder, sf.load("sparsify"))
    assert store.n_activations <= 3 * store.n_tokens
    sf.interop.save(
        sf.TopKSAE(D, F, k=3, seed=1), here / "other" / "sparsify", "sparsify"
    )  # of the same name: a place of its own
    assert done("other/sparsify", *asked[1:], "--context-length=16").rpartition(" ")[2] not in ("out/store", folder)


def test_the_place_that_the_sae_says_is_the_default_and_another_is_an_error(here, made):
    """An SAE of SAELens with the hook of its model, which counts blocks from 0."""
    sae = sf.ReluSAE(D, F, seed=0)
    sae.metadata = {"model_name": str(made / "model"), "hook_name": "encoder.layer.1", "context_size": 16}
    sf.interop.save(sae, "lens", "saelens")
    text = f"--text={made / 'text.txt'}"
    done("lens", text, "--out=own")
    assert FeatureStore.open("own", sf.load("lens")).info["hook_name"] == "encoder.layer.1"
    for same in (["--layer=1"], ["--hook=bert.encoder.layer.1"], ["--context-length=16"], [f"--model={made}/model"]):
        done("lens", text, "--out=own", "--overwrite", *same)
    for other, said in [
        ("--layer=2", "--layer: got 2, but the SAE's metadata says hook encoder.layer.1; want that, or --anyway"),
        ("--hook=encoder.layer.0", "--hook: got encoder.layer.0, but the SAE's metadata says hook encoder.layer.1;"),
        ("--context-length=8", "--context-length: got 8, but the SAE's metadata says 16;"),
        ("--model=gpt2", "--model: got gpt2, but the SAE's metadata says /"),
    ]:
        assert said in refused("lens", text, "--out=other", other)
    done("lens", text, "--out=other", "--layer=2", "--context-length=8", "--anyway")
    assert FeatureStore.open("other").info["layer"] == 2 and FeatureStore.open("other").context_length == 8


def test_the_width_is_compared_before_the_model_runs(here, made, monkeypatch):
    monkeypatch.setattr(HiddenStates, "__call__", lambda *_: pytest.fail("ran the model"))
    sf.save(sf.ReluSAE(D + 1, F), "wide")
    asked = ["wide", f"--model={made / 'model'}", f"--text={made / 'text.txt'}", "--context-length=8"]
    for site in ("--layer=2", "--hook=embeddings", "--layer=1"):
        assert "d: got 16 dimensions at" in refused(*asked, site)
    np.save("x.npy", np.ones((4, D), np.float32))
    assert "activations: got 16 dimensions, want d_in = 17" in refused("wide", "--activations=x.npy")


def test_an_sae_that_is_missing_and_the_store_of_one_that_is_no_run(here, made):
    sae = sf.ReluSAE(D, F, seed=0)
    sf.save(sae, "lone")
    np.save("x.npy", np.random.default_rng(0).normal(size=(60, D)).astype(np.float32))
    folder = done("lone", "--activations=x.npy").rpartition(" ")[2]
    assert "there is no 'out/nothing'" in refused("out/nothing"), "though there is an out/store"
    outcome = CliRunner().invoke(app, ["report", "lone"])
    assert outcome.exit_code == 0 and (here / "report.html").is_file(), "the store is found by the SAE"
    shutil.rmtree(folder)
    outcome = CliRunner().invoke(app, ["report", "lone"])
    assert outcome.exit_code == 1 and f"make one: sae-fast encode lone --out {folder} --model" in outcome.stderr


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
        (["run", "--layer=2"], "--layer: got 2, but the SAE's metadata says layer 1; want that, or --anyway"),
        (["run", "--layer=1", "--hook=embeddings"], "layer, hook: got 1 and 'embeddings', want one of them"),
        (["run", "--device=cuda:77"], "--device: got 'cuda:77', want one that is here: cpu"),
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
        (["run", "--out=ints.npy"], "ints.npy is there and is not a feature store"),
        (["./nowhere"], "nowhere"),
    ],
    ids=range(17),
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
    sae = sf.ReluSAE(D, F)
    sae.metadata["source"] = dict(model="m", place={"layer": 2}, context_length=128, text=source.STDLIB, activations="key")
    monkeypatch.setenv("SAE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "stdlib_documentation", lambda: "the library's")
    asked = []

    def harvest(model, text, layer, **options):
        asked.append((model, text, layer, options["context_length"], options["d"]))
        return ActivationStore(tmp_path, {"key": "key"}, range(0))

    monkeypatch.setattr(source, "harvest", harvest)
    source.activations_of(sae)
    assert asked == [("m", "the library's", 2, 128, D)]
