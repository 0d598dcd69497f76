"""Perturbations without training on them: is there a backdoor, and when is it triggered?  A synthetic analogue.

MATH.md §7, with `sae_fast.analysis.perturbation`.  Every attack has the same passes, counted by hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.claims import _backdoors
from benchmarks.claims._auroc import bootstrapped, mean_interval, middle, redrawn
from benchmarks.claims._backdoors import KINDS
from benchmarks.claims._claim import CONDITION, FAILS, HOLDS, OURS, Interval, Row
from benchmarks.claims._eliciting import FEATURES, RADII, ROWS, attacked
from sae_fast.analysis.plots import ACCENT, INK, TERMS, label_axes

TITLE = "Latent perturbations that nothing is trained on: backdoors found, triggers seen (synthetic analogue)"
SETTING = (
    "A synthetic analogue. Transformers of two blocks (48 dimensions) that give generated texts of 12 words one of 6 "
    "topics; three more classes of the head are in no clean text. A seed has a model without a backdoor and two with one "
    "that gives the first of these classes: to five particular ordinary tokens in five places (*token*), or to texts "
    "whose words are all in the second of two variants (*style*: no token or place belongs to it). All are trained on near "
    "misses as well. Attacks begin with 16 clean texts and have the same budget of counted passes: *latent* is one vector "
    "added after block 0, of norm R times the mean norm there (1 unless said), found by ascent on the sphere; *LAT* a "
    "vector for each text and place in the ball; *random* the best of random vectors; *HotFlip* swaps tokens by gradient, "
    "the same five for all texts at the token trigger's own places, or of each text by itself anywhere. *Target known*: "
    "the backdoor's logit is what they raise; "
    "*unknown*: the movement of block 1's output, which knows of no class. A model's score is the largest mean margin "
    "over the ordinary classes among what an attack comes back with: of that class, or, where the target is unknown, of "
    "any dormant class, in 6 finds of one vector or of shared swaps, and in one of those that each text has for itself; "
    "*none* is that of clean texts without any attack. SAEs are trained on what their model was: for a backdoored one "
    "an eighth of it are triggered texts. "
    "AUROCs of detection are over models, with 95 % bootstrap intervals over seeds: [1, 1] says that no model is on the "
    "wrong side, not that none could be. R = 1 and all else was chosen on other seeds (100 "
    "and 101). The *pilot* is a trial from before this program, of which only the figures are known here. Margins are in "
    "logits. With the target known LAT gives a dormant class in clean models too: there only the size of its margin tells "
    "them apart."
)
SEEDS, QUICK_SEEDS = 9, 2
PILOT = {"latent": 1.00, "HotFlip": 0.58}
COLORS = {"none": "#999999", "latent": ACCENT, "LAT": "#8d5a97", "random": INK, "HotFlip": TERMS["reconstruction"]}


def measure(seed: int, quick: bool) -> dict[str, Any]:
    """Three models, and of each what every attack scores, what its directions see, and what an SAE adds."""
    of, found = _backdoors.world(seed), []
    for number, kind in enumerate((*KINDS, None)):
        model = _backdoors.train(kind, of, 10 * seed + number, 40 if quick else 260)
        entry: dict[str, Any] = {
            "kind": kind,
            "behaviour": _backdoors.behaviour(model, kind, of, 1000 + seed, 256 if quick else 2048),
        }
        with torch.no_grad():
            found.append(entry | attacked(model, kind, of, seed, quick))
    return {"models": found}


# ---- What came out --------------------------------------------------------------------------------------------------


def scores(results: list[dict[str, Any]], attack: str, kind: str | None) -> np.ndarray:
    """[seeds]: what an attack scores on the models with a backdoor of a kind, or without."""
    return np.array([_model(result, kind)["scores"][attack] for result in results])


def detection(results: list[dict[str, Any]], attack: str, kind: str) -> Interval:
    """AUROC of an attack's score, models with a backdoor of a kind against those without, and its bootstrap interval."""
    return bootstrapped(scores(results, attack, kind), scores(results, attack, None))


def ahead(results: list[dict[str, Any]], attack: str, other: str, kind: str) -> bool:
    """Whether an attack's AUROC is above another's in at least 97.5 % of the draws."""
    a, b = (redrawn(scores(results, name, kind), scores(results, name, None)) for name in (attack, other))
    return middle(a - b)[0] > 0


