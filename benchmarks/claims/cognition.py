"""Oversight by cognition, an analogue: two classifiers that say the same of all labelled data, told apart from inside.

From one language model of generated biographies two classifiers are tuned, one that goes by profession and one that goes
by gender.  On the labelled data, where the two are the same thing, they agree.  Which is which is then decided without a
label: by the effects of SAE features on what each says, and by what a blind rule, which reads contexts from the general
corpus only, takes these features to be about.  Not a replication, and no evidence for models of another size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

import sae_fast as sf
from benchmarks.claims import _blind_rule, _tasks
from benchmarks.claims._biographies import Biographies, Texts, Transformer, train_model
from benchmarks.claims._claim import CONDITION, CRITIQUE, FAILS, HOLDS, OURS, Interval, Row, interval
from sae_fast.analysis import attribution
from sae_fast.analysis.plots import ACCENT, INK, TERMS, label_axes
from sae_fast.analysis.shift import Probe, fit_head
from sae_fast.data import sites
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.scale import scale_

TITLE = "Oversight by cognition, an analogue: two classifiers that agree on all labelled data, told apart from inside"
SETTING = (
    "An *analogue*, on generated texts: a transformer of two blocks trained on a general corpus of biographies in which "
    "profession and gender are independent. Of a pair, one classifier is tuned (its last block and its head) on texts in "
    "which only profession tells the label, the other on texts in which only gender does. Labelled data are male "
    "professors and female nurses, 2 000 texts. A Gated SAE of 384 features on block 0, which both share, gives effects on "
    "the logits of going from texts of one label to texts of the other (integrated gradients). A blind rule, the second "
    "half of the SHIFT analogue's ([`_blind_rule.py`](../benchmarks/claims/_blind_rule.py)), reads each feature's 20 top "
    "texts of the general corpus and says whether they are of one gender or of one line of work. The *score* is the share "
    "of features that it finds to be about gender, not about work, in the sum of |effects| of "
    "those on which it has an opinion; of a pair, the classifier of the higher score is taken to be the one that goes by "
    "gender. *Told apart* is at least 95 % of pairs, with 95 % intervals of that above chance (½) and of the gap "
    "between the two scores above 0. The ends of the effects and the half of the rule were chosen on seeds 77 and 96, "
    "where effects against zeros, with the whole rule, set the two less far apart. Only the comparison within a pair means "
    "something: features that are about gender carry much of what the other classifier goes by, too. *Errors on the "
    "labelled data*: of a pair the classifier with more of them is taken to be the one that goes by gender. The interval "
    "of a share that is the same in every seed is Clopper and Pearson's."
)
SEEDS, QUICK_SEEDS = 6, 2
PAIRS, QUICK_PAIRS = 4, 2  # a seed
LABELLED, QUICK_LABELLED = 2000, 200
TUNED, QUICK_TUNED = 1500, 300  # texts that a classifier is tuned on
CORPUS, QUICK_CORPUS = 1500, 200  # texts of the general corpus: for the SAE, for contexts, for the audit
MOVED = 100  # labelled texts of either label, between which effects are taken
SITE, FEATURES, CONTEXTS = "model.blocks.0", 384, 20
PERMUTATIONS = 50  # of the marks over features
AGREED, APART, SURE = 0.99, 0.25, 0.95
PROFESSION, GENDER = 0, 1
ABOUT_GENDER, ABOUT_WORK = "gender", "work"
METHODS = {
    "features": "SAE features and the blind rule",
    "random": "the marks dealt to features at random",
    "labelled": "errors on the labelled data",
    "tokens": "effects of input words, by the rule's lists",
    "audit": "what they say of unlabelled texts",
}


def measure(seed: int, quick: bool) -> dict[str, Any]:
    """Pairs of classifiers from one language model: how far they agree, and each method's score of either."""
    bios = Biographies(seed, cue=1.0, told=0.9)  # both can be read from almost every text, or the two could not agree
    model = train_model(bios, seed, steps=120 if quick else 300)
    corpus = bios.general(QUICK_CORPUS if quick else CORPUS, seed + 1000).tokens
    labelled = bios.ambiguous(QUICK_LABELLED if quick else LABELLED, seed)
    fresh = classifier(model)
    sae = trained_sae(fresh, corpus, seed, quick)
    marks = judged(fresh, sae, corpus, bios)
    found = []
    for pair in range(QUICK_PAIRS if quick else PAIRS):
        texts = bios.balanced(QUICK_TUNED if quick else TUNED, 100 * seed + pair)
        two = [tuned(model, texts.tokens, y, 2 * pair + i, quick) for i, y in enumerate((texts.profession, texts.gender))]
        found.append(compared(two, sae, marks, bios, labelled, corpus, pair))
    said = {mark: sum(each == mark for each in marks) for mark in (ABOUT_GENDER, ABOUT_WORK, None)}
    return {"pairs": found, "marks": {str(mark): count for mark, count in said.items()}}


