"""What each term of the Gated SAE's loss does, in identities (_identities.py) and in training without the auxiliary term.

MATH.md §2 and §3.  The training: one learning rate, d = 32, as many features as the data has directions; equation (8), and
without its auxiliary term, tied and untied, from one calibrated start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.claims import _identities, _variants
from benchmarks.claims._claim import CONDITION, CRITIQUE, FAILS, HOLDS, OURS, PAPER, Interval, Row, interval
from benchmarks.claims._fronts import times
from benchmarks.claims._variants import GATED, NO_AUXILIARY, NO_AUXILIARY_UNTIED, Variant
from benchmarks.data import Superposition
from sae_fast.analysis.plots import ACCENT, INK, TERMS, label_axes

TITLE = "What the terms of the Gated SAE's loss do"
SETTING = (
    "Identities at random points in float64, deviations relative to the largest entry; exact means at most 1e-12. "
    "Training on synthetic activations (32 dimensions, 128 directions of which about 4 make an example, 128 features, "
    "2 000 steps): gates are gone where FVU is surely above 0.9 and L0 below 1 % of its start."
)
SEEDS, QUICK_SEEDS = 6, 2
EXACT, NUMERICAL = 1e-12, 1e-7  # relative
GONE_L0, GONE_FVU = 0.01, 0.9  # of an SAE that has collapsed: L0 and open gates below this share of their start, FVU above
HEALTHY_FVU = 0.5  # of one that has not: below
NEGLIGIBLE = 1.1  # an encoder that got smaller by less than this factor has not been rescaled
L1S, LR = (0.1, 1.0), 1e-2
TRAINED = (GATED, NO_AUXILIARY, NO_AUXILIARY_UNTIED)
CHECKS: tuple[Callable[..., dict[str, float]], ...] = (
    _identities.closed_forms, _identities.reconstruction_alone, _identities.perspective_1, _identities.perspective_2,
    _identities.rescaling, _identities.only_closing,
)  # fmt: skip
Result = dict[str, Any]
Curve = dict[str, list[float]]


def measure(seed: int, quick: bool) -> Result:
    """The numbers of each check at a random point, and the curves of each training."""
    x, p = _identities.random_point(seed)
    checked = _variants.side_by_side([partial(check, x, p) for check in CHECKS])
    names = (check.__name__ for check in CHECKS)
    return dict(zip(names, checked, strict=True)) | {"training": collapse(seed, quick)}


def collapse(seed: int, quick: bool) -> dict[str, list[Curve]]:
    """Of each variant and λ the curves, on held-out data, of: step, l0, fvu, open (gates on an example), pi (the mean open
    π_gate), norm (the geometric mean of ‖w_enc,i‖ over its start), r_mag (the mean).

    The sparsity term is λ · open · pi, so the fall of its two factors says which way it was made small.
    """
    steps, B, d, features = (120, 64, 16, 48) if quick else (2000, 128, 32, 128)
    source = Superposition(d, features, active=4, seed=seed)
    sample, held_out = source.batch(2048), source.batch(4096)
    (batches,) = _variants.side_by_side([lambda: [source.batch(B) for _ in range(steps)]])
    looks = sorted({round(steps ** (i / 24)) for i in range(25)} | {0})

    def trained(variant: Variant) -> list[Curve]:
        p = _variants.start(sample, features, len(L1S), seed, l0=features / 8)
        p = p if variant.tied else _variants.untie(p)
        start, curves = p["W_enc"].norm(dim=-1), [[] for _ in L1S]

        def look(step: int) -> None:
            if step not in looks:
                return
            _, gates, _ = _variants.encode(p, held_out, variant)
            count = (gates > 0).double().sum((1, 2))
            norm = (p["W_enc"].norm(dim=-1) / start).log().mean(1).exp()
            pi = gates.double().sum((1, 2)) / count.clamp(min=1)
            quality = _variants.quality(p, held_out, variant)
            rows = torch.stack([*quality, count / len(held_out), pi, norm, p["r_mag"].mean(1)], dim=1)
            for curve, row in zip(curves, rows.tolist(), strict=True):
                curve.append([step, *row])

        _variants.train(p, batches, torch.tensor(L1S), torch.full((len(L1S),), LR), variant, look)
        names = ("step", "l0", "fvu", "open", "pi", "norm", "r_mag")
        return [dict(zip(names, zip(*curve, strict=True), strict=True)) for curve in curves]

    jobs = [partial(trained, variant) for variant in TRAINED]
    return dict(zip((variant.name for variant in TRAINED), _variants.side_by_side(jobs), strict=True))


# ---- The table ------------------------------------------------------------------------------------------------------


def conclude(results: list[Result]) -> list[Row]:
    """Identities by their largest deviation over the seeds, training by intervals over them."""

    def worst(check: Callable[..., Any], key: str = "deviation") -> float:
        return max(result[check.__name__][key] for result in results)

    def least(check: Callable[..., Any], key: str) -> float:
        return min(result[check.__name__][key] for result in results)

    def exact(check: Callable[..., Any], *also: bool) -> str:
        return HOLDS if worst(check) <= EXACT and all(also) else FAILS

    forms, alone, one, two, scale, close = CHECKS
    zero = max(worst(alone, key) for key in results[0][alone.__name__] if key != _moving(key))
    moving = min(least(alone, key) for key in results[0][alone.__name__] if key == _moving(key))
    numerical, gate_only = worst(forms, "numerical"), interval(result[forms.__name__]["gate_only"] for result in results)
    apart = worst(two, "left") > EXACT  # true of the encoder, not of the decoder: a condition
    decoder = "∇W_dec differs along d_i alone, which the unit norm removes"
    if apart:
        decoder = (
            "but ∇W_dec and ∇b_dec differ by 2 Σ ReLU(π_gate)ᵀ r_aux ÷ B and 2 Σ r_aux ÷ B, as exactly, and removing the "
            f"component along d_i leaves at least {100 * least(two, 'left'):.0f} % of the first"
        )
    rows = [
        (
            "All gradients of equation (8) have closed forms over the entries of one support, the open gates", OURS, forms,
            f"{worst(forms):.1g} largest relative deviation from autograd, which central differences confirm to "
            f"{numerical:.1g}; {100 * gate_only.mean:.0f} % of the entries have an open gate and magnitude 0, and count",
            exact(forms, numerical <= NUMERICAL),
        ),
        (
            "The reconstruction of f̃ gives b_gate no gradient, and W_enc none through the gate: none at all when untied, "
            "one through π_mag when tied", PAPER, alone,
            f"{zero:.1g} is the largest entry of ∂L_recon/∂b_gate (tied and untied) and of ∂L_recon/∂W_enc (untied), by "
            f"autograd and by central differences; tied, ∂L_recon/∂W_enc has entries up to at least {moving:.2g}",
            HOLDS if zero == 0 and moving > EXACT else FAILS,
        ),
        (
            "A baseline SAE's loss on ReLU(π_gate) plus the reconstruction error of f̃ is equation (8) without its "
            "stop-gradient (perspective 1)", CRITIQUE, one,
            f"{worst(one):.1g} largest relative deviation of value and gradients; with the stop-gradient the decoder's "
            f"gradients differ by at least {100 * least(one, 'control'):.0f} %",
            exact(one, least(one, "control") > EXACT),
        ),
        (
            "Two SAEs that share parameters, [‖x − x̂(ReLU π_gate)‖² + λ‖ReLU π_gate‖₁] + [‖x − x̂(f̃)‖² + λ‖gate‖₁], have "
            "equation (8)'s gradients (perspective 2)", CRITIQUE, two,
            f"{worst(two):.1g} largest relative deviation, for W_enc, b_gate, r_mag and b_mag; {decoder}; with ‖f̃‖₁ for "
            f"‖gate‖₁ the encoder's gradients are off too, by at least {100 * least(two, 'control'):.1g} %",
            FAILS if exact(two, least(two, "control") > EXACT) == FAILS else CONDITION if apart else HOLDS,
        ),
        (
            "Without the auxiliary term the sparsity can be had for nothing: (W_enc, b_gate, r_mag) → (εW_enc, εb_gate, "
            "r_mag − ln ε) leaves f̃ as it is and the sparsity term ε times as large", CRITIQUE, scale,
            f"{worst(scale):.1g} largest relative deviation of f̃ and of the ratio of sparsity terms, ε = 0.01",
            exact(scale),
        ),
        (
            "Without the auxiliary term only the sparsity term moves b_gate: ∂L/∂b_gate = λ P(π_gate > 0) ≥ 0, which can "
            "only close gates", CRITIQUE, close,
            f"{worst(close):.1g} largest relative deviation from autograd, tied and untied", exact(close),
        ),
    ]  # fmt: skip
    checked = [
        Row(claim, by, f"`_identities.{check.__name__}`", result, verdict) for claim, by, check, result, verdict in rows
    ]
    return [*checked, _collapse_row(results), _route_row(results)]


def _moving(key: str) -> str:
    """``key`` if it is of the one gradient of L_recon that is not 0."""
    return key if key.startswith("W_enc, tied") else ""


def _ends(results: list[Result], variant: Variant, of: Callable[[Curve], float]) -> list[Interval]:
    """The interval of ``of`` a curve, for each λ."""
    return [interval(of(result["training"][variant.name][i]) for result in results) for i in range(len(L1S))]


def _collapse_row(results: list[Result]) -> Row:
    """An SAE is gone where FVU is surely above GONE_FVU, L0 and open gates surely below GONE_L0 of their start."""
    texts, gone, missed, healthy = [], [], [], True
    for variant in TRAINED:
        l0, fvu = (_ends(results, variant, lambda curve, key=key: curve[key][-1]) for key in ("l0", "fvu"))
        shares = [_ends(results, variant, lambda curve, key=key: curve[key][-1] / curve[key][0]) for key in ("l0", "open")]
        ends = [f"L0 {a}, FVU {b} (λ = {c:g})" for a, b, c in zip(l0, fvu, L1S, strict=True)]
        texts.append(f"{variant.name}: {', '.join(ends)}")
        for l1, error, *left in zip(L1S, fvu, *shares, strict=True):
            where = f"{variant.name}, λ = {l1:g}"
            if variant is GATED and error.high >= HEALTHY_FVU:
                healthy = False
                missed.append(f"FVU {error} is not surely below {HEALTHY_FVU:g} ({where})")
            elif variant is not GATED:
                gone.append(error.low > GONE_FVU and all(share.high < GONE_L0 for share in left))
                if error.low <= GONE_FVU:
                    missed.append(f"FVU {error} is not surely above {GONE_FVU:g} ({where})")
                for name, share in zip(("L0", "open gates"), left, strict=True):
                    if share.high >= GONE_L0:
                        missed.append(f"{name} at {share} of the start, not surely below {GONE_L0:g} ({where})")
    verdict = FAILS if not healthy or not any(gone) else HOLDS if all(gone) else CONDITION
    start = np.mean([result["training"][GATED.name][0]["l0"][0] for result in results])
    claim = "Without the auxiliary term training closes all gates, L0 → 0 and FVU → 1; with it, it does not"
    text = "; ".join([f"L0 {start:.2g} at the start, {texts[0]}", *texts[1:], *missed])
    return Row(claim, PAPER, "`loss_terms.collapse`", text, verdict)


def changes(curve: Curve) -> dict[str, float]:
    """ln of the last value over the first, while a gate is open: of open gates and their mean π_gate, whose product is the
    sparsity term, and of what (εW_enc, εb_gate, r_mag − ln ε) makes small, the encoder's norm and exp(−r_mag)."""
    last = max(i for i, count in enumerate(curve["open"]) if count > 0)
    found = {key: math.log(curve[key][last] / curve[key][0]) for key in ("open", "pi", "norm")}
    return found | {"r_mag": curve["r_mag"][0] - curve["r_mag"][last]}


