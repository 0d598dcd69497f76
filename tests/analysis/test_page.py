"""The feature report's file: what it holds is what the store says; nothing is half-written; errors name what is wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from problems.page_data import HOSTILE, read_page, small_store
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast.analysis.attribution import Effects
from sae_fast.analysis.page import _data, write_page
from sae_fast.analysis.store import FeatureStore
from sae_fast.cli import app

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("page") / "store")


def command(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


# ---- What is in the page ---------------------------------------------------------------------------------------------


def test_the_page_holds_what_the_store_says(made, tmp_path):
    sae, store = made
    about, chunks = read_page(write_page(tmp_path / "page.html", store, sae, {3: -0.5, 9: 2.0}))
    columns, examples, text = chunks["columns"], chunks["examples"], chunks["text"]
    assert about["sae"] == store.info["sae"] and about["d_sae"] == sae.d_sae
    for name in ("fires", "maximum", "mean"):
        np.testing.assert_array_equal(columns[name], store.features[name])
    assert columns["fires"][5] == 0
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(columns["effect"])), [3, 9])
    np.testing.assert_array_equal(columns["effect"][[3, 9]], [-0.5, 2.0])
    counts, _ = store.histogram(bins=about["histogram_bins"])
    np.testing.assert_array_equal(chunks["detail"]["histogram"].reshape(sae.d_sae, -1), counts)

    shown = store.contexts(top=10, bins=4, per_bin=2, before=15, after=8)
    np.testing.assert_array_equal(examples["count"], np.bincount(shown.feature, minlength=sae.d_sae))
    assert len(shown) == len(examples["start"]) > sae.d_sae
    entry = 0
    for i, context in enumerate(shown):
        start, length = int(examples["start"][i]), int(examples["length"][i])
        pieces = [text["words"][j] for j in text["ids"][start : start + length]]
        assert "".join(pieces).lstrip() == "".join(context.pieces)
        assert (examples["group"][i], examples["peak"][i]) == (context.stratum, context.at)
        found = np.zeros(length)
        for _ in range(examples["firing"][i]):
            found[examples["offset"][entry]] = examples["level"][entry] / 65535 * columns["maximum"][context.feature]
            entry += 1
        np.testing.assert_allclose(found, context.activations, atol=columns["maximum"][context.feature] / 65535)
        np.testing.assert_array_equal(found > 0, np.array(context.activations) > 0)
        run = np.searchsorted(text["run"], start, side="right") - 1
        assert text["run_token"][run] + start - text["run"][run] == context.token - context.at
    assert entry == len(examples["level"])


def test_the_same_page_is_written_twice(made, tmp_path):
    sae, store = made
    pages = [write_page(tmp_path / f"{i}.html", store, sae).read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


def test_text_cannot_end_an_element_and_nothing_comes_from_elsewhere(made, tmp_path):
    sae, store = made
    title = '</title><script>window.hacked = 1</script>"\u2028'
    facts = {"<b>fact</b>": "</script><script>window.hacked = 1</script>"}
    page = write_page(tmp_path / "page.html", store, sae, title=title, facts=facts).read_text(encoding="utf-8")
    assert "<script>window" not in page
    assert page.count("<script") == page.count("</script>") == 6
    assert not any(hostile in page for hostile in HOSTILE if "<" in hostile and hostile != "<!--")
    assert not re.search(r"""https?://(?!www\.w3\.org/2000/svg)|\bsrc=|@import|url\(""", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    script, style = (
        re.search(r"<script>(.*?)</script>", page, flags=re.S)[1],
        re.search(r"<style>(.*?)</style>", page, flags=re.S)[1],
    )
    for source in (script, style):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" in policy


def test_a_store_without_text_makes_a_page_of_token_numbers(tmp_path):
    sae, store = small_store(tmp_path / "store", text=False)
    about, chunks = read_page(write_page(tmp_path / "page.html", store, sae))
    assert not about["text"] and chunks["text"]["words"] == []
    assert set(chunks["examples"]["length"]) == {1}


