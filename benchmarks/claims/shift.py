"""An analogue of SHIFT: a probe that goes by gender is made to go by profession, by judging its features, not by labels.

MATH.md §6.  Not a replication: generated biographies, a small transformer, and a rule in place of the person who judges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from benchmarks.claims._blind_rule import FEMININE, MASCULINE, NOT_WORK
from benchmarks.claims._claim import CONDITION, CRITIQUE, FAILS, HOLDS, OURS, Interval, Row, interval
from benchmarks.claims._sealed import Method, Sealed
from benchmarks.claims._shift_methods import KINDS, Lab
from benchmarks.claims._shift_worlds import PLANTED, SITES, TOKENLESS, WORDS, World, worlds
from sae_fast.analysis.plots import ACCENT, INK, TERMS, label_axes
from sae_fast.analysis.shift import Candidate
from sae_fast.nn import SparseAutoencoder

TITLE = "SHIFT, an analogue: what a probe goes by is changed by judging its features"
SETTING = (
    "An *analogue*, on generated texts, not to be read beside the published table: biographies of about 31 words, a "
    "transformer of two blocks trained on a general corpus in which profession and gender are independent, SAEs of "
    "384 features on its embedding and both blocks, trained on that corpus; a linear probe on the mean of the last "
    "block, fitted on 1 000 ambiguous texts: male professors and female nurses. T is 2 % of the probe's mean margin. "
    "The judge is a rule, written down and committed before it was run, that sees a feature's 20 top texts, of the "
    "general corpus or of the ambiguous set ([`_blind_rule.py`](../benchmarks/claims/_blind_rule.py)); its lists were "
    "written with the generator's words known. *Deletion* takes words out of the texts by the same lists: those of "
    "gender, or all that the rule holds not to be work. T and the sizes were chosen on seeds 90 and 91. *Worst group*:"
    " accuracy in the worst of the four groups of the balanced set, 2 000 texts that do not exist before all methods "
    "are declared. *Skylines* and *oracle* know other balanced texts. *+ head*: the head is fitted anew on the "
    "ambiguous set with the features at 0. In the *tokenless* world no single word carries gender; in the *planted* "
    "one a direction of the embedding is on from where a text is of a woman and a nurse."
)
SEEDS, QUICK_SEEDS = 6, 2
BALANCED, SPLIT, QUICK_BALANCED, QUICK_SPLIT = 2000, 1000, 200, 100
DRAWS = 3  # of random features
GENERAL, AMBIGUOUS = "general", "ambiguous"
DELETION, WIDE = "token deletion", "deletion of all but work"
HEAD = " + head"


def measure(seed: int, quick: bool) -> dict[str, Any]:
    """Each world: what every method reaches on the balanced set, and what was judged."""
    found = worlds(seed, quick)
    return {name: in_world(name, world, seed, quick) for name, world in found.items()}


def in_world(name: str, world: World, seed: int, quick: bool) -> dict[str, Any]:
    """Methods first, each as it will be evaluated; then the seal is broken, for skylines and for the evaluation."""
    lab, sealed = Lab(world, seed, quick), Sealed(world.bios, QUICK_BALANCED if quick else BALANCED, seed)
    methods: dict[str, Method] = {"original": lab.original()}
    methods |= {DELETION: lab.deletion(MASCULINE | FEMININE), WIDE: lab.deletion(NOT_WORK)}
    report: dict[str, Any] = {"saes": {}, "judged": {}}
    trained, off, candidates, marks = {}, {}, {}, {}
    for kind in KINDS if name == WORDS else ["Gated"]:
        trained[kind], report["saes"][kind] = lab.saes(kind)
        candidates[kind] = lab.candidates(trained[kind])
        for source in (GENERAL, AMBIGUOUS) if name != PLANTED else (GENERAL,):
            method, texts = f"{kind}, {source}", lab.corpus if source == GENERAL else lab.train.tokens[: len(lab.corpus)]
            off[method], marks[method] = lab.judged(trained[kind], candidates[kind], texts)
            report["judged"][method] = counts(candidates[kind], marks[method], off[method])
            methods |= {method + end: lab.ablated(trained[kind], off[method], bool(end)) for end in ("", HEAD)}
    first = f"Gated, {GENERAL}"
    saes, chosen = trained["Gated"], off[first]
    if name == WORDS:
        methods["CBP"] = lab.concept_bottleneck()
        others = {f"random {draw}": lab.random(saes, chosen, draw) for draw in range(DRAWS)}
        others |= {"embedding only": {SITES[0]: chosen[SITES[0]]}}
    elif name == PLANTED:
        report["planted"], planted = conjunction(lab, saes, candidates["Gated"], marks[first])
        others = {"and the conjunction": {site: sorted({*chosen[site], *planted[site]}) for site in saes}}
    else:
        others = {}
    for method, features in others.items():
        methods |= {method + end: lab.ablated(saes, features, bool(end)) for end in ("", HEAD)}
    sealed.declare(methods)

    split, count = sealed.skyline_split(QUICK_SPLIT if quick else SPLIT), sum(map(len, chosen.values()))
    features = lab.skyline(saes, split, count)
    skylines = {f"feature skyline{end}": lab.ablated(saes, features, bool(end)) for end in ("", HEAD)}
    skylines |= {"neuron skyline": lab.neuron_skyline(split, count), "oracle": lab.oracle(split)}
    report["accuracies"] = {method: vars(found) for method, found in sealed.evaluate(skylines).items()}
    return report


def counts(
    found: list[Candidate], marks: Mapping[tuple[str, int], str | None], off: Mapping[str, list[int]]
) -> dict[str, int]:
    said = list(marks.values())
    return {
        "candidates": len(found),
        "irrelevant": said.count("irrelevant"),
        "relevant": said.count("relevant"),
        "no opinion": said.count(None),
        **{f"off at {site}": len(chosen) for site, chosen in off.items()},
    }


def conjunction(
    lab: Lab,
    saes: Mapping[str, SparseAutoencoder],
    found: list[Candidate],
    marks: Mapping[tuple[str, int], str | None],
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """(of each site the feature that fires most as the planted direction does: its F1, whether it is a candidate, which in
    order, and what the rule says of it; {site: that feature, where its F1 is at least 0.5})."""
    assert lab.world.plant is not None
    on = lab.world.plant(lab.corpus)[:, 1:].flatten()
    order = {(each.site, each.feature): rank for rank, each in enumerate(found)}
    report, features = {}, {}
    for site, sae in saes.items():
        with torch.no_grad():
            fires = sae.encode(lab.rows(site, lab.corpus)) > 0
        f1 = 2 * (fires & on[:, None]).sum(0) / (fires.sum(0) + on.sum())
        best = int(f1.argmax())
        key = (site, best)
        report[site] = {"f1": float(f1[best]), "rank": order.get(key), "mark": marks.get(key), "candidate": key in order}
        features[site] = [best] if f1[best] >= 0.5 else []
    return report, features


# ---- What came out --------------------------------------------------------------------------------------------------


def values(results: list[dict[str, Any]], world: str, method: str, of: str = "worst_group") -> list[float]:
    """Of each seed; of random features the mean over draws."""
    names = [method]
    if method.startswith("random"):
        names = [method.replace("random", f"random {draw}") for draw in range(DRAWS)]
    return [sum(r[world]["accuracies"][name][of] for name in names) / len(names) for r in results]


def gain(results: list[dict[str, Any]], world: str, a: str, b: str, of: str = "worst_group") -> Interval:
    return interval(x - y for x, y in zip(values(results, world, a, of), values(results, world, b, of), strict=True))


def said(results: list[dict[str, Any]], world: str, methods: Iterable[str]) -> str:
    """Task, gender and worst-group accuracy of methods."""
    parts = []
    for method in methods:
        task, gender, worst = (interval(values(results, world, method, of)) for of in ("task", "spurious", "worst_group"))
        parts.append(f"{method}: worst group {worst}, task {task.mean:.3g}, gender {gender.mean:.3g}")
    return "; ".join(parts)


def verdict(*differences: Interval) -> str:
    """Of a claim that all of these are above 0: surely; at least one of them, surely; or none."""
    sure = [each.low > 0 for each in differences]
    return HOLDS if all(sure) else CONDITION if any(sure) else FAILS


def conclude(results: list[dict[str, Any]]) -> list[Row]:
    gated, relu, alone = f"Gated, {GENERAL}", f"ReLU, {GENERAL}", f"Gated, {AMBIGUOUS}"
    rows: list[Row] = []

    def row(claim: str, of: str, result: str, verdict: str, by: str = CRITIQUE) -> None:
        rows.append(Row(f"Analogue: {claim}", by, f"`shift.{of}`", result, verdict))

    def more(a: str, b: str, world: str = WORDS) -> tuple[str, Interval]:
        difference = gain(results, world, a, b)
        return f"{difference} in worst-group accuracy", difference

    text, first = more(gated, "original")
    extra, head = more(gated + HEAD, "original")
    row(
        "SHIFT makes a probe that was fitted where gender and profession agree right more often where they do not",
        "in_world",
        f"{text} over the original, with the head fitted anew {extra}; "
        f"{said(results, WORDS, ['original', gated, gated + HEAD])}; {judged(results, WORDS, gated)}; zeros "
        "in the place of features that fire often shift the margin, which the old head's threshold does not follow: "
        "a worst group near 0 with task and gender near 0.5 is one class for nearly all",
        verdict(first, head),
    )
    text, difference = more(gated, "random")
    extra, head = more(gated + HEAD, "random" + HEAD)
    row(
        "it is the judged features, not the number of them: as many random ones do not do it",
        "in_world",
        f"{text} over random features, {extra} with heads fitted anew; {said(results, WORDS, ['random', 'random' + HEAD])}",
        verdict(difference, head),
    )
    text, difference = more(gated + HEAD, "CBP")
    row(
        "it does better than a concept bottleneck",
        "in_world",
        f"{text}; {said(results, WORDS, ['CBP'])}",
        verdict(difference),
    )
    skylines = ["neuron skyline", "feature skyline", "feature skyline" + HEAD, "oracle"]
    text, difference = more(gated, "neuron skyline")
    short, _ = more("oracle", gated + HEAD)
    row(
        "features judged blind do better than neurons chosen with balanced data (the neuron skyline)",
        "in_world",
        f"{text}; the oracle, fitted on balanced data, has {short} over SHIFT with its head fitted anew; "
        f"{said(results, WORDS, skylines)}",
        verdict(difference),
    )
    text, difference = more(gated, relu)
    extra, head = more(gated + HEAD, relu + HEAD)
    row(
        "Gated SAEs serve SHIFT better than ReLU ones",
        "in_world",
        f"{text}, {extra} with heads fitted anew; {said(results, WORDS, [relu, relu + HEAD])}; {quality(results)}",
        verdict(difference, head),
        OURS,
    )
    short, loss = more(gated + HEAD, alone + HEAD)
    text, difference = more(alone + HEAD, "original")
    row(
        "contexts from the ambiguous set alone suffice for the judge",
        "in_world",
        f"{text} over the original, but {short} less than with contexts from a general corpus; "
        f"{said(results, WORDS, [alone, alone + HEAD])}; {judged(results, WORDS, alone)}",
        FAILS if difference.low <= 0 else HOLDS if loss.high < 0.05 else CONDITION,
    )
    text, difference = more(gated + HEAD, "embedding only" + HEAD)
    row(
        "features of later sites are needed: the embedding's alone do less",
        "in_world",
        f"{text}; {said(results, WORDS, ['embedding only', 'embedding only' + HEAD])}",
        verdict(difference),
    )
    text, difference = more(gated + HEAD, DELETION)
    extra, wide = more(gated + HEAD, WIDE)
    row(
        "where words carry the attribute, deleting these words is the baseline to beat",
        "in_world",
        f"{text} of SHIFT over deletion of gendered words, {extra} over that of every word that the rule holds not to be "
        f"work; {said(results, WORDS, [DELETION, WIDE])}",
        HOLDS if max(difference.high, wide.high) < 0 else CONDITION if min(difference.low, wide.low) <= 0 else FAILS,
        OURS,
    )
    text, difference = more(gated + HEAD, "original", TOKENLESS)
    extra, over = more(gated + HEAD, DELETION, TOKENLESS)
    wider, over_wide = more(gated + HEAD, WIDE, TOKENLESS)
    names = ["original", DELETION, WIDE, gated, gated + HEAD, "feature skyline", "feature skyline" + HEAD, "oracle"]
    row(
        "where no single word carries the attribute, SHIFT works still, and better than deleting words",
        "in_world",
        f"{text} over the original, {extra} over deletion of gendered words (there are none), {wider} over that of every "
        f"word that the rule holds not to be work; {said(results, TOKENLESS, names)}; {judged(results, TOKENLESS, gated)}",
        verdict(difference, over, over_wide),
    )
    rows.append(_planted(results, gated))
    return rows


def _planted(results: list[dict[str, Any]], gated: str) -> Row:
    found = [max(r[PLANTED]["planted"].values(), key=lambda of: of["f1"]) for r in results]
    at = [[of for of in r[PLANTED]["planted"].values() if of["f1"] >= 0.5] for r in results]
    told = "and the conjunction" + HEAD
    need, left = gain(results, PLANTED, told, gated + HEAD), gain(results, PLANTED, gated + HEAD, "original")
    candidates = sum(of["candidate"] for each in at for of in each)
    marks = [of["mark"] for each in at for of in each if of["candidate"]]
    result = (
        f"best F1 of a feature with the planted direction {interval(of['f1'] for of in found)}; of {sum(map(len, at))} "
        f"features with F1 ≥ 0.5 {candidates} are candidates, of which the rule finds {marks.count('irrelevant')} "
        f"irrelevant, {marks.count('relevant')} relevant and has no opinion on {marks.count(None)}; ablating them as well "
        f"adds {need} to the worst group, SHIFT without that {left} to the original's; "
        f"{said(results, PLANTED, ['original', gated, gated + HEAD, told, 'feature skyline', 'oracle'])}"
    )
    rightly = marks.count("irrelevant")
    whole = bool(marks) and rightly == len(marks) == sum(map(len, at)) and need.low <= 0
    claim = "Analogue: a feature of a conjunction (a woman and a nurse), of neither alone, is found and judged rightly"
    return Row(claim, CRITIQUE, "`shift.conjunction`", result, HOLDS if whole else CONDITION if rightly else FAILS)


def judged(results: list[dict[str, Any]], world: str, method: str) -> str:
    of = [r[world]["judged"][method] for r in results]
    means = {
        name: sum(each[name] for each in of) / len(of) for name in ("candidates", "irrelevant", "relevant", "no opinion")
    }
    return ", ".join(f"{value:.0f} {name}" for name, value in means.items()) + " (means over seeds)"


def quality(results: list[dict[str, Any]]) -> str:
    parts = []
    for kind in KINDS:
        of = [q for r in results for q in r[WORDS]["saes"][kind].values()]
        parts.append(
            f"{kind} SAEs: L0 {sum(q['l0'] for q in of) / len(of):.3g}, FVU {sum(q['fvu'] for q in of) / len(of):.2g}"
        )
    return ", ".join(parts)


def draw(results: list[dict[str, Any]], figure: Any) -> None:
    """Worst-group accuracy of each method in each world."""
    gated = f"Gated, {GENERAL}"
    common, alone = ["original", DELETION, WIDE, gated, gated + HEAD], f"Gated, {AMBIGUOUS}{HEAD}"
    others = [alone, f"ReLU, {GENERAL}{HEAD}", "embedding only" + HEAD, "random" + HEAD, "CBP"]
    ends = ["feature skyline", "feature skyline" + HEAD, "neuron skyline", "oracle"]
    middle = {WORDS: others, TOKENLESS: [alone], PLANTED: ["and the conjunction" + HEAD]}
    shown = {world: [*common, *methods, *ends] for world, methods in middle.items()}
    titles = {WORDS: "Gender in words", TOKENLESS: "In no word", PLANTED: "Planted"}
    for axes, (world, methods) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        for at, method in enumerate(reversed(methods)):
            of = interval(values(results, world, method))
            knows = method in ends
            color = INK if knows else ACCENT if "general" in method else TERMS["sparsity"]
            axes.barh(at, of.mean, color=color, alpha=0.45 if knows else 0.9)
            axes.plot([max(of.low, 0), min(of.high, 1)], [at, at], color="black", linewidth=1)
        axes.set_yticks(range(len(methods)), list(reversed(methods)), fontsize=6)
        axes.set_xlim(0, 1)
        label_axes(axes, f"{titles[world]} (analogue)", "worst-group accuracy", "")