def _route_row(results: list[Result]) -> Row:
    """Closing is the larger part where it is surely more than each other change; rescaling is negligible where both its
    changes surely are."""
    said, larger, negligible = [], [], []
    for variant in TRAINED[1:]:
        names = {"open": "open gates", "pi": "mean open π_gate", "norm": "‖w_enc,i‖"}
        names |= {"r_mag": "exp(−r_mag)"} if variant.tied else {}  # else W_mag makes up for smaller encoders
        for i, l1 in enumerate(L1S):
            seeds = [changes(result["training"][variant.name][i]) for result in results]
            change = {key: interval(seed[key] for seed in seeds) for key in names}
            rescaled = [change[key] for key in names if key in ("norm", "r_mag")]
            behind = [interval(seed["open"] - seed[key] for seed in seeds) for key in names if key != "open"]
            larger.append(all(x.high < 0 for x in behind))
            negligible.append(all(x.low > -math.log(NEGLIGIBLE) for x in rescaled))
            shrunk = any(x.high < 0 for x in rescaled)
            notes = [] if larger[-1] else ["closing is not surely the larger part"]
            notes += [] if negligible[-1] else [f"encoders {'' if shrunk else 'may '}shrink as well"]
            parts = [f"{name} {times(change[key])}" for key, name in names.items()]
            said.append(f"{variant.name}, λ = {l1:g}: {', '.join([*parts, *notes])}")
    verdict = FAILS if not all(larger) else HOLDS if all(negligible) else CONDITION
    text = f"End ÷ start: {'; '.join(said)}; closing is {'' if all(larger) else 'not '}the larger part at every λ"
    claim = (
        "Of the two ways to no sparsity cost, smaller encoders (r_mag, or an untied W_mag, makes up for it) and closed "
        "gates, training takes the second"
    )
    return Row(claim, CRITIQUE, "`loss_terms.changes`", text, verdict)