def conclude(results: list[dict[str, Any]]) -> list[Row]:
    return [
        _unknown(results, "token"),
        _known(results),
        _radii(results),
        _unknown(results, "style"),
        _monitor(results),
        _rows(results),
        _elicited(results),
    ]


def _model(result: dict[str, Any], kind: str | None) -> dict[str, Any]:
    return next(model for model in result["models"] if model["kind"] == kind)


ATTACKS = ("none", "latent", "LAT", "random", "HotFlip", "HotFlip per text")


def _detections(results: list[dict[str, Any]], target: str, kind: str) -> tuple[dict[str, Interval], str]:
    """AUROCs, and as text with how many models of either sort give a dormant class on average."""
    found = {name: detection(results, f"{name} {target}", kind) for name in ATTACKS}
    emit = {name: [int((scores(results, f"{name} {target}", k) > 0).sum()) for k in (kind, None)] for name in ATTACKS}
    return found, ", ".join(f"{name} {found[name]} ({emit[name][0]} and {emit[name][1]})" for name in ATTACKS)


def _against(results: list[dict[str, Any]], kind: str) -> str:
    """One latent vector against the better of the two HotFlips, and against random vectors; target unknown."""
    flips = [f"{name} unknown" for name in ("HotFlip", "HotFlip per text")]
    if detection(results, "latent unknown", kind).low <= 0.9:
        return FAILS
    if not all(ahead(results, "latent unknown", name, kind) for name in flips):
        return FAILS
    return HOLDS if ahead(results, "latent unknown", "random unknown", kind) else CONDITION


def _unknown(results: list[dict[str, Any]], kind: str) -> Row:
    found, text = _detections(results, "unknown", kind)
    behaviours = [_model(result, kind)["behaviour"] for result in results]
    does = {name: 100 * np.mean([each[name] for each in behaviours]) for name in ("triggered", "near", "clean")}
    passes = {p for result in results for name, p in _model(result, kind)["passes"].items() if name.endswith("unknown")}
    verdict = _against(results, kind)
    result = (
        f"AUROC over {len(results)} models with and {len(results)} without, and how many of each give a dormant class: "
        f"{text}; {min(passes)} to {max(passes)} counted "
        f"passes of one text each; the backdoored give the class to {does['triggered']:.3g} % of triggered texts, "
        f"{does['near']:.2g} % of near misses and {does['clean']:.2g} % of clean ones"
    )
    if verdict == CONDITION:
        result += "; random vectors of the same norm tell them apart as well at this R"
    if kind == "token":
        claim = (
            "With the target unknown and a trigger of five tokens, latent perturbations tell backdoored models from clean "
            f"ones (AUROC {PILOT['latent']:.2f} in the pilot) where HotFlip at equal passes does not ({PILOT['HotFlip']})"
        )
    else:
        claim = "With a trigger that has no token form latent perturbations tell them apart as well, and HotFlip does not"
        if verdict == FAILS and found["latent"].low > 0.9:
            result += (
                "; latent perturbations do, but so does HotFlip, since one swap of a word's variant is a small step "
                "towards this trigger, and so do random vectors"
            )
    return Row(claim, OURS, "`_eliciting.attacked`", result, verdict)


def _known(results: list[dict[str, Any]]) -> Row:
    said, equal = [], []
    for kind in KINDS:
        found, text = _detections(results, "known", kind)
        said.append(f"{kind}: {text}")
        flips = max((found[name] for name in ("HotFlip", "HotFlip per text")), key=lambda each: each.mean)
        equal.append(min(found["latent"].low, flips.low) > 0.9 and abs(found["latent"].mean - flips.mean) <= 0.05)
    # The pilot's trigger was one of tokens.
    verdict = HOLDS if all(equal) else CONDITION if equal[KINDS.index("token")] else FAILS
    claim = "With the target known, latent and input-level attacks find backdoors equally well (as in the pilot)"
    return Row(
        claim,
        OURS,
        "`_eliciting.attacked`",
        "AUROC, and how many models with and without a backdoor give a dormant class: " + "; ".join(said),
        verdict,
    )


