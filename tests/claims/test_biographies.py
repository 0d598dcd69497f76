"""The world of the SHIFT analogue: what its texts tell and do not tell, and what its language model learns of that."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.claims._biographies import (
    FEMALE,
    GENDERED,
    LENGTH,
    MALE,
    NAMES,
    PROFESSIONS,
    WARM_COOL,
    WORK,
    Biographies,
    Transformer,
    train_model,
)  # fmt: skip
from sae_fast.analysis import ablate, splice
from sae_fast.analysis.shift import Probe, accuracies, fit_head


@pytest.fixture(params=[False, True], ids=["words", "tokenless"])
def bios(request):
    return Biographies(1234, request.param)


@pytest.fixture(scope="module")
def tokenless():
    bios = Biographies(1234, tokenless=True)
    return bios, train_model(bios, 1234, steps=450)


def bags(bios, texts):
    """[n, V]: how often each word is in each text."""
    return F.one_hot(texts.tokens, len(bios.words)).sum(1).float()


def decoded(x, y, held_x, held_y):
    """The accuracy on held-out rows of a linear probe."""
    model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 2))
    fit_head(model, "0", [x], y)
    with torch.no_grad():
        return float((model(held_x).argmax(1) == held_y).double().mean())


def test_sets_are_what_they_say_and_the_same_in_every_call(bios):
    general, ambiguous, balanced = bios.general(3000, 1), bios.ambiguous(400, 1), bios.balanced(400, 1)
    for texts in (general, ambiguous, balanced):
        assert texts.tokens.shape == (len(texts.gender), LENGTH)
        assert all(part.dtype == torch.int64 for part in texts)
        assert (texts.tokens[:, 0] == 0).all() and (texts.tokens[:, 1:] > 0).all()
    counts = torch.zeros(len(PROFESSIONS), 2).index_put_(
        (general.profession, general.gender), torch.ones(3000), accumulate=True
    )
    assert counts.min() > 0.8 * 3000 / 12, "every profession with either gender, nurses who are women among them"
    assert (ambiguous.profession == ambiguous.gender).all() and ambiguous.gender.sum() == 200
    assert [int(((balanced.profession == p) & (balanced.gender == g)).sum()) for p in (0, 1) for g in (0, 1)] == [100] * 4
    again = Biographies(bios.seed, bios.tokenless)
    assert all(torch.equal(a, b) for a, b in zip(general, again.general(3000, 1), strict=True))
    assert not torch.equal(general.tokens, bios.general(3000, 2).tokens)
    assert not torch.equal(general.tokens, Biographies(bios.seed + 1, bios.tokenless).general(3000, 1).tokens)


def test_no_text_names_a_profession(bios):
    assert not set(PROFESSIONS) & set(bios.words)
    assert bios.text(bios.general(1, 0).tokens[0]).endswith(".")


def test_gender_is_in_many_words_and_profession_in_rare_ones():
    bios = Biographies(1234)
    texts = bios.ambiguous(1000, 1)
    counts = bags(bios, texts)
    words = {g: [bios.index[w] for w in (*NAMES[g], *GENDERED[g])] for g in (MALE, FEMALE)}
    work = [bios.index[w] for of in WORK.values() for who in PROFESSIONS[:2] for w in of[who].split()]
    for g in (MALE, FEMALE):
        assert not counts[texts.gender == g][:, words[1 - g]].any()
        assert counts[texts.gender == g][:, words[g]].sum(1).mean() > 1.2 * counts[:, work].sum(1).mean()
    for tokens in (words[MALE] + words[FEMALE], work):
        assert (counts[:, tokens] > 0).any(0).sum() > 10


def test_without_tokens_no_word_tells_gender_and_no_bag_of_words_does():
    bios = Biographies(1234, tokenless=True)
    texts, held = bios.general(6000, 1), bios.general(3000, 2)
    counts = bags(bios, texts)
    women, men = (counts[texts.gender == g] for g in (FEMALE, MALE))
    spread = (women.var(0) / len(women) + men.var(0) / len(men)).sqrt().clamp(min=1e-9)
    assert float(((women.mean(0) - men.mean(0)) / spread).abs().max()) < 4.5, "of 120 words and more, at 4.5 σ"
    for colours in WARM_COOL:
        assert (counts[:, [bios.index[c] for c in colours]].sum(1) == 2).all()
    assert abs(decoded(counts, texts.gender, bags(bios, held), held.gender) - 0.5) < 0.04


@pytest.mark.slow
def test_without_tokens_the_model_learns_gender_because_it_predicts_words(tokenless):
    bios, model = tokenless
    texts, held = bios.general(3000, 11), bios.general(1500, 12)
    colour = torch.zeros(len(bios.words), dtype=torch.bool)
    colour[[bios.index[c] for colours in WARM_COOL for c in colours]] = True

    def pooled(tokens, upto):
        with torch.no_grad():
            x = model.embed(tokens)
            for block in model.blocks[:upto]:
                x = block(x)
        return x[:, 1:].mean(1)

    found = [decoded(pooled(texts.tokens, n), texts.gender, pooled(held.tokens, n), held.gender) for n in (0, 2)]
    assert found[0] < 0.55 and found[1] > 0.75
    with torch.no_grad():
        loss = F.cross_entropy(model(held.tokens[:, :-1]).transpose(1, 2), held.tokens[:, 1:], reduction="none")
    by_colour = loss[colour[held.tokens[:, 1:]]].view(-1, 4).mean(0)
    assert by_colour[0] > 1.75, "the first colour cannot be known: ln 6"
    assert by_colour[3] < 1.25, "the last one is one of three: ln 3"


@pytest.mark.slow
def test_a_probe_on_ambiguous_texts_goes_by_gender_too(tokenless):
    bios, model = tokenless
    train, test, balanced = bios.ambiguous(2000, 21), bios.ambiguous(1000, 22), bios.balanced(2000, 23)
    probe = Probe(model, "blocks.1", 48)
    fit_head(probe, "head", [train.tokens], train.profession)
    with torch.no_grad():
        off, on = (accuracies(probe(texts.tokens), texts.profession, texts.gender) for texts in (balanced, test))
    assert on.task > 0.85
    assert off.worst_group < on.task - 0.2 and off.spurious > 0.6


def test_the_model_is_causal_deterministic_and_can_be_spliced():
    import sae_fast as sf

    bios = Biographies(5)
    tokens = bios.general(4, 0).tokens
    models = [train_model(bios, 3, steps=4) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    model = models[0]
    other = tokens.clone()
    other[:, 20:] = tokens[:, 20:].flip(0)
    with torch.no_grad():
        clean = model(tokens)
        torch.testing.assert_close(clean[:, :20], model(other)[:, :20])
        assert clean.shape == (4, LENGTH, len(bios.words))
        for site in ("embed", "blocks.0", "blocks.1"):
            sae = sf.ReluSAE(48, 16, seed=0)
            with splice(model, site, sae, edit=ablate(range(16))) as spliced:
                changed = model(tokens)
            assert spliced.x.shape == (4, LENGTH, 48) and not torch.equal(changed, clean)


def test_models_of_other_sizes():
    model = Transformer(30, d=16, blocks=3, heads=2, length=9, seed=1)
    assert model(torch.zeros(2, 9, dtype=torch.int64)).shape == (2, 9, 30)
