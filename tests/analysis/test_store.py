"""The feature store, against the dense code and against what analysis.features shows."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sae_fast as sf
from sae_fast.analysis import FeatureStore, features, write_store
from sae_fast.analysis.store import _sorting, writer
from sae_fast.data.activations import VERSION, ActivationStore
from sae_fast.extras import MissingExtra
from sae_fast.nn.identity import fingerprint
from sae_fast.nn.normalize import ConstantNorm, LayerNorm

pytest.importorskip("pyarrow")
duckdb = pytest.importorskip("duckdb")

D, F, N, CONTEXT = 12, 40, 600, 20
WORDS = ["the", "gate", "opens", "a", "sum", "is", "zero", "."]


def activations(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def gated(seed: int = 0, **options) -> sf.GatedSAE:
    sae = sf.GatedSAE(D, F, seed=seed, **options)
    sae.calibrate_(activations(seed=1), l0=6)
    return sae


def harvested(folder, x: Tensor, text: str, spans: np.ndarray) -> ActivationStore:
    folder.mkdir()
    info = dict(d=D, n_tokens=len(x), context_length=CONTEXT, layer=2, model="tiny", key="", version=VERSION)
    np.save(folder / "activations.npy", x.numpy())
    np.save(folder / "tokens.npy", np.zeros(len(x), dtype=np.int32))
    np.save(folder / "spans.npy", spans)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "store.json").write_text(json.dumps(info))
    return ActivationStore.open(folder)


@pytest.fixture(scope="module")
def harvest(tmp_path_factory):
    """N tokens with words that repeat, so that some windows read the same."""
    words = np.random.default_rng(0).choice(WORDS, N).tolist()
    words[100:140] = words[60:100]
    begins = np.cumsum([0, *(len(word) + 1 for word in words)])
    spans = np.stack([begins[:-1], begins[1:] - 1], axis=1)
    return harvested(tmp_path_factory.mktemp("harvest") / "store", activations(), " ".join(words), spans)


@pytest.fixture(scope="module")
def store(harvest, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "store"
    write_store(path, gated(), harvest, batch_size=64)
    return FeatureStore.open(path, gated())


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    return gated().encode(activations()).detach().numpy()


# ---- What is written ------------------------------------------------------------------------------------------------


def entries_of(store: FeatureStore) -> np.ndarray:
    """[N, F] again."""
    found = store.sql("SELECT * FROM activations").fetchnumpy()
    out = np.zeros((store.n_tokens, store.d_sae), dtype=np.float32)
    out[found["token"], found["feature"]] = found["activation"]
    return out


@pytest.mark.parametrize(
    "sae",
    [
        gated(),
        gated(dtype=torch.bfloat16),
        sf.ReluSAE(D, F, seed=0),
        sf.JumpReluSAE(D, F, seed=0),
        sf.TopKSAE(D, F, k=5, seed=0),
        sf.BatchTopKSAE(D, F, k=5, seed=0),
    ],
    ids=lambda sae: f"{type(sae).__name__}-{sae.W_enc.dtype}",
)
def test_every_activation_above_zero_of_any_sae_is_there_and_no_other(sae, tmp_path):
    x = activations()
    info = write_store(tmp_path / "store", sae, x, batch_size=64)
    store = FeatureStore.open(tmp_path / "store", sae)
    wanted = torch.cat([sae.encode(piece) for piece in x.split(64)]).detach().float().numpy()
    assert np.array_equal(entries_of(store), wanted)
    assert info["n_activations"] == (wanted > 0).sum() == len(store.sql("SELECT * FROM activations"))
    assert (info["sae"], info["sae_class"], info["d_sae"]) == (fingerprint(sae), type(sae).__name__, F)


def test_an_open_gate_of_magnitude_zero_is_no_activation(tmp_path):
    sae = gated()
    with torch.no_grad():
        sae.b_mag -= 1.0
    code = sae.encode_sparse(activations())
    assert bool((code.magnitudes == 0).any()), "S \\ S′ is not empty"
    info = write_store(tmp_path / "store", sae, activations())
    assert info["n_activations"] == int((code.magnitudes > 0).sum())


@pytest.mark.parametrize("size", [300, 1000])
def test_the_store_does_not_depend_on_runs_and_files(size, tmp_path, monkeypatch, dense):
    monkeypatch.setattr(_sorting, "RUN", size)
    monkeypatch.setattr(writer, "FILE", size)
    info = write_store(tmp_path / "store", gated(), iter(activations().split(7)), batch_size=64)
    store = FeatureStore.open(tmp_path / "store")
    assert np.array_equal(entries_of(store), dense)
    assert len([name for name in info["files"] if name.startswith("activations/")]) >= 3
    assert [store.top(f, 1)[0].activation for f in range(F)] == dense.max(0).tolist()
    order = store.sql("SELECT feature, token FROM activations").fetchnumpy()
    assert np.all(np.diff(order["feature"] * np.int64(N) + order["token"]) > 0), "by feature, then by token"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
    assert sorted(p.name for p in store.path.iterdir()) == ["activations", "features.parquet", "store.json"]


def test_an_array_a_map_a_tensor_and_an_iterable_give_the_same(tmp_path, dense):
    np.save(tmp_path / "x.npy", activations().numpy())
    np.save(tmp_path / "swapped.npy", activations().numpy().astype(">f4"))
    maps = [np.load(tmp_path / name, mmap_mode="r") for name in ("x.npy", "swapped.npy")]
    for i, source in enumerate([activations(), activations().numpy(), *maps, activations().split(50)]):
        write_store(tmp_path / f"{i}", gated(), source)
        assert np.array_equal(entries_of(FeatureStore.open(tmp_path / f"{i}")), dense)


def test_the_numbers_of_each_feature(store, dense):
    fires = (dense > 0).sum(0)
    assert np.array_equal(store.features["fires"], fires)
    assert np.array_equal(store.density(), fires / N)
    assert np.array_equal(store.features["maximum"], dense.max(0))
    np.testing.assert_allclose(store.features["mean"], dense.sum(0, dtype=np.float64) / np.maximum(fires, 1), rtol=1e-6)
    lowest = np.where(dense > 0, dense, np.inf).min(0)
    assert np.array_equal(store.features["minimum"], np.where(fires > 0, lowest, 0))


def test_a_feature_that_never_fires(tmp_path):
    sae = gated()
    with torch.no_grad():
        sae.b_gate[7] = -100
    write_store(tmp_path / "store", sae, activations(), context_length=CONTEXT)
    store = FeatureStore.open(tmp_path / "store", sae)
    assert [store.features[name][7] for name in ("fires", "density", "maximum", "mean", "minimum")] == [0, 0, 0, 0, 0]
    assert len(store.top(7)) == len(store.stratified(7)) == 0
    for scale in ("linear", "log"):
        counts, edges = store.histogram(7, bins=4, scale=scale)
        assert counts.tolist() == [[0, 0, 0, 0]] and edges.tolist() == [[0, 0, 0, 0, 0]]


def test_an_sae_that_never_fires_has_an_empty_store(tmp_path):
    sae = gated()
    with torch.no_grad():
        sae.b_gate.fill_(-100)
    assert write_store(tmp_path / "store", sae, activations())["n_activations"] == 0
    store = FeatureStore.open(tmp_path / "store")
    assert len(store.contexts()) == 0 and store.density().max() == 0


# ---- Text -----------------------------------------------------------------------------------------------------------


def test_the_tokens_put_together_are_the_text(store, harvest):
    rows = store.sql("SELECT token, context, position, text, gap FROM tokens ORDER BY token").fetchall()
    assert [row[:3] for row in rows] == [(i, i // CONTEXT, i % CONTEXT) for i in range(N)]
    assert "".join(gap + text for *_, text, gap in rows) == harvest.text
    assert {text for *_, text, _ in rows} == set(WORDS)


def test_white_space_inside_tokens_and_characters_of_several_tokens(tmp_path):
    text = "a  list\n\nof 🙂"
    spans = [(0, 1), (1, 7), (7, 9), (9, 11), (11, 13), (12, 13)]  # "a", "  list", "\n\n", "of", " 🙂" in two
    spans = np.array(spans + [(13, 13)] * (CONTEXT - len(spans)))
    write_store(tmp_path / "s", gated(), harvested(tmp_path / "h", activations(CONTEXT), text, spans))
    store = FeatureStore.open(tmp_path / "s")
    rows = store.sql("SELECT gap, text FROM tokens ORDER BY token LIMIT 6").fetchall()
    assert rows == [("", "a"), ("  ", "list"), ("", "\n\n"), ("", "of"), (" ", "🙂"), ("", "")]
    assert "".join(store.pieces_of(0, 6)) == text


def test_texts_of_ones_own(tmp_path):
    write_store(tmp_path / "s", gated(), activations(4), texts=["a", " b", " ", "c"], context_length=2)
    rows = (
        FeatureStore.open(tmp_path / "s").sql("SELECT context, position, gap, text FROM tokens ORDER BY token").fetchall()
    )
    assert rows == [(0, 0, "", "a"), (0, 1, " ", "b"), (1, 0, "", " "), (1, 1, "", "c")]
    with pytest.raises(ValueError, match="texts: got 3 of 4 tokens"):
        write_store(tmp_path / "t", gated(), activations(4), texts=["a", "b", "c"])
    assert not (tmp_path / "t").exists()


# ---- Contexts -------------------------------------------------------------------------------------------------------


def test_top_contexts_are_those_of_the_feature_report(store, harvest):
    """analysis.features finds them by another way, from the activations."""
    for report in features.describe(gated(), harvest, range(F), examples=8):
        found = store.top(report.index, 8)
        assert [(c.token, c.activation) for c in found] == [(e.token, e.activation) for e in report.examples]
        assert [c.text for c in found] == [e.text for e in report.examples]
        assert {c.stratum for c in found} <= {0}


def test_each_token_of_a_window_has_its_activation(store, dense):
    for context in store.contexts(top=5, bins=3, per_bin=2):
        first = context.token - context.at
        column = dense[first : first + len(context.pieces), context.feature]
        assert context.activations == column.tolist() and len(context.pieces) == len(context.activations)
        assert context.activations[context.at] == context.activation > 0
        assert first // CONTEXT == (first + len(context.pieces) - 1) // CONTEXT == context.token // CONTEXT
        assert context.at == min(12, context.token % CONTEXT)
        assert len(context.pieces) - 1 - context.at == min(8, CONTEXT - 1 - context.token % CONTEXT)


def test_strata_are_quantiles_and_nothing_is_shown_twice(store, dense):
    bins, per_bin = 4, 3
    shown = store.contexts(top=2, bins=bins, per_bin=per_bin)
    for feature in range(F):
        mine = [c for c in shown if c.feature == feature]
        assert [c.stratum for c in mine] == sorted(c.stratum for c in mine)
        ranked = np.sort(dense[:, feature][dense[:, feature] > 0])[::-1]
        for c in mine:
            if c.stratum:
                edges = [ranked[c.stratum * len(ranked) // bins - 1], ranked[(c.stratum - 1) * len(ranked) // bins]]
                assert edges[0] <= c.activation <= edges[1]
        assert len({c.token // CONTEXT for c in mine}) == len(mine)
        assert len({"".join(c.text).strip() for c in mine}) == len(mine)
        if len(ranked) > 60:
            assert [sum(c.stratum == s for c in mine) for s in range(bins + 1)] == [2] + [per_bin] * bins
    alone = store.stratified(3, bins, per_bin)
    assert len(alone) == bins * per_bin and {c.stratum for c in alone} == {1, 2, 3, 4}


def test_a_stratum_is_searched_to_its_end(tmp_path):
    """All tokens but one read the same: the one that does not is found, wherever it is."""
    n = 400
    x = torch.zeros(n, D)
    x[:, 0] = torch.linspace(1, 2, n)
    sae = sf.ReluSAE(D, 1, seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(1, D))
    texts = ["same"] * n
    texts[211] = "other"
    write_store(tmp_path / "s", sae, x, texts=texts)
    found = FeatureStore.open(tmp_path / "s").stratified(0, bins=1, per_bin=5)
    assert {c.text[1] for c in found} == {"same", "other"}


def test_many_features_at_once_are_each_as_alone(store, monkeypatch):
    monkeypatch.setattr("sae_fast.analysis.store.ENTRIES", 150)
    asked = [31, 2, 17, 2]
    together = store.contexts(asked, top=4, bins=2, per_bin=2)
    one_by_one = [context for f in asked for context in store.contexts([f], top=4, bins=2, per_bin=2)]
    assert list(together) == one_by_one
    assert together[:3] == one_by_one[:3] and together[-1] == one_by_one[-1]
    everything = store.contexts(top=4, bins=2, per_bin=2)
    assert [c for c in everything if c.feature == 17] == [c for c in one_by_one if c.feature == 17]


def test_the_order_in_which_duckdb_answers_does_not_matter(store, monkeypatch):
    """Of a long list of features it answers out of order."""
    wanted = list(store.contexts(range(0, F, 2), top=3, bins=2, per_bin=1))
    numpy = FeatureStore._numpy

    def shuffled(self, query, parameters=None):
        found = numpy(self, query, parameters)
        order = np.random.default_rng(0).permutation(len(next(iter(found.values()))))
        return {name: column[order] for name, column in found.items()} if "token" in found else found

    monkeypatch.setattr(FeatureStore, "_numpy", shuffled)
    assert list(store.contexts(range(0, F, 2), top=3, bins=2, per_bin=1)) == wanted


def test_without_text_every_token_is_its_own_context(tmp_path, dense):
    write_store(tmp_path / "s", gated(), activations())
    store = FeatureStore.open(tmp_path / "s")
    found = store.top(5, 10)
    order = np.argsort(-dense[:, 5], kind="stable")[:10]
    assert [c.token for c in found] == order.tolist()
    assert [c.text for c in found] == [("", "", "")] * 10 and {len(c.pieces) for c in found} == {1}
    with pytest.raises(ValueError, match="no text"):
        _ = store.pieces
    with pytest.raises(ValueError, match="no table tokens"):
        store.sql("SELECT * FROM tokens")


# ---- Histograms and SQL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_histograms(store, dense, scale):
    counts, edges = store.histogram(bins=7, scale=scale)
    assert counts.shape == (F, 7) and edges.shape == (F, 8)
    for f in range(F):
        values = dense[:, f][dense[:, f] > 0].astype(np.float64)
        low = 0 if scale == "linear" else values.min()
        inner = np.linspace(low, values.max(), 8) if scale == "linear" else np.geomspace(low, values.max(), 8)
        np.testing.assert_allclose(edges[f], inner, rtol=1e-6)
        inner[0], inner[-1] = inner[0] * 0.999, inner[-1] * 1.001
        assert counts[f].tolist() == np.histogram(values, inner)[0].tolist()
    some, some_edges = store.histogram([9, 3], bins=7, scale=scale)
    assert np.array_equal(some, counts[[9, 3]]) and np.array_equal(some_edges, edges[[9, 3]])


def test_a_histogram_of_a_single_value(tmp_path):
    sae = sf.ReluSAE(D, 1, seed=0)
    x = torch.ones(5, D)
    x[:, 0] = 2
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(1, D))
    write_store(tmp_path / "s", sae, x)
    for scale in ("linear", "log"):
        assert FeatureStore.open(tmp_path / "s").histogram(0, bins=3, scale=scale)[0].sum() == 5


def test_sql_is_duckdbs_with_and_without_the_class(store, dense):
    query = "SELECT count(*), max(activation) FROM {} WHERE feature = 3"
    wanted = ((dense[:, 3] > 0).sum(), dense[:, 3].max())
    assert store.sql(query.format("activations")).fetchall() == [wanted]
    assert store.sql("SELECT count(*) FROM activations WHERE feature = ?", [3]).fetchall() == [wanted[:1]]
    assert duckdb.sql(query.format(f"'{store.path}/activations/*.parquet'")).fetchall() == [wanted]
    with pytest.raises(ValueError, match=r"query: .*syntax error"):
        store.sql("SELEC 1")
    with pytest.raises(ValueError, match=r"query: .*nothing"):
        store.sql("SELECT nothing FROM activations")


def test_a_folder_with_a_quote_in_its_name(tmp_path, dense):
    write_store(tmp_path / "it's", gated(), activations())
    assert np.array_equal(entries_of(FeatureStore.open(tmp_path / "it's")), dense)


@pytest.mark.parametrize("name", ["g*b", "g?b", "g[X]b", "feature=3"])
def test_a_folder_whose_name_duckdb_would_read_as_a_pattern(tmp_path, dense, name):
    write_store(tmp_path / "gXb", gated(), activations(50, seed=5))
    write_store(tmp_path / name, gated(), activations())
    store = FeatureStore.open(tmp_path / name)
    assert np.array_equal(entries_of(store), dense) and len(store.contexts(top=1)) == F


# ---- Which SAE ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_weights_and_of_what_is_done_before_and_after_them():
    assert fingerprint(gated()) == fingerprint(gated())
    assert len(fingerprint(gated())) == 16 and int(fingerprint(gated()), 16) >= 0
    others = [gated(seed=1), gated(dtype=torch.bfloat16), sf.ReluSAE(D, F, seed=0), gated().to_jumprelu()]
    assert len({fingerprint(sae) for sae in [gated(), *others]}) == 5
    one_bit = gated()
    with torch.no_grad():
        one_bit.b_dec[3] += 1e-7
    assert fingerprint(one_bit) != fingerprint(gated())
    assert fingerprint(sf.ReluSAE(1, 1, seed=0)) != fingerprint(sf.TopKSAE(1, 1, k=1, seed=0))
    norms = [None, LayerNorm(), LayerNorm(eps=0.1), ConstantNorm(), LayerNorm(undo=False)]
    options = [*({"normalize": norm} for norm in norms), {"largest": "any"}, {"largest": "abs"}]
    assert len({fingerprint(sf.TopKSAE(D, F, k=3, seed=0, **option)) for option in options}) == len(options)
    flat = sf.ReluSAE(1, 1, seed=0)
    with torch.no_grad():
        for p in flat.parameters():
            p.fill_(1)
    assert fingerprint(flat) == "a8171e018d1ac54e", "stores that were written before are still this SAE's"


def test_a_saved_sae_is_still_the_stores(store, tmp_path):
    sf.save(gated(), tmp_path / "checkpoint")
    FeatureStore.open(store.path, sf.load(tmp_path / "checkpoint"))


def test_the_store_of_another_sae(store):
    with pytest.raises(ValueError, match=r"sae: .* is the store of a GatedSAE of 40 features with fingerprint \w{16}, not"):
        FeatureStore.open(store.path, gated(seed=1))


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.top(F), rf"features: got {F}, want 0 to {F - 1}"),
        (lambda s: s.top(-1), "features: got -1"),
        (lambda s: s.top(1.5), "features: got"),
        (lambda s: s.top(0, 0), "k: got 0, want at least 1"),
        (lambda s: s.stratified(0, bins=0), "bins: got 0"),
        (lambda s: s.stratified(0, per_bin=0), "per_bin: got 0"),
        (lambda s: s.contexts([]), "features: got"),
        (lambda s: s.contexts([0], before=-1), "before: got -1"),
        (lambda s: s.histogram(F), f"features: got {F}"),
        (lambda s: s.histogram(0, bins=0), "bins: got 0"),
        (lambda s: s.histogram(0, scale="cubic"), "scale: got 'cubic'"),
    ],
)
def test_questions_that_cannot_be_answered(store, call, message):
    with pytest.raises(ValueError, match=message):
        call(store)


def nan_at(token: int) -> Tensor:
    x = activations()
    x[token, 3] = torch.nan
    return x


@pytest.mark.parametrize(
    "given, message",
    [
        (activations()[:, :5], r"activations: got 5 dimensions, want d_in = 12"),
        (activations().long(), "activations: got torch.int64"),
        (activations().double(), "activations: got torch.float64"),
        (activations().numpy().astype(int), "activations: got int64"),
        (activations()[0], r"activations: got shape \(12,\)"),
        (nan_at(500), "activations: got nan at token 500, dimension 3"),
        ([activations(3), activations(3)[0]], "activations: got shape"),
        ([1, 2], "activations: got int"),
        (activations()[:0], "activations: got none"),
        ([], "activations: got none"),
    ],
    ids=range(10),
)
def test_activations_that_do_not_fit(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        write_store(tmp_path / "store", gated(), given, batch_size=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [dict(batch_size=0), dict(context_length=0)], ids=str)
def test_options_below_one(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got 0"):
        write_store(tmp_path / "store", gated(), activations(), **options)


def test_what_store_json_says_of_the_store_is_not_for_about(tmp_path):
    own = write_store(tmp_path / "store", gated(), activations(50), about={"corpus": "mine"})
    assert own.pop("corpus") == "mine"
    for key in own:
        with pytest.raises(ValueError, match=f"about: got '{key}'"):
            write_store(tmp_path / "other", gated(), activations(50), about={key: 1})
    assert not (tmp_path / "other").exists()


def test_a_context_length_for_what_has_one(tmp_path, harvest):
    with pytest.raises(ValueError, match="an ActivationStore has its own"):
        write_store(tmp_path / "store", gated(), harvest, context_length=4)


@pytest.fixture
def broken(store, tmp_path):
    """A copy of the store, to break."""
    shutil.copytree(store.path, tmp_path / "store")
    return tmp_path / "store"


def edit(path, **changes):
    info = json.loads((path / "store.json").read_text()) | changes
    (path / "store.json").write_text(json.dumps(info))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: edit(p, version=2), "version: got 2, want 1; a newer sae_fast wrote it"),
        (lambda p: edit(p, format="else"), "not a feature store"),
        (lambda p: edit(p, d_sae="many"), "d_sae: got 'many'"),
        (lambda p: edit(p, d_sae=True), "d_sae: got True"),
        (lambda p: edit(p, context_length=-1), "context_length: got -1"),
        (lambda p: edit(p, n_tokens=0), "n_tokens: got 0"),
        (
            lambda p: edit(p, n_tokens=10**15),
            r"store.json: damaged: n_tokens: got 1000000000000000, but its files hold \d+",
        ),
        (lambda p: edit(p, n_tokens=10**30), "n_tokens: got 10{30}, but its files hold"),
        (lambda p: edit(p, d_sae=10**12), "d_sae: got 1000000000000, but its files hold"),
        (lambda p: edit(p, n_activations=7), "n_activations: got 7, but its files hold"),
        (lambda p: (p / "store.json").write_text(LFS), "store.json: a Git LFS pointer, not the file itself"),
        (lambda p: (p / "store.json").write_text("{"), "store.json: damaged: not valid JSON: .*; write the store again"),
        (lambda p: (p / "store.json").write_text("[]"), "not a feature store"),
        (lambda p: (p / "features.parquet").unlink(), "damaged: features.parquet is missing"),
        (lambda p: (p / "activations" / "00000000.parquet").unlink(), "damaged: activations/00000000.parquet is missing"),
        (
            lambda p: truncate(p / "activations" / "00000000.parquet"),
            r"damaged: activations/00000000.parquet has \d+ bytes, want",
        ),
    ],
    ids=range(16),
)
def test_a_store_that_is_damaged(broken, damage, message):
    damage(broken)
    with pytest.raises(ValueError, match=message):
        FeatureStore.open(broken)


def test_the_tokens_of_a_store_without_text_are_counted_by_its_densities(tmp_path):
    write_store(tmp_path / "a", gated(), activations())
    assert FeatureStore.open(tmp_path / "a").n_tokens == len(activations())
    edit(tmp_path / "a", n_tokens=10**15)
    with pytest.raises(ValueError, match="n_tokens: got 1000000000000000, but its files hold"):
        FeatureStore.open(tmp_path / "a")


@pytest.mark.parametrize("where", [0, -8])
def test_a_file_of_the_right_size_that_is_not_parquet(broken, where):
    file = broken / "activations" / "00000000.parquet"
    data = bytearray(file.read_bytes())
    where %= len(data)
    data[where : where + 8] = b"\xff" * 8
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        FeatureStore.open(broken).contexts(top=1)


def test_parquet_files_that_do_not_belong_together(broken, tmp_path):
    write_store(tmp_path / "other", gated(seed=3), activations(seed=2), context_length=CONTEXT)
    shutil.copy(tmp_path / "other" / "features.parquet", broken / "features.parquet")
    info = json.loads((broken / "store.json").read_text())
    edit(broken, files=info["files"] | {"features.parquet": (broken / "features.parquet").stat().st_size})
    with pytest.raises(ValueError, match="damaged"):
        FeatureStore.open(broken).contexts(top=1)


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no feature store"):
        FeatureStore.open(tmp_path)


@pytest.mark.parametrize("package", ["duckdb", "pyarrow"])
def test_a_package_that_is_missing_is_named_before_any_work(store, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'sae-fast\[store\]'"):
        if package == "duckdb":
            FeatureStore.open(store.path)
        else:
            write_store(tmp_path / "s", gated(), activations())
    assert list(tmp_path.iterdir()) == []


# ---- Nothing is lost or half-written --------------------------------------------------------------------------------


def test_a_store_is_replaced_only_when_asked(tmp_path, dense):
    path = tmp_path / "store"
    write_store(path, gated(), activations(50))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_store(path, gated(), activations())
    assert FeatureStore.open(path).n_tokens == 50
    write_store(path, gated(), activations(), overwrite=True)
    assert np.array_equal(entries_of(FeatureStore.open(path)), dense)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_store_stays(tmp_path, overwrite):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("words")
    for path in (tmp_path / "work", tmp_path / "work" / "thesis.txt"):
        with pytest.raises(FileExistsError, match="is not a feature store"):
            write_store(path, gated(), activations(), overwrite=overwrite)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "words"
    (tmp_path / "empty").mkdir()
    write_store(tmp_path / "empty", gated(), activations())


@pytest.mark.parametrize("name", ["marks.json", "activations/mine.txt", "mine.parquet", "notes"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_of_ones_own_inside_a_store_stays(broken, name, damaged):
    (broken / name).mkdir() if name == "notes" else (broken / name).write_text("mine")
    if damaged:
        (broken / "store.json").write_bytes(b"\xff")
    with pytest.raises(FileExistsError, match=f"holds {name}, which is no file of the store"):
        write_store(broken, gated(), activations(), overwrite=True)
    assert (broken / name).exists() and (broken / "features.parquet").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_activations_are_encoded_stays(tmp_path, overwrite):
    def batches():
        yield activations(50)
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "thesis.txt").write_text("words")

    with pytest.raises(FileExistsError, match="is not a feature store"):
        write_store(tmp_path / "store", gated(), batches(), overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["store", "thesis.txt"]


@pytest.mark.parametrize("content", [b"", b'{"format": "sae_f', b"\xff", b"[" * 100_000], ids=range(4))
def test_a_store_with_a_damaged_manifest_is_written_again(broken, content):
    (broken / "store.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: not valid JSON: .*; write the store again"):
        FeatureStore.open(broken)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_store(broken, gated(), activations())
    write_store(broken, gated(), activations(50), overwrite=True)
    assert FeatureStore.open(broken).n_tokens == 50


def test_through_a_link_the_store_is_replaced_and_not_the_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "store")
    for n in (50, 60):
        write_store(tmp_path / "link", gated(), activations(n), overwrite=True)
        assert FeatureStore.open(tmp_path / "disk" / "store").n_tokens == n
    assert (tmp_path / "link").is_symlink() and [p.name for p in (tmp_path / "disk").iterdir()] == ["store"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]


@contextmanager
def files_no_larger_than(size: int):
    """What a full disk is like, without a disk: a write beyond that is an OSError (SIGXFSZ is ignored by Python)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 2000, 15000, 25000])