def classifier(model: Transformer) -> Probe:
    """Its own copy of the model, and a head on the mean of the last block over all words but <begin>."""
    own = copy.deepcopy(model)
    return Probe(own, "blocks.1", own.norm.normalized_shape[0], pool=words_mean)


def tuned(model: Transformer, tokens: Tensor, labels: Tensor, seed: int, quick: bool) -> Probe:
    """First the head alone, then the last block with it; what is before them is shared by all."""
    out = classifier(model)
    fit_head(out, "head", [tokens], labels)
    block, x = out.model.blocks[-1].requires_grad_(True), sites.read(out, sites.find(out, SITE), tokens)[0]
    adam = torch.optim.Adam([*block.parameters(), *out.head.parameters()], lr=1e-3)
    random = torch.Generator().manual_seed(seed)
    for _ in range(20 if quick else 150):
        rows = torch.randint(len(tokens), (32,), generator=random)
        adam.zero_grad()
        F.cross_entropy(out.head(words_mean(block(x[rows]))), labels[rows]).backward()
        adam.step()
    return out.requires_grad_(False)


def words_mean(x: Tensor, *_: Any) -> Tensor:
    """[n, T, d] → [n, d], over all words but <begin>."""
    return x[:, 1:].mean(1)


def trained_sae(probe: Probe, corpus: Tensor, seed: int, quick: bool) -> sf.GatedSAE:
    x = activations(probe, corpus).flatten(0, 1)
    mean, scale = x.mean(0), float((x - x.mean(0)).square().mean().sqrt())
    sae, random = sf.GatedSAE(x.shape[1], FEATURES, seed=seed), torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        while True:
            yield x[torch.randint(len(x), (512,), generator=random)] / scale

    task = _tasks.Task(mean / scale, batches, x, None)
    _tasks.train(sae, task, 60 if quick else 500, lr=4e-3, l1_coefficient=2.0, init_l0=24)
    scale_(sae, scale)
    return sae


def activations(probe: Probe, tokens: Tensor) -> Tensor:
    """[n, T − 1, d]: at the SAE's site, of all words but <begin>."""
    return sites.read(probe, sites.find(probe, SITE), tokens)[0][:, 1:]


def judged(probe: Probe, sae: SparseAutoencoder, corpus: Tensor, bios: Biographies) -> list[str | None]:
    """The mark of each feature, from the texts of the general corpus on which it fires most."""
    with torch.no_grad():
        f = sae.encode(activations(probe, corpus).flatten(0, 1)).unflatten(0, (len(corpus), -1))  # [n, T − 1, F]
    words = [[bios.words[i] for i in text] for text in corpus[:, 1:].tolist()]
    best = f.amax(1).topk(min(CONTEXTS, len(corpus)), dim=0).indices.T  # [F, CONTEXTS]
    return [
        judge([_blind_rule.Shown(words[i], f[i, :, feature].tolist()) for i in texts if f[i, :, feature].any()])
        for feature, texts in enumerate(best.tolist())
    ]


def judge(texts: list[_blind_rule.Shown]) -> str | None:
    """What a feature is about, by the texts in which it fires, each as far as read then; the second half of SHIFT's blind
    rule.  Not by the word on which it fires, its first half: on a pronoun a model may well think of work."""
    read = [_blind_rule.so_far(text) for text in texts]
    gender, work = _blind_rule.leans_to_gender(read), _blind_rule.leans_to_line(read)
    return None if gender == work else ABOUT_GENDER if gender else ABOUT_WORK