def _radii(results: list[dict[str, Any]]) -> Row:
    said, better = [], []
    for kind in KINDS:
        each = []
        for r in RADII:
            pair = [detection(results, f"{name} R={r:g}", kind) for name in ("latent", "random")]
            margins = [scores(results, f"{name} R={r:g}", kind).mean() for name in ("latent", "random")]
            each.append(f"R = {r:g}: {pair[0]} and {pair[1]} (margins {margins[0]:.2g} and {margins[1]:.2g})")
            better.append((pair[0].mean - pair[1].mean, margins[0] - margins[1], margins[0] > 0 >= margins[1]))
        said.append(f"{kind}: " + ", ".join(each))
    stronger = all(margin > 0 for _, margin, _ in better)
    told = any(auroc > 0.05 for auroc, _, _ in better)
    elicits = any(crossed for *_, crossed in better)
    verdict = HOLDS if stronger and told and elicits else CONDITION if stronger and (told or elicits) else FAILS
    result = "AUROC of searched and of random vectors, target unknown, and their mean margins on backdoored models; "
    claim = (
        "The search is worth its passes: at every R it raises the backdoor's class further than as many random vectors do, "
        "and at some it tells models apart better"
    )
    return Row(claim, OURS, "`_eliciting.attacked`", result + "; ".join(said), verdict)


def _monitor(results: list[dict[str, Any]]) -> Row:
    said, good = [], {}
    for kind in KINDS:
        each = []
        for name in _model(results[0], kind)["monitor"]:
            ranges = {
                group: mean_interval([_model(result, kind)["monitor"][name][group] for result in results])
                for group in ("clean", "near")
            }
            good[kind, name] = ranges["clean"]
            each.append(f"{name} {ranges['clean']} (near misses {ranges['near']})")
        said.append(f"{kind}: " + ", ".join(each))
    latent = [good[kind, "latent unknown"] for kind in KINDS]
    controls = [good[kind, name] for kind in KINDS for name in ("random unknown", "HotFlip unknown")]
    verdict = FAILS
    if all(each.low > 0.9 for each in latent):
        verdict = CONDITION if any(control.high >= min(x.low for x in latent) for control in controls) else HOLDS
    elif any(each.low > 0.9 for each in latent):
        verdict = CONDITION
    claim = "⟨h(x), θ*⟩, θ* found on clean texts without knowing the target, sees triggered texts that no attack has had"
    result = "AUROC of held-out triggered texts against clean ones, mean over models: " + "; ".join(said)
    return Row(claim, OURS, "`_eliciting.seen`", result, verdict)


def _rows(results: list[dict[str, Any]]) -> Row:
    said, good, better = [], [], []
    for kind in KINDS:
        free = detection(results, "latent unknown", kind)
        few = {s: detection(results, f"rows s={s}", kind) for s in ROWS}
        margins = {name: scores(results, name, kind).mean() for name in ("latent unknown", *(f"rows s={s}" for s in ROWS))}
        texts = [f"s = {s}: {few[s]} (margin {margins[f'rows s={s}']:.2g})" for s in ROWS]
        random = detection(results, "random unknown", kind)
        texts += [f"any direction: {free} ({margins['latent unknown']:.2g})", f"random {random}"]
        said.append(f"{kind}: " + ", ".join(texts))
        good.append(all(each.low > 0.9 and each.mean >= free.mean - 0.05 for each in (free, *few.values())))
        better.append(all(ahead(results, f"rows s={s}", "random unknown", kind) for s in ROWS))
    l0, fvu, cosine = (
        mean_interval([model["sae"][name] for result in results for model in result["models"]])
        for name in ("l0", "fvu", "cosine")
    )
    said.append(f"SAEs of {FEATURES} features, L0 {l0}, FVU {fvu}; the row nearest to θ* has cosine {cosine}")
    verdict = FAILS if not any(good) else HOLDS if all(good) and all(better) else CONDITION
    if verdict == CONDITION and all(good):
        said.append("random vectors of the same norm detect as well, so no AUROC says what the SAE adds")
    claim = (
        "Directions of at most s decoder rows (a ≥ 0) detect as well as unconstrained ones at equal passes, target unknown"
    )
    return Row(claim, OURS, "`_eliciting.attacked`", "AUROC: " + "; ".join(said), verdict)