def test_a_disk_that_fills_leaves_the_previous_store_whole(tmp_path, size):
    """At 0 the first run fails; then a later one, or a Parquet file."""
    path = tmp_path / "store"
    write_store(path, gated(), activations(50))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with files_no_larger_than(size), pytest.raises(OSError):
        write_store(path, gated(), activations(8000), texts=[f"w{i}" for i in range(8000)], overwrite=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    assert FeatureStore.open(path, gated()).n_tokens == 50


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", ["writer._merge", "writer._write_tokens", "writer._write", "manifest.fingerprint"])
def test_an_error_at_any_step_leaves_nothing(tmp_path, monkeypatch, step, error):
    def fail(*_, **__):
        raise error("stop")

    monkeypatch.setattr(f"sae_fast.analysis.store.{step}", fail)
    with pytest.raises(error):
        write_store(tmp_path / "store", gated(), activations(40), texts=["a"] * 40)
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_brings_the_previous_store_back(tmp_path, monkeypatch):
    path, rename = tmp_path / "store", os.rename
    write_store(path, gated(), activations(50))

    def fail(source, target):
        if Path(source).name == "new":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        write_store(path, gated(), activations(), overwrite=True)
    assert FeatureStore.open(path).n_tokens == 50 and [p.name for p in tmp_path.iterdir()] == ["store"]


def test_the_benchmark_measures_both_goals(tmp_path):
    from typer.testing import CliRunner

    from benchmarks import store as benchmark

    outcome = CliRunner().invoke(benchmark.app, ["--quick", "--asked", "8", "--out", str(tmp_path / "store.json")])
    assert outcome.exit_code == 0, outcome.output
    (results,) = json.loads((tmp_path / "store.json").read_text())["results"]
    (encoded,) = results["encoding"]
    assert encoded["tokens"] == 1024 and encoded["ratio"] > 0
    assert 0 < results["questions"]["median"] <= results["questions"]["worst"]
    assert results["questions"]["activations"] == pytest.approx(100_000, rel=0.05)