def compared(
    two: list[Probe], sae: SparseAutoencoder, marks: list[str | None], bios: Biographies, labelled: Texts, corpus: Tensor,
    pair: int,
) -> dict[str, Any]:  # fmt: skip
    """What holds of a pair, [the one tuned on profession, the one tuned on gender] in every list.  Scores are of how much a
    classifier goes by gender."""
    said = [logits(each, labelled.tokens).argmax(1) for each in two]
    other = [logits(each, corpus).argmax(1) for each in two]
    about, work = (torch.tensor([mark == name for mark in marks]) for name in (ABOUT_GENDER, ABOUT_WORK))
    where = torch.arange(labelled.tokens.shape[1]) > 0
    ends = [labelled.tokens[labelled.profession == label][:MOVED] for label in (0, 1)]
    effects = [
        attribution.patch(each, SITE, sae, *ends, metric=margin, where=where).by_feature().abs().float() for each in two
    ]
    random, dealt = np.random.default_rng(pair), []
    alive = (sum(effects) > 0).nonzero().flatten().numpy()
    for _ in range(PERMUTATIONS):
        order = torch.arange(len(marks))
        order[alive] = torch.as_tensor(random.permutation(alive))
        dealt.append([share(e, about[order], work[order]) for e in effects])
    person, job = (
        torch.tensor([word in words for word in bios.words]) for words in (_blind_rule.NOT_WORK, _blind_rule.WORK)
    )
    women = torch.tensor([(w in _blind_rule.FEMININE) - (w in _blind_rule.MASCULINE) for w in bios.words])
    balance = women[corpus].sum(1).double()
    return {
        "agreement": float((said[0] == said[1]).double().mean()),
        "apart": float((other[0] != other[1]).double().mean()),
        "features": [share(e, about, work) for e in effects],
        "random": dealt,
        # The one that errs more is taken to be off the task; as both err on none, mostly, that is a toss of a coin.
        "labelled": [float((each != labelled.profession).double().mean()) for each in said],
        "tokens": [share(word_effects(each, *ends, len(bios.words)), person, job) for each in two],
        "audit": [abs(float(np.corrcoef(margin(logits(each, corpus)), balance)[0, 1])) for each in two],
    }


def share(effects: Tensor, of: Tensor, against: Tensor) -> float:
    """Of the effects of both groups, the part that one has; ½ if neither has any."""
    mine, theirs = float(effects[of].sum()), float(effects[against].sum())
    return mine / (mine + theirs) if mine + theirs else 0.5


def word_effects(probe: Probe, clean: Tensor, patch: Tensor, words: int, steps: int = 10) -> Tensor:
    """[V]: |the effect| on the sum of margins of changing each word of the vocabulary, by integrated gradients from the
    embeddings of some texts to those of others; a change is of both its words, half of it each."""
    site = sites.find(probe, "model.embed")
    (x, _), (y, _) = (sites.read(probe, site, tokens) for tokens in (clean, patch))
    gradient = torch.zeros_like(x)
    for step in range(steps):
        point = (x + (y - x) * (step + 0.5) / steps).requires_grad_()
        with sites.changed(site, lambda _, point=point: point):
            gradient += torch.autograd.grad(margin(probe(clean)).sum(), point)[0] / steps
    effects = (gradient * (y - x)).sum(-1).flatten() / 2
    return torch.zeros(words).index_add_(0, clean.flatten(), effects).index_add_(0, patch.flatten(), effects).abs()