# ---- The picture ----------------------------------------------------------------------------------------------------


def draw(results: list[Result], figure: Any) -> None:
    """The identities' deviations, L0 in training, and the two ways to less sparsity cost."""
    identities, l0, routes = figure.subplots(1, 3, width_ratios=(1, 1.4, 1))
    _draw_identities(identities, results)
    steps = [max(step, 1) for step in results[0]["training"][GATED.name][0]["step"]]
    for variant, color in zip(TRAINED, (INK, ACCENT, TERMS["auxiliary"]), strict=True):
        fvus = _ends(results, variant, lambda curve: curve["fvu"][-1])
        label = f"{variant.name}: FVU {', '.join(f'{fvu.mean:.2f}' for fvu in fvus)}"
        for i, style in enumerate(("-", "--")):
            curves = [result["training"][variant.name][i]["l0"] for result in results]
            _band(l0, steps, curves, label=None if i else label, color=color, linestyle=style)
    which = f"step (solid: λ = {L1S[0]:g}, dashed: {L1S[1]:g})"
    label_axes(l0, "L0 in training", which, "L0 on held-out data")
    i = len(L1S) - 1
    parts = (
        ("open", "open gates", ACCENT), ("pi", "mean open π_gate", TERMS["reconstruction"]),
        ("norm", "mean ‖w_enc,i‖", TERMS["auxiliary"]),
    )  # fmt: skip
    for key, what, color in parts:
        curves = [result["training"][NO_AUXILIARY.name][i] for result in results]
        _band(routes, steps, [[y / curve[key][0] for y in curve[key]] for curve in curves], label=what, color=color)
    _band(routes, steps, [np.exp(-np.array(curve["r_mag"])) for curve in curves], label="exp(−mean r_mag)", color=INK)
    label_axes(routes, "Gates and encoders", f"step, no auxiliary term, λ = {L1S[i]:g}", "relative to the start")
    for axes in (l0, routes):
        axes.set(xscale="log", yscale="log")
        axes.legend(frameon=False, fontsize="small")