def test_nearest_rows_are_those_of_the_whole_product():
    W = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    W[17] = 0
    W[40] = 3 * W[41]
    rows = torch.nn.functional.normalize(W.double(), dim=1)
    cosines = rows @ rows.T
    cosines.fill_diagonal_(-torch.inf)
    found, values = _data.nearest(W, k=5, block=64)
    torch.testing.assert_close(values.double(), cosines.topk(5).values, atol=1e-6, rtol=0)
    torch.testing.assert_close(cosines.gather(1, found), values.double(), atol=1e-6, rtol=0)
    assert found[40, 0] == 41 and values[40, 0] == pytest.approx(1)
    assert not (found == torch.arange(300)[:, None]).any() and (values[17] == 0).all()
    assert _data.nearest(W[:3], k=8)[0].shape == (3, 2) and _data.nearest(W[:1])[0].shape == (1, 0)


def test_effects_of_attribution_are_summed_by_feature(made):
    sae, _ = made
    code = sae.encode_sparse(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))
    zeros = torch.zeros(4, dtype=torch.int64)
    effects = Effects(code, torch.linspace(-1, 1, code.nnz), zeros, zeros, torch.zeros(1), torch.ones(1), 1)
    known = _data.effects_of(effects, sae.d_sae)
    fires = torch.zeros(sae.d_sae, dtype=torch.bool)
    fires[code.indices.long()] = True
    np.testing.assert_array_equal(~np.isnan(known), fires.numpy())
    np.testing.assert_allclose(known[fires.numpy()], effects.by_feature()[fires].numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="effects: got those of 60 features, want 61"):
        _data.effects_of(effects, 61)


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def test_effects_may_be_a_tensor_of_all_features(made, tmp_path):
    effects = torch.linspace(-1, 1, 60, dtype=torch.float64)
    about, chunks = read_page(write_page(tmp_path / "page.html", made[1], made[0], effects))
    np.testing.assert_array_equal(chunks["columns"]["effect"], effects.float().numpy())
    assert about["effects"]


@pytest.mark.parametrize(
    "effects",
    [
        *({60: 1.0}, {-1: 1.0}, {"3": 1.0}, {True: 1.0}, {3: "much"}, {3: float("nan")}, {3: 1e39}, {3: -(10**400)}),
        *(torch.zeros(61), torch.zeros(1, 60), torch.zeros(60).long(), torch.full((60,), 1e39, dtype=torch.float64)),
    ],
)
def test_effects_that_cannot_be_are_refused(made, tmp_path, effects):
    with pytest.raises(ValueError, match="effects: got"):
        write_page(tmp_path / "page.html", made[1], made[0], effects)
    assert not any(tmp_path.iterdir())


def test_a_store_of_another_sae_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match="want one of this SAE"):
        write_page(tmp_path / "page.html", made[1], sf.GatedSAE(8, 60, seed=3))


@pytest.mark.parametrize("limits", [{"top": 300}, {"bins": 200}, {"before": 300}, {"top": -1}])
def test_more_than_a_page_holds_is_refused(made, tmp_path, limits):
    with pytest.raises(ValueError, match="got"):
        write_page(tmp_path / "page.html", made[1], made[0], **limits)


