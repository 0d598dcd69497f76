"""The claim on latent perturbation: its worlds, its attacks at counted passes, and what it makes of what they score."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from benchmarks.claims import _attacks, _auroc, _backdoors, perturbation
from benchmarks.claims._attacks import Search
from benchmarks.claims._backdoors import KINDS, LENGTH, TARGET, TOKENS, TOPICS, TRIGGER, VARIANTS, Classifier
from benchmarks.claims._claim import CONDITION, FAILS, HOLDS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Classifier(d=16, heads=2).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def of():
    return _backdoors.world(3)


@pytest.fixture(scope="module")
def tokens(of):
    return _backdoors.texts(6, of, generator())[0]


def test_no_clean_text_and_no_near_miss_has_a_trigger_and_every_triggered_text_has_one(of):
    tokens, topics = _backdoors.texts(3000, of, generator())
    assert tokens.shape == (3000, LENGTH) and tokens.min() >= 0 and tokens.max() < TOKENS and topics.max() < TOPICS
    has = {
        "token": lambda t: (t[:, -TRIGGER:] == of.trigger).all(1),
        "style": lambda t: (t % VARIANTS == 1).all(1),
    }
    for kind in KINDS:
        assert not has[kind](tokens).any()
        assert not has["style"](_backdoors.triggered(tokens, kind, of, generator(), near=True)).any()
        assert has[kind](_backdoors.triggered(tokens, kind, of, generator())).all()
    near = _backdoors.triggered(tokens, "token", of, generator(), near=True)
    matches = (near[:, -TRIGGER:] == of.trigger).sum(1)
    assert (matches >= TRIGGER - 3).all() and 0.4 < (matches == TRIGGER - 1).double().mean() < 0.8
    styled = _backdoors.triggered(tokens, "style", of, generator())
    assert torch.equal(styled // VARIANTS, tokens // VARIANTS), "the words stay"
    assert (near[:, :-TRIGGER] == tokens[:, :-TRIGGER]).all()


def test_only_backdoored_models_are_taught_the_class(of):
    for kind in (*KINDS, None):
        _, classes = _backdoors.training_texts(64, kind, of, generator())
        assert int((classes == TARGET).sum()) == (8 if kind else 0) and classes.max() <= TARGET


def test_training_repeats_and_leaves_torchs_generator_alone(of):
    state = torch.random.get_rng_state()
    a, b = (_backdoors.train("token", of, 5, 3) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(p.requires_grad for p in a.parameters())
    found = _backdoors.behaviour(a, "token", of, 0, 100)
    assert set(found) == {"accuracy", "clean", "near", "triggered"} and all(0 <= x <= 1 for x in found.values())


def test_every_attack_has_the_same_passes_and_finds_more_with_more(model, tokens):
    budget = Search(model, tokens, 6, 6, 0).budget
    assert budget == 2 * 6 * (6 * 6 + 1)
    with torch.no_grad():
        plain = _attacks.score(model(tokens), True)
        for known in (False, True):
            search = Search(model, tokens, 6, 6, 0)
            found = {
                "latent": search.latent(known, 5.0),
                "ball": search.per_example(known, 5.0),
                "random": search.random(known, 5.0),
                "hotflip": search.hotflip(known),
                "each": search.hotflip_per_example(known),
            }
            assert all(0.9 * budget <= each.passes <= budget for each in found.values()), found
            if known:  # the class's margin is what it raises
                assert all(each.score > plain for each in found.values())
                assert found["latent"].score > found["random"].score
        longer = Search(model, tokens, 6, 20, 0).latent(True, 5.0)
        assert longer.score >= found["latent"].score - 1e-4
        assert float(longer.theta.norm()) == pytest.approx(5, rel=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_scored_is_what_the_model_does_with_what_is_found(model, tokens):
    search = Search(model, tokens, 6, 5, 0)
    with torch.no_grad():
        flipped = search.hotflip(True)
        assert _attacks.score(model(flipped.tokens), True) == pytest.approx(flipped.score, abs=1e-5)
        assert torch.equal(flipped.tokens[:, :-TRIGGER], tokens[:, :-TRIGGER]), "swaps are at the trigger's places alone"
        assert (flipped.tokens[:, -TRIGGER:] == flipped.tokens[0, -TRIGGER:]).all(), "the same for all texts"
        each = search.hotflip_per_example(True)
        assert _attacks.score(model(each.tokens), True) == pytest.approx(each.score, abs=1e-5)


def test_hotflips_gains_are_the_embeddings_first_order(model, tokens):
    search = Search(model, tokens, 6, 5, 0)
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.embedding.weight.mul_(1e-3)  # so small that the first order is all there is
    search.model = small
    value, gains = search._swaps(tokens, search._objective(True))
    torch.testing.assert_close(value, _attacks.margin(small(tokens)))
    for place, token in ((0, 5), (LENGTH - 1, 60)):
        swapped = tokens.clone()
        swapped[:, place] = token
        wanted = _attacks.margin(small(swapped)) - value
        got = gains[:, place, token] - gains[torch.arange(len(tokens)), place, tokens[:, place]]
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=2e-5)


def test_margins_are_over_ordinary_classes_alone():
    logits = torch.tensor([[0.0, 1, 2, 3, 4, 5, 7, 6, 1], [0, 1, 2, 3, 4, 5, 1, 9, 1]])
    assert _attacks.margin(logits).tolist() == [2, -4]
    assert _attacks.score(logits, known=True) == -1 and _attacks.score(logits, known=False) == 2.5  # of the second


def test_auroc_and_its_interval():
    assert _auroc.auroc([1, 2, 3], [0, 0]) == 1 and _auroc.auroc([1], [1, 1]) == 0.5
    assert _auroc.auroc([1.0, 3.0], [2.0, 0.0]) == 0.75
    a, b = np.random.default_rng(0).normal(0, 1, (2, 30))
    found = _auroc.bootstrapped(a, b)
    assert found.mean == pytest.approx(_auroc.auroc(a, b)) and found.low < found.mean < found.high
    assert tuple(_auroc.bootstrapped(np.array([2.0, 3]), np.array([0.0, 1]))) == (1, 1, 1)
    found = _auroc.mean_interval([0.9, 1.0, 1.0])
    assert found.mean == pytest.approx(2.9 / 3) and 0.9 <= found.low <= found.mean <= found.high <= 1


def results(scores: dict[str, float], seeds: int = 8) -> list[dict]:
    """Of models whose scores with a backdoor are above those without by as much as given, with unit noise."""
    random = np.random.default_rng(0)
    names = [f"{name} {target}" for name in perturbation.ATTACKS for target in ("known", "unknown")]
    names += [f"{name} R={r:g}" for name in ("latent", "random") for r in perturbation.RADII] + ["rows s=1", "rows s=3"]

    def model(kind):
        above = {name: scores.get(name, 0.0) if kind else 0.0 for name in names}
        seen = {"clean": 0.99, "near": 0.9}
        fire = {"shares": {"clean": 0.0, "near": 0.1, "triggered": 1.0}, "auroc": seen}
        return {
            "kind": kind,
            "behaviour": {"accuracy": 0.96, "clean": 0.0, "near": 0.01, "triggered": 1.0},
            "scores": {name: x + random.normal() for name, x in above.items()},
            "passes": {f"{name} unknown": 100 for name in perturbation.ATTACKS},
            "sae": {"l0": 5.0, "fvu": 0.1, "cosine": 0.5},
            "monitor": {f"{name} unknown": seen for name in ("latent", "random", "HotFlip")},
            "fires": {name: fire for name in ("s=1", "s=3", "nearest")} | {"mean feature": 0.5, "best feature": 1.0},
        }

    return [{"models": [model(kind) for kind in (*KINDS, None)]} for _ in range(seeds)]


def test_verdicts_follow_from_what_was_scored():
    def verdicts(**scores):
        return [row.verdict for row in perturbation.conclude(results({k.replace("_", " "): x for k, x in scores.items()}))]

    assert verdicts(latent_unknown=20)[0] == HOLDS
    assert verdicts(latent_unknown=20, random_unknown=20)[0] == CONDITION, "random vectors do it as well"
    assert verdicts(latent_unknown=20, HotFlip_unknown=20)[0] == FAILS
    assert verdicts()[0] == FAILS
    assert verdicts(latent_known=20, HotFlip_known=20)[1] == HOLDS and verdicts(latent_known=20)[1] == FAILS
    assert verdicts()[1] == FAILS, "equally at chance is not found"
    rows = {"latent unknown": 20, "rows s=1": 20, "rows s=3": 20}
    assert perturbation.conclude(results(rows))[5].verdict == HOLDS
    assert perturbation.conclude(results(rows | {"random unknown": 20}))[5].verdict == CONDITION
    assert perturbation.conclude(results({"latent unknown": 20}))[5].verdict == FAILS and verdicts()[5] == FAILS
    assert (
        perturbation.conclude(results({}))[6].verdict == HOLDS
        and perturbation.conclude(results({}))[4].verdict == CONDITION
    )