def _draw_identities(axes: Any, results: list[Result]) -> None:
    forms, _, one, two, scale, close = (check.__name__ for check in CHECKS)
    rows = [
        ("closed forms of (8)", forms, "deviation"), ("perspective 1", one, "deviation"),
        ("   its control: stopped", one, "control"), ("perspective 2", two, "deviation"),
        ("   its control: ‖f̃‖₁", two, "control"), ("rescaling", scale, "deviation"),
        ("∂b_gate without aux.", close, "deviation"),
    ]  # fmt: skip
    for y, (_, check, key) in enumerate(rows):
        values = [max(result[check][key], 1e-17) for result in results]  # 0 has no logarithm
        axes.plot(values, [y] * len(values), "o", alpha=0.6, color=ACCENT if key == "control" else TERMS["reconstruction"])
    axes.axvline(EXACT, color=INK, linestyle="--", label=f"exact: below {EXACT:g}")
    axes.set(xscale="log", yticks=range(len(rows)), yticklabels=[name for name, *_ in rows])
    axes.invert_yaxis()
    label_axes(axes, "Identities", "largest relative deviation (one dot a seed)", "")
    axes.legend(frameon=False, fontsize="small")


def _band(axes: Any, x: Iterable[float], ys: Iterable[Iterable[float]], **style: Any) -> None:
    """The mean over seeds and the range of them."""
    ys = np.array([list(y) for y in ys])
    axes.plot(x, ys.mean(0), **style)
    axes.fill_between(x, ys.min(0), ys.max(0), color=style["color"], alpha=0.15, linewidth=0)