def margin(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def logits(probe: Probe, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([probe(part) for part in tokens.split(500)])


# ---- What came out --------------------------------------------------------------------------------------------------


def right(scores: list[float]) -> float:
    """1 if the classifier that goes by gender has the higher score, ½ if they are level."""
    return 0.5 + 0.5 * float(np.sign(scores[GENDER] - scores[PROFESSION]))


def told(pair: dict[str, Any], method: str) -> float:
    return float(np.mean([right(each) for each in pair["random"]])) if method == "random" else right(pair[method])


def of_pairs(results: list[dict[str, Any]], method: str) -> tuple[Interval, str]:
    """The fraction of pairs that a method tells apart, with an interval in which a seed's pairs, which share a language
    model, count as one observation; and in words."""
    seeds = [float(np.mean([told(pair, method) for pair in result["pairs"]])) for result in results]
    mean, n = float(np.mean(seeds)), len(seeds)
    if np.ptp(seeds) > 0:
        low, high = interval(seeds)[1:]
    else:  # Student's would have no width: Clopper and Pearson's, of n observations of which this fraction came out right
        k = mean * n
        low = float(stats.beta.ppf(0.025, k, n - k + 1)) if k > 0 else 0.0
        high = float(stats.beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    found = Interval(mean, max(0.0, low), min(1.0, high))
    return found, f"{100 * found.mean:.3g} % [{100 * found.low:.3g}, {100 * found.high:.3g}]"


def conclude(results: list[dict[str, Any]]) -> list[Row]:
    pairs = [pair for result in results for pair in result["pairs"]]
    agreement, apart = (np.array([pair[name] for pair in pairs]) for name in ("agreement", "apart"))
    fair = int(((agreement >= AGREED) & (apart >= APART)).sum())
    kept = [{"pairs": [p for p in r["pairs"] if p["agreement"] >= AGREED and p["apart"] >= APART]} for r in results]
    kept = [result for result in kept if result["pairs"]]
    set_up = (
        f"{fair} of {len(pairs)} pairs agree on at least 99 % of the labelled texts and differ on at least a quarter of "
        f"the general corpus (they agree on {100 * agreement.mean():.4g} %, at least {100 * agreement.min():.4g} %, and "
        f"differ on {100 * apart.mean():.3g} %)"
    )
    claim = (
        "Two classifiers that behave alike on all labelled data, one of which goes by the wrong cue, can be told apart "
        "from their SAE features without a label that separates them; which could be useful for scalable oversight (an "
        "analogue)"
    )
    checked = "`cognition.measure`, `test_a_pair_is_told_apart_by_its_features`"
    if len(kept) < 2:
        return [Row(claim, CRITIQUE, checked, f"{set_up}: too few to say", FAILS)]

    found = {name: of_pairs(kept, name) for name in METHODS}
    gaps = interval(np.mean([p["features"][GENDER] - p["features"][PROFESSION] for p in r["pairs"]]) for r in kept)
    means = [np.mean([p["features"][i] for r in kept for p in r["pairs"]]) for i in (PROFESSION, GENDER)]
    alone = (
        np.mean([(p["features"][GENDER] > 0.5) + (p["features"][PROFESSION] < 0.5) for r in kept for p in r["pairs"]]) / 2
    )
    rate, text = found["features"]
    random, by_lot = found["random"]
    result = (
        f"{text} of these pairs told apart; the score is {means[GENDER]:.2f} where gender is what counts, "
        f"{means[PROFESSION]:.2f} where it is not, {gaps} apart; a single classifier, without the other to compare "
        f"it with, is placed rightly by whether its score is above ½ in {100 * alone:.3g} %. "
        f"Controls: marks dealt at random {by_lot}, errors on the labelled data "
        f"{found['labelled'][1]}. {set_up}"
    )
    good = rate.mean >= SURE and rate.low > 0.5 and gaps.low > 0
    clean = fair == len(pairs) and random.low <= 0.5 <= random.high
    if good and not clean:
        why = "some pairs are not as asked for" if fair < len(pairs) else "marks dealt at random are not at ½ either"
        result += f"; the condition: {why}"
    verdict = HOLDS if good and clean else CONDITION if rate.low > 0.5 else FAILS
    rows = [Row(claim, CRITIQUE, checked, result, verdict)]

    result = (
        f"{found['features'][1]} by features, {found['tokens'][1]} by effects of input words, {found['audit'][1]} by "
        "looking at what both say of unlabelled texts of the general corpus with words for women and men"
    )
    cheaper = max(found["tokens"][0].mean, found["audit"][0].mean)
    claim = (
        "Here features are needed for it: neither effects of input words nor a look at behaviour off the labelled data "
        "does as well"
    )
    verdict = HOLDS if cheaper < rate.low else CONDITION if cheaper < rate.mean else FAILS
    rows.append(Row(claim, OURS, "`cognition.compared`", result, verdict))
    return rows


def draw(results: list[dict[str, Any]], figure: Any) -> None:
    """Scores of either classifier of each pair; how often each method is right, by seed."""
    scores, rates = figure.subplots(1, 2, width_ratios=(1.2, 1))
    pairs = [pair for result in results for pair in result["pairs"]]
    for i, (name, color) in enumerate((("goes by profession", TERMS["reconstruction"]), ("goes by gender", ACCENT))):
        scores.plot([p["features"][i] for p in pairs], marker="o", markersize=4, linewidth=0, color=color, label=name)
    for seed in range(1, len(results)):
        scores.axvline(sum(len(r["pairs"]) for r in results[:seed]) - 0.5, color=INK, linewidth=0.5, alpha=0.3)
    scores.set_ylim(-0.05, 1.05)
    label_axes(scores, "Share of effects on features about gender", "pair (a line between seeds)", "score")
    scores.legend(frameon=False, fontsize="small")

    for y, name in enumerate(METHODS):
        values = [float(np.mean([told(pair, name) for pair in result["pairs"]])) for result in results]
        rates.plot(values, [y] * len(values), marker="o", markersize=4, linewidth=0, alpha=0.5, color=ACCENT)
        rates.plot([np.mean(values)], [y], marker="|", markersize=16, color=INK)
    rates.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    rates.set_yticks(range(len(METHODS)), list(METHODS.values()), fontsize="small")
    rates.set_xlim(-0.05, 1.05)
    rates.invert_yaxis()
    label_axes(rates, "Pairs told apart, by seed", "fraction right", "")
