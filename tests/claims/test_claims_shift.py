"""The SHIFT analogue: the seal, the blind rule by hand, what is planted, and verdicts from numbers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.claims import _biographies, _blind_rule, _shift_methods, _shift_worlds, shift
from benchmarks.claims._blind_rule import Shown
from benchmarks.claims._claim import CONDITION, FAILS, HOLDS
from benchmarks.claims._sealed import Sealed
from benchmarks.claims._shift_worlds import PLANTED, TOKENLESS, WORDS, World


@pytest.fixture
def bios():
    return _biographies.Biographies(seed=3)


def by_gender(bios):
    """A method that is always right about the gender."""
    women = torch.tensor([word in _blind_rule.FEMININE for word in bios.words])
    return lambda tokens: torch.nn.functional.one_hot(women[tokens].any(1).long(), 2).double()


def test_the_balanced_set_is_out_of_reach_until_all_methods_are_declared(bios, monkeypatch):
    drawn, balanced = [], bios.balanced
    monkeypatch.setattr(bios, "balanced", lambda n, seed: drawn.append(seed) or balanced(n, seed))
    sealed, method = Sealed(bios, 40, seed=5), by_gender(bios)
    for reach in (lambda: sealed.evaluate({}), lambda: sealed.skyline_split(8)):
        with pytest.raises(RuntimeError, match="out of reach before the final evaluation is declared"):
            reach()
    with pytest.raises(RuntimeError, match="got no method"):
        sealed.declare({})
    assert not drawn and not sealed.declared, "no balanced text was ever made"
    methods = {"by gender": method}
    sealed.declare(methods)
    methods["late"] = method
    with pytest.raises(RuntimeError, match="was declared already"):
        sealed.declare({"late": method})
    split = sealed.skyline_split(40)
    found = sealed.evaluate({"skyline": method})
    assert set(found) == {"by gender", "skyline"}
    assert (found["by gender"].task, found["by gender"].spurious, found["by gender"].worst_group) == (0.5, 1.0, 0.0)
    assert drawn[0] != drawn[1] and not torch.equal(split.tokens, balanced(40, drawn[1]).tokens)
    with pytest.raises(RuntimeError, match="which were declared as methods"):
        sealed.evaluate({"by gender": method})


def test_only_the_seal_makes_balanced_texts():
    for path in Path(shift.__file__).parent.glob("*shift*.py"):
        assert ".balanced(" not in path.read_text(encoding="utf-8")


def test_a_seed_draws_balanced_texts_after_its_declaration_only(monkeypatch):
    events = []
    declare, balanced = Sealed.declare, _biographies.Biographies.balanced
    monkeypatch.setattr(Sealed, "declare", lambda self, m: events.append("declared") or declare(self, m))
    monkeypatch.setattr(_biographies.Biographies, "balanced", lambda *a, **k: events.append("drawn") or balanced(*a, **k))
    bios = _biographies.Biographies(seed=0)
    world = World(bios, _biographies.train_model(bios, 0, steps=2))
    report = shift.in_world(TOKENLESS, world, 0, quick=True)
    assert events == ["declared", "drawn", "drawn"]
    assert {"original", "token deletion", "Gated, general + head", "feature skyline", "oracle"} <= report[
        "accuracies"
    ].keys()


@pytest.mark.parametrize(
    ("texts", "mark"),
    [
        ([("she works at the ward .", [3, 0, 0, 0, 1, 0])], "irrelevant"),
        ([("she works at the ward .", [1, 0, 0, 0, 1, 0])], "relevant"),
        ([("they wear a red scarf .", [0, 0, 0, 1, 1, 1])], "irrelevant"),
        ([("anna is kind .", [0, 0, 0, 1]), ("she is tall .", [0, 0, 0, 1])], "irrelevant"),  # full stops of women
        ([("anna is kind .", [0, 0, 0, 1]), ("he is tall .", [0, 0, 0, 1])], None),
        ([("ward is big .", [0, 0, 0, 1])], "relevant"),  # full stops after words of nurses
        ([("she has a ward .", [0, 0, 0, 0, 1])], None),  # a conjunction: of a woman and a nurse
        ([("kind . she works", [0, 1, 0, 0])], None),  # what comes later is not known yet
        ([("she is kind .", [0, 0, 0, 0])], None),
        ([], None),
    ],
)
def test_the_blind_rule_says_what_it_is_written_to_say(texts, mark):
    assert _blind_rule.judge(Shown(text.split(), activations) for text, activations in texts) == mark


def test_the_planted_direction_is_on_for_women_who_are_nurses_only(bios):
    model = _biographies.train_model(bios, 0, steps=2)
    planted, texts = _shift_worlds.Planted(model, bios, 0), bios.general(400, 1)
    on = planted.embed.on(texts.tokens)
    nurse, woman = texts.profession == 1, texts.gender == _biographies.FEMALE
    assert not on[~(nurse & woman)].any() and on[nurse & woman].any(1).double().mean() > 0.5
    assert (on[:, 1:] >= on[:, :-1]).all(), "once on it stays on"
    moved = planted.embed(texts.tokens) - model.embed(texts.tokens)
    assert torch.equal(moved.norm(dim=-1) > 0, on)


@pytest.mark.parametrize(
    "words", [_blind_rule.MASCULINE | _blind_rule.FEMININE, _blind_rule.NOT_WORK], ids=["gender", "all"]
)
def test_deletion_leaves_none_of_the_words_and_the_rest_in_order(words, bios, monkeypatch):
    world = World(bios, _biographies.train_model(bios, 0, steps=2))
    lab = _shift_methods.Lab(world, 0, quick=True)
    seen = []
    monkeypatch.setattr(lab, "fitted", lambda tokens: seen.append(tokens) or lab.probe)
    lab.deletion(words)
    assert not words & {bios.words[i] for i in seen[0].flatten().tolist()}
    text = [word for word in world.words(lab.train.tokens[0]) if word not in words]
    assert world.words(seen[0][0])[: len(text)] == text and set(world.words(seen[0][0])[len(text) :]) <= {"<begin>"}


def test_neurons_as_features_are_exact():
    sae, x = _shift_methods.signs(5), torch.randn(7, 5)
    assert torch.equal(sae.decode(sae.encode(x)), x)


def result(noise, **worst):
    """One seed's result; ``worst``: of which methods the worst group is other than 0.5."""

    def of(world, methods):
        return {m: {"task": 0.7, "spurious": 0.6, "worst_group": worst.get(f"{world}: {m}", 0.5) + noise} for m in methods}

    ends = ("", " + head")
    judged = {"candidates": 10, "irrelevant": 5, "relevant": 3, "no opinion": 2}
    features = [f"{m}{e}" for m in ("Gated, general", "Gated, ambiguous", "ReLU, general", "embedding only") for e in ends]
    features += [f"random {draw}{e}" for draw in range(shift.DRAWS) for e in ends]
    rest = [
        "original",
        shift.DELETION,
        shift.WIDE,
        "CBP",
        "neuron skyline",
        "feature skyline",
        "feature skyline + head",
        "oracle",
    ]
    rest += ["and the conjunction", "and the conjunction + head"]
    site = {"f1": 0.9, "rank": 0, "mark": worst.get("mark"), "candidate": True}
    return {
        world: {
            "accuracies": of(world, features + rest),
            "judged": {m: judged for m in features},
            "saes": {kind: {"model.embed": {"l0": 5.0, "fvu": 0.1}} for kind in ("Gated", "ReLU")},
            "planted": {"model.embed": site},
        }
        for world in (WORDS, TOKENLESS, PLANTED)
    }