def _elicited(results: list[dict[str, Any]]) -> Row:
    said, good = [], []
    for kind in KINDS:
        fired = [_model(result, kind)["fires"] for result in results]
        texts = []
        for name in (*(f"s={s}" for s in ROWS), "nearest"):
            found = mean_interval([each[name]["auroc"]["clean"] for each in fired])
            shares = [100 * np.mean([each[name]["shares"][group] for each in fired]) for group in ("triggered", "clean")]
            texts.append(f"{name}: {found} (fires on {shares[0]:.0f} % of triggered, {shares[1]:.0f} % of clean texts)")
            good.append(found)
        null = [mean_interval([each[name] for each in fired]) for name in ("mean feature", "best feature")]
        said.append(f"{kind}: {', '.join(texts)}; the mean over features {null[0]}, the best {null[1]}")
    verdict = (
        HOLDS if min(each.low for each in good) > 0.9 else CONDITION if max(each.low for each in good) > 0.9 else FAILS
    )
    claim = "The feature that is elicited, the first row of the best direction, fires on held-out triggered texts"
    result = "AUROC of its largest activation, triggered against clean texts, mean over models: " + "; ".join(said)
    return Row(claim, OURS, "`_eliciting.fires`", result, verdict)


def draw(results: list[dict[str, Any]], figure: Any) -> None:
    """Scores of every model, target unknown; detection against R; what monitors and the elicited feature see."""
    models, sweep, seeing = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    looks: dict[str | None, tuple[str, str]] = {
        None: ("o", "no backdoor"),
        "token": ("^", "token"),
        "style": ("s", "style"),
    }
    for shift, (kind, (marker, label)) in zip((-0.22, 0, 0.22), looks.items(), strict=True):
        for x, name in enumerate(ATTACKS):
            y = scores(results, f"{name} unknown", kind)
            color = "#999999" if kind is None else COLORS[name.split(" ")[0]]
            jitter = np.linspace(-0.06, 0.06, len(y))
            models.scatter(
                x + shift + jitter, y, s=14, marker=marker, color=color, alpha=0.8, label=label if x == 0 else None
            )
    models.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    models.set_xticks(range(len(ATTACKS)), [name.replace(" per", "\nper") for name in ATTACKS], fontsize="small")
    models.legend(frameon=False, fontsize="small")
    for name in ("latent", "random"):
        for kind, style in (("token", "-"), ("style", "--")):
            found = [detection(results, f"{name} R={r:g}", kind) for r in RADII]
            sweep.plot(RADII, [each.mean for each in found], style, color=COLORS[name], marker="o", markersize=3,
                       label=f"{name}, {kind}")  # fmt: skip
            sweep.fill_between(RADII, [e.low for e in found], [e.high for e in found], color=COLORS[name], alpha=0.1)
    sweep.set_xscale("log", base=2)
    sweep.set_xticks(RADII, [f"{r:g}" for r in RADII])
    sweep.set_ylim(-0.02, 1.05)
    sweep.legend(frameon=False, fontsize="small", loc="lower right")
    bars: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
        "latent, unknown": (COLORS["latent"], lambda m: m["monitor"]["latent unknown"]["clean"]),
        "latent, known": (COLORS["latent"], lambda m: m["monitor"]["latent known"]["clean"]),
        "random, unknown": (COLORS["random"], lambda m: m["monitor"]["random unknown"]["clean"]),
        "HotFlip, unknown": (COLORS["HotFlip"], lambda m: m["monitor"]["HotFlip unknown"]["clean"]),
        "HotFlip, known": (COLORS["HotFlip"], lambda m: m["monitor"]["HotFlip known"]["clean"]),
        "elicited feature, s = 1": (TERMS["sparsity"], lambda m: m["fires"]["s=1"]["auroc"]["clean"]),
        "elicited feature, s = 3": (TERMS["sparsity"], lambda m: m["fires"]["s=3"]["auroc"]["clean"]),
    }
    for y, (color, value) in enumerate(bars.values()):
        for kind, up in (("token", 0.14), ("style", -0.14)):
            values = [value(_model(result, kind)) for result in results]
            seeing.scatter(values, np.full(len(values), -y + up), s=12, marker=looks[kind][0], color=color, alpha=0.7)
    seeing.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    seeing.set_yticks([-y for y in range(len(bars))], list(bars), fontsize="small")
    label_axes(models, "Scores of models, target unknown", "", "margin of a dormant class")
    label_axes(sweep, "Backdoored or not, by norm", "R ÷ mean norm of h", "AUROC over models")
    label_axes(seeing, "Held-out triggers", "AUROC, triggered or clean", "")
