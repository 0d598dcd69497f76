"""Oversight by cognition: pairs are told apart for the reason given, and what came out is said as it came out."""

import copy

import pytest
import torch

pytest.importorskip("scipy")

from benchmarks.claims import cognition
from benchmarks.claims._biographies import Biographies, train_model
from benchmarks.claims._claim import CONDITION, FAILS, HOLDS
from benchmarks.claims.cognition import GENDER, PROFESSION


@pytest.fixture(scope="module")
def found():
    """A pair from a model that has learnt less than the claim's."""
    bios = Biographies(77, cue=1.0, told=0.9)
    model = train_model(bios, 77, steps=250)
    corpus, labelled, texts = bios.general(500, 1).tokens, bios.ambiguous(500, 2), bios.balanced(1500, 3)
    fresh = cognition.classifier(model)
    sae = cognition.trained_sae(fresh, corpus, 0, quick=False)
    marks = cognition.judged(fresh, sae, corpus, bios)
    two = [cognition.tuned(model, texts.tokens, y, i, quick=False) for i, y in enumerate((texts.profession, texts.gender))]
    return model, two, cognition.compared(two, sae, marks, bios, labelled, corpus, 0), labelled, marks


@pytest.mark.slow
def test_a_pair_is_told_apart_by_its_features(found):
    _, _, pair, _, marks = found
    assert pair["agreement"] > 0.95 and pair["apart"] > cognition.APART
    assert {cognition.ABOUT_GENDER, cognition.ABOUT_WORK} < set(marks)
    assert pair["features"][GENDER] > pair["features"][PROFESSION] + 0.1
    assert 0.2 < cognition.told(pair, "random") < 0.8, "marks that say nothing tell nothing"


@pytest.mark.slow
def test_classifiers_share_all_that_is_before_the_last_block(found):
    model, two, _, _, _ = found
    for each in two:
        for name, p in each.model.named_parameters():
            assert torch.equal(p, model.get_parameter(name)) == (not name.startswith("blocks.1")), name


@pytest.mark.slow
def test_effects_of_words_add_up_to_the_margin(found):
    _, two, _, labelled, _ = found
    clean, linear = labelled.tokens[:1], copy.deepcopy(two[0])
    patch = clean.clone()
    patch[0, 1] = clean[0, 1] + 1  # another word
    linear.model.blocks[0], linear.model.blocks[1] = torch.nn.Identity(), torch.nn.Identity()
    with torch.no_grad():
        whole = float(cognition.margin(linear(patch)) - cognition.margin(linear(clean)))
    effects = cognition.word_effects(linear, clean, patch, 151, steps=3)
    assert set(effects.nonzero().flatten().tolist()) == {int(clean[0, 1]), int(patch[0, 1])}
    assert effects.sum() == pytest.approx(abs(whole), rel=1e-3)


def test_a_share_is_of_what_has_a_mark():
    effects = torch.tensor([1.0, 2.0, 3.0, 10.0])
    of, against = torch.tensor([True, False, False, False]), torch.tensor([False, False, True, False])
    assert cognition.share(effects, of, against) == pytest.approx(0.25)
    assert cognition.share(torch.zeros(4), of, against) == 0.5
    assert [cognition.right([a, b]) for a, b in ((0.1, 0.2), (0.2, 0.2), (0.3, 0.2))] == [1, 0.5, 0]


def result(features=(0.2, 0.8), agreement=1.0, random=((0.4, 0.5), (0.5, 0.4)), audit=(0.1, 0.9)):
    pair = {"agreement": agreement, "apart": 0.5, "features": list(features), "labelled": [0.0, 0.0]}
    pair |= {"random": [list(each) for each in random], "tokens": [0.3, 0.7], "audit": list(audit)}
    return {"pairs": [pair] * 4, "marks": {}}


def test_conclusions_follow_what_was_measured():
    rows = cognition.conclude([result() for _ in range(6)])
    assert [row.verdict for row in rows] == [HOLDS, FAILS] and "scalable oversight" in rows[0].claim
    assert "100 % [54.1, 100]" in rows[0].result, "of 6 seeds, each one observation"
    assert cognition.conclude([result(features=(0.8, 0.2)) for _ in range(6)])[0].verdict == FAILS
    some = [result() for _ in range(6)] + [result(agreement=0.9)]
    assert cognition.conclude(some)[0].verdict == CONDITION and "24 of 28 pairs" in cognition.conclude(some)[0].result
    by_lot = cognition.conclude([result(random=((0.1, 0.9),)) for _ in range(6)])[0]
    assert by_lot.verdict == CONDITION and "at random are not at ½" in by_lot.result
    none = cognition.conclude([result(agreement=0.9) for _ in range(6)])
    assert len(none) == 1 and none[0].verdict == FAILS and "too few" in none[0].result
    needed = [result(audit=(0.9, 0.1)) | {"pairs": [result(audit=(0.9, 0.1))["pairs"][0] | {"tokens": [0.7, 0.3]}] * 4}]
    assert cognition.conclude(needed * 6)[1].verdict == HOLDS