def verdicts(**worst):
    return [row.verdict for row in shift.conclude([result(noise, **worst) for noise in (-0.001, 0.0, 0.001)])]


def test_verdicts_follow_from_the_worst_groups():
    both = {f"words: Gated, general{end}": 0.9 for end in ("", " + head")}
    assert verdicts()[0] == FAILS and verdicts(**both)[0] == HOLDS
    assert verdicts(**{"words: Gated, general + head": 0.9})[0] == CONDITION
    assert (
        verdicts(**both)[1] == HOLDS and verdicts(**both, **{f"words: random {d}": 0.95 for d in range(3)})[1] == CONDITION
    )
    assert verdicts(**both, **{"words: CBP": 0.95})[2] == FAILS
    assert verdicts(**both, **{"words: Gated, ambiguous + head": 0.89})[5] == HOLDS
    assert verdicts(**both, **{"words: Gated, ambiguous + head": 0.7})[5] == CONDITION and verdicts(**both)[5] == FAILS
    everywhere = {f"{world}: Gated, general + head": 0.9 for world in (WORDS, TOKENLESS)}
    assert verdicts(**everywhere)[7:9] == [FAILS, HOLDS]
    better = {f"{world}: {shift.WIDE}": 0.95 for world in (WORDS, TOKENLESS)}
    assert verdicts(**everywhere | better)[7:9] == [CONDITION, CONDITION], "than one deletion, not than the other"
    assert verdicts(mark="irrelevant")[-1] == HOLDS and verdicts(mark=None)[-1] == FAILS


def test_every_row_and_every_panel_says_that_it_is_an_analogue():
    matplotlib = pytest.importorskip("matplotlib.figure")
    results = [result(noise) for noise in (-0.001, 0.001)]
    assert all(row.claim.startswith("Analogue: ") for row in shift.conclude(results))
    assert "analogue" in shift.TITLE and "analogue" in shift.SETTING
    figure = matplotlib.Figure()
    shift.draw(results, figure)
    assert all("analogue" in axes.get_title(loc="left") for axes in figure.axes)
