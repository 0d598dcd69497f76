"""The feature report, on activations that fire where we say they do."""

import json

import numpy as np
import pytest
import torch

import sae_fast as sf
from sae_fast.analysis import features
from sae_fast.data.activations import VERSION, ActivationStore

D = 5
CONTEXT = 8
WORDS = ["alpha", "be*ta", "gamma", "x_y", "de|lta", "[eps]", "zeta", "eta"]


@pytest.fixture
def store(tmp_path):
    """400 tokens; direction 0 lights up in every context, 1 in every other, 2 twice, 3 once in the last context."""
    tokens = 400
    words = [WORDS[i % CONTEXT] + str(i // CONTEXT) for i in range(tokens)]
    begins = np.cumsum([0, *(len(word) + 1 for word in words)])
    rows = np.zeros((tokens, D), dtype=np.float32)
    for context in range(tokens // CONTEXT):
        first = context * CONTEXT
        rows[first + 1, 0] = 1 + context / 10
        rows[first + 2, 0] = 0.5
        if context % 2:
            rows[first + 3, 1] = 2 + context / 10
    rows[[5 * CONTEXT, 6 * CONTEXT], 2] = [3.0, 4.0]
    rows[-1, 3] = 9.0
    info = dict(d=D, n_tokens=tokens, context_length=CONTEXT, layer=0, model="", key="", version=VERSION)
    np.save(tmp_path / "activations.npy", rows)
    np.save(tmp_path / "tokens.npy", np.arange(tokens, dtype=np.int32))
    np.save(tmp_path / "spans.npy", np.stack([begins[:-1], begins[1:] - 1], axis=1))
    (tmp_path / "text.txt").write_text("\n".join(words))
    (tmp_path / "store.json").write_text(json.dumps(info))
    return ActivationStore.open(tmp_path)


@pytest.fixture
def sae():
    """Feature i is direction i, above 0.1; feature 4 and those after D never fire."""
    sae = sf.GatedSAE(D, D + 2, seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D + 2, D))
        sae.b_gate.fill_(-0.1)
        sae.b_gate[D:] = -1.0
    return sae


def test_top_contexts_best_first_one_each(sae, store):
    zero, one, two, three = features.describe(sae, store, [0, 1, 2, 3], examples=3)
    assert [e.token for e in zero.examples] == [49 * CONTEXT + 1, 48 * CONTEXT + 1, 47 * CONTEXT + 1]
    assert [e.activation for e in zero.examples] == pytest.approx([5.9, 5.8, 5.7])
    assert (zero.density, zero.maximum) == (2 * 50 / 400, pytest.approx(5.9))
    assert [e.token for e in one.examples] == [49 * CONTEXT + 3, 47 * CONTEXT + 3, 45 * CONTEXT + 3]
    assert [e.token for e in two.examples] == [6 * CONTEXT, 5 * CONTEXT]
    assert two.examples[0].text == ("", "alpha6", "\nbe*ta6\ngamma6\nx_y6\nde|lta6\n[eps]6\nzeta6\neta6")
    assert three.examples[0].text[1] == "eta49"
    assert three.density == 1 / 400


def test_places_do_not_depend_on_the_size_of_a_chunk(sae, store, monkeypatch):
    wanted = features.describe(sae, store, [0, 2])
    monkeypatch.setattr(features, "CHUNK", 7)
    assert features.describe(sae, store, [0, 2]) == wanted


def test_contexts_that_read_the_same_are_shown_once(sae, store):
    (store.folder / "text.txt").write_text(" ".join(["same"] * 1000))
    np.save(store.folder / "spans.npy", np.tile([[0, 4]], (400, 1)))
    assert len(features.describe(sae, store, [0])[0].examples) == 1


def test_choice_runs_from_rare_to_common_and_skips_the_dead(sae, store):
    tally = features.Tally(sae.d_sae)
    for x in store.chunks(7):
        tally.update(sae.encode_sparse(x))
    assert features.spread(tally, count=2) == [1, 0]  # 25 and 100 firings, and no other fires ten times
    assert features.spread(tally, count=10) == [3, 2, 1, 0]
    assert features.spread(tally, count=2, least=1) == [3, 1]  # of 3, 2 | 1, 0: the highest each


def test_a_dead_feature_has_no_examples(sae, store):
    (dead,) = features.describe(sae, store, [6])
    assert (dead.density, dead.maximum, dead.examples) == (0.0, 0.0, [])


@pytest.mark.parametrize("feature", [-1, D + 2])
def test_a_feature_that_does_not_exist(sae, store, feature):
    with pytest.raises(ValueError, match=rf"features: got {feature}, want 0 to {D + 1}"):
        features.describe(sae, store, [feature])


def test_markdown_marks_the_token_and_escapes_the_text(sae, store):
    page = features.markdown(features.describe(sae, store, [0, 2], examples=1), "Title", store.n_tokens)
    assert f"all {store.n_tokens} tokens" in page
    assert page.index("Feature 2") < page.index("Feature 0")  # from rare to common
    assert page.startswith("# Title\n")
    assert "## Feature 2\n\ndensity 0.500% · max 4.00\n" in page
    line = next(line for line in page.splitlines() if line.startswith("| 5.90"))
    assert line == r"| 5.90 | …alpha49 [[**be\*ta49**]] gamma49 x\_y49 de\|lta49 \[eps]49 zeta49 eta49… |"