def test_a_full_disk_leaves_the_previous_page(made, tmp_path):
    sae, store = made
    page = write_page(tmp_path / "page.html", store, sae)
    before, (soft, hard) = page.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write_page(page, store, sae, {1: 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert page.read_bytes() == before and list(tmp_path.iterdir()) == [page]


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """The folder of a run with its store."""
    sae, _ = small_store(tmp_path / "run" / "store")
    sae.metadata = {"model_name": "<tiny>", "hook_name": "blocks.3.hook_resid_post"}
    sf.save(sae, tmp_path / "run" / "checkpoint")
    metrics = {"held_out": {"fvu": 0.2134, "l0": 4.0, "tokens": 1234}}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path / "run"


def test_the_command_writes_the_page_of_a_run(run, tmp_path):
    (tmp_path / "effects.json").write_text('{"7": 0.25}')
    result = command(run, "--effects", tmp_path / "effects.json", "--top", 3, "--per-bin", 1)
    assert result.exit_code == 0, result.output
    about, chunks = read_page(run / "report.html")
    said = dict(about["facts"])
    assert said["FVU on 1,234 held-out tokens"] == "0.213" and {"L0 on these", "dead on these"} <= set(said)
    assert about["effects"] and chunks["columns"]["effect"][7] == 0.25
    assert chunks["examples"]["count"].max() == 7
    assert "<title>SAE on blocks.3.hook_resid_post of &lt;tiny&gt;</title>" in (run / "report.html").read_text()
    result = command(run / "checkpoint", "--out", tmp_path / "other.html")
    assert result.exit_code == 0 and (tmp_path / "other.html").is_file(), result.output
    for file in ("corpus.txt", "page.html"):  # what is no page of ours stays
        (tmp_path / file).write_text("<!doctype html>\nprecious\n")
        result = command(run, "--out", tmp_path / file)
        assert result.exit_code == 1 and f"{file} is there and is no report of features" in result.output
        assert (tmp_path / file).read_text() == "<!doctype html>\nprecious\n"
    assert command(run).exit_code == 0, "its own page is made anew"


def test_the_code_of_the_documentation_runs(run, monkeypatch):
    root = Path(__file__).parents[2]
    (block,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "report.md").read_text(encoding="utf-8"), flags=re.S)
    (run.parent / "out").mkdir()
    run.rename(run.parent / "out" / "demo")
    monkeypatch.chdir(run.parent)
    exec(compile(block, "report.md", "exec"), {})
    about, chunks = read_page(Path("out/demo/report.html"))
    assert ["trained on", "Python's documentation"] in about["facts"] and chunks["columns"]["effect"][40] == 2


def test_the_command_says_what_is_wrong(run, tmp_path):
    (tmp_path / "effects.json").write_text('{"61": 0.25}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    sf.save(sf.GatedSAE(8, 60, seed=9), other / "checkpoint")
    stale = tmp_path / "stale"  # trained again since its store was made
    sf.save(sf.GatedSAE(8, 60, seed=9), stale / "checkpoint")
    shutil.copytree(run / "store", stale / "store")
    for arguments, wanted in [
        ((tmp_path / "nowhere",), "there is no "),
        ((tmp_path / "empty",), "holds no config.json or other sign of an SAE"),
        ((other,), f"make one: sae-fast encode {other} --out {other}/store --model"),
        ((run, "--device", "cuda:77"), "--device: got 'cuda:77', want one that is here: cpu"),
        ((other, "--store", run / "store"), "not of this GatedSAE"),
        ((stale,), f"make it anew: sae-fast encode {stale} --overwrite"),
        ((run, "--store", tmp_path / "empty"), "holds no feature store"),
        ((run, "--effects", tmp_path / "effects.json"), "effects: got feature 61, want 0 to 59"),
        ((run, "--effects", tmp_path / "list.json"), "holds no object from features to effects"),
        ((run, "--effects", tmp_path / "none.json"), "No such file"),
        ((run, "--out", tmp_path / "no" / "page.html"), "there is no folder"),
    ]:
        result = command(*arguments)
        assert result.exit_code == 1 and wanted in result.output, (arguments, result.output)
        assert "Traceback" not in result.output
    assert not (run / "report.html").exists()


def test_the_command_makes_the_store_that_a_run_lacks(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from problems.tiny_models import WORDS, save_tiny_model

    from sae_fast.data.harvest import harvest
    from sae_fast.runs.source import source_of

    monkeypatch.setenv("SAE_FAST_CACHE", str(tmp_path / "cache"))
    model, text, run = save_tiny_model(transformers, "bert", tmp_path / "model"), tmp_path / "text.txt", tmp_path / "run"
    text.write_text(" ".join(WORDS[i % 13] for i in range(400)))
    activations = harvest(model, text.read_text(), 1, context_length=8, progress=False)
    sae = sf.GatedSAE(16, 24, seed=0)
    sae.metadata["source"] = source_of(model, text, activations)
    sf.save(sae, run / "checkpoint")
    result = command(run)
    assert result.exit_code == 0, result.output
    about, chunks = read_page(run / "report.html")
    assert about["n_tokens"] == FeatureStore.open(run / "store").n_tokens == activations.n_tokens
    assert {word.strip() for word in chunks["text"]["words"]} <= set(WORDS)
