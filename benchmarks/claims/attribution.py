"""Attribution across a step: where integrated gradients (IG) reach the exact effect, and where a gate's jump stops them.

MATH.md §5.  Errors are of the sum of all effects against the exact one, root mean square over examples, relative to that of
the exact effects.  IG is by the left rule.  Three regimes:

R1  features are the independent variable, the SAE's error is kept: nothing is encoded anew.
R2  upstream features vary, and a downstream SAE recomputes its error: x̂ + (x − x̂) is the identity.
R3  an SAE encodes anew what comes to it, and its error is not recomputed: where a gate opens there is a jump, which no
    gradient shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sae_fast as sf
from benchmarks.claims import _tasks
from benchmarks.claims._claim import CONDITION, CRITIQUE, FAILS, HOLDS, OURS, Interval, Row, interval
from sae_fast.analysis import attribution, edges, splice
from sae_fast.analysis.plots import ACCENT, INK, TERMS, label_axes
from sae_fast.data.transformer import quiet
from sae_fast.demo import demo_model
from sae_fast.extras import require
from sae_fast.nn.scale import scale_

TITLE = "Attribution across a step: exact, AtP, integrated gradients, jump-corrected"
SETTING = (
    "Random SAEs (12 dimensions, 48 features), SAEs trained on synthetic activations (64 dimensions, 256 features), "
    "in float64, 32 pairs of inputs each, and SAEs of 1 024 features trained on block 2 of MiniLM, 4 pairs of texts "
    "of 6 tokens. IG takes the gradient at N points from the clean end by the left rule; errors are of the sum of all "
    "effects, root mean square over examples. *R1*: features move, the SAE's error is kept. *R2*: an SAE downstream "
    "recomputes its error. *R3*: an SAE encodes anew what comes to it. *ΣJ*: the jumps of the metric where gates open "
    "or close on the way; θ is the value to which a feature jumps ([MATH.md §5](../docs/MATH.md)). A slope of −1 is one "
    "within 0.1, a plateau at ΣJ one within 2 %."
)
SEEDS, QUICK_SEEDS = 6, 2
STEPS, QUICK_STEPS = (1, 3, 10, 32, 100, 320, 1000, 3200), (1, 4, 16, 64)
KINDS = {"Gated": sf.GatedSAE, "ReLU": sf.ReluSAE}
HELD_OUT = 8192  # activations
LAYER, SITE = 2, "encoder.layer.2"
TOKENS, PAIRS, QUICK_TOKENS, QUICK_PAIRS = 6, 4, 4, 2  # of a text, and pairs of texts, in the transformer
CURVES = {"R1": TERMS["reconstruction"], "R2": TERMS["sparsity"], "R3": ACCENT, "R3, jump-corrected": TERMS["auxiliary"]}


class Net(nn.Module):
    """x → site → layer → down → number: two places for SAEs, a layer between them, and a metric that is not linear."""

    def __init__(self, d: int, random: torch.Generator):
        super().__init__()
        self.site, self.down = nn.Identity(), nn.Identity()
        self.weights = [torch.randn(d, d, generator=random).double() / d**0.5 for _ in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        layer, hidden, out = self.weights
        x = self.down(torch.tanh(self.site(x) @ layer))
        return torch.tanh(x @ hidden) @ out[0]


def prepare(quick: bool) -> None:
    """The demo's activations, once for all seeds."""
    _tasks.harvested(quick, HELD_OUT)


def measure(seed: int, quick: bool) -> dict[str, Any]:
    """Error curves over N in each regime, on random SAEs, on trained ones and in the demo's transformer."""
    steps, examples = (QUICK_STEPS, 16) if quick else (STEPS, 32)
    found: dict[str, Any] = {"counterexample": counterexample(), "linear": linear_jumps(seed)}
    for kind in KINDS:
        random = torch.Generator().manual_seed(seed)
        sae = random_sae(kind, 12, 48, random)
        found[f"random {kind}"] = regimes(sae, torch.randn(2, examples, 12, generator=random).double(), steps, random)
        task = _tasks.synthetic(seed, 512, 2 * examples)
        sae = trained_sae(kind, task, 256, {"Gated": 4.0, "ReLU": 2.0}[kind], 60 if quick else 400, seed)
        found[f"trained {kind}"] = regimes(sae.double(), task.held_out.double().unflatten(0, (2, -1)), steps, random)
        found[f"transformer {kind}"] = in_the_transformer(kind, seed, quick)
    found["edges"] = edge_errors(seed, (1, 3, 10, 32) if not quick else (1, 4, 16))
    return found


def counterexample() -> dict[str, float]:
    """One gated feature with b_gate = −1, r_mag = b_mag = 0, and u from 2 to 0."""
    sae = sf.GatedSAE(1, 1, dtype=torch.float64)
    with torch.no_grad():
        for name, value in {"W_enc": 1, "W_dec": 1, "b_gate": -1}.items():
            sae.get_parameter(name).fill_(value)
    clean, patch = torch.tensor([[2.0]]).double(), torch.tensor([[0.0]]).double()
    site = nn.Sequential(nn.Identity())
    common: dict[str, Any] = {"metric": lambda x: x[:, 0], "vary": "input", "steps": 1000}
    methods = ("atp", "ig", "jump_corrected_ig")
    found = {name: attribution.patch(site, "0", sae, clean, patch, method=name, **common) for name in methods}
    return {"exact": found["atp"].total} | {name: float(effects.effects.sum()) for name, effects in found.items()}


def linear_jumps(seed: int) -> float:
    """The largest deviation of ΣJ, and of each J_i, from ±max(θ_i, 0) ∂m/∂f_i, for a linear metric; relative."""
    random = torch.Generator().manual_seed(seed)
    sae, ends = random_sae("Gated", 12, 48, random), torch.randn(2, 64, 12, generator=random).double()
    direction = torch.randn(12, generator=random).double()
    effects = attribution.patch(
        nn.Sequential(nn.Identity()), "0", sae, *ends, metric=lambda x: x @ direction, method="jump_corrected_ig", steps=1
    )
    with torch.no_grad():
        theta = (sae.b_mag - sae.r_mag.exp() * sae.b_gate).clamp(min=0)
        gates = [sae.centred(x) @ sae.W_enc.T + sae.b_gate > 0 for x in ends]
        wanted = (gates[1].double() - gates[0].double()) * theta * (sae.W_dec @ direction)
    assert effects.jumps is not None
    got = effects.support.to_dense(effects.jumps)
    return float((got - wanted).abs().max() / wanted.abs().max())


def regimes(sae: Any, ends: Tensor, steps: Sequence[int], random: torch.Generator) -> dict[str, Any]:
    """Relative rms errors over N for rows that go from ends[0] to ends[1] [n, d], and what stands beside them."""
    model, (clean, patch) = Net(ends.shape[-1], random), ends
    common: dict[str, Any] = {"metric": lambda x: x, "rule": "left"}
    downstream = random_sae("Gated", ends.shape[-1], 4 * ends.shape[-1], random)

    def run(**options: Any) -> attribution.Effects:
        return attribution.patch(model, "site", sae, clean, patch, **common, **options)

    found = curves(run, steps)
    for name, error in (("R2", "recompute"), ("R2, error not recomputed", "keep")):
        # An edit that changes nothing, so that x̂ + (x − x̂) is computed, not known.
        with splice(model, "down", downstream, error=error, edit=lambda code: code):
            found[name] = [error_of(run(steps=n)) for n in (steps if error == "recompute" else steps[3:4])]
    return found


def curves(run: Any, steps: Sequence[int]) -> dict[str, Any]:
    """R1 and R3 over N; AtP in both; ΣJ, and how far the error that stays is from it."""
    found: dict[str, Any] = {"steps": list(steps), "R1": [error_of(run(steps=n)) for n in steps]}
    jumps = run(method="jump_corrected_ig", steps=1)
    total, sums = exact(jumps), by_example(jumps, jumps.jumps)
    rest = [e.by_example() - total for e in (run(steps=n, vary="input") for n in steps)]
    found["R3"] = [rms(error) / rms(total) for error in rest]
    found["R3, jump-corrected"] = [rms(error + sums) / rms(total) for error in rest]
    found["jumps"] = rms(sums) / rms(total)
    if rms(sums):
        found["plateau"] = rms(rest[-1]) / rms(sums)
        found["unexplained"] = rms(rest[-1] + sums) / rms(sums)  # of what IG misses, example by example
    found["atp"] = {"R1": error_of(run(method="atp")), "R3": error_of(run(method="atp", vary="input"))}
    return found


def edge_errors(seed: int, steps: Sequence[int]) -> dict[str, Any]:
    """Edges into 16 gated features: the sum over upstream features against the exact change, relative rms over the 16.
    By the midpoint rule."""
    random = torch.Generator().manual_seed(seed)
    model, up, down = Net(12, random), *(random_sae("Gated", 12, 48, random) for _ in range(2))
    clean, patch = torch.randn(2, 16, 12, generator=random).double()
    found: dict[str, Any] = {"steps": list(steps)}
    for method in ("ig", "jump_corrected_ig"):
        found[method] = []
        for n in steps:
            e = edges(model, ("site", up), ("down", down), clean, patch, features=range(16), method=method, steps=n)
            found[method].append(rms(e.effects.sum(1) - e.exact) / rms(e.exact))
    return found


def in_the_transformer(kind: str, seed: int, quick: bool) -> dict[str, Any]:
    """The demo's model, an SAE trained on its activations, and pairs of random texts.  The metric is how much nearer the
    text's embedding is to the patch's than to the clean one's."""
    transformers = require("transformers", extra="demo")

    task = _tasks.real(seed, 512, HELD_OUT, quick)
    sae = trained_sae(kind, task, 96 if quick else 1024, {"Gated": 3.0, "ReLU": 1.6}[kind], 60 if quick else 300, seed)
    found, _ = _tasks.harvested(quick, HELD_OUT)
    store = found.train
    scale_(sae, found.scale)
    with quiet(transformers):
        model = transformers.AutoModel.from_pretrained(demo_model()).eval()
    tokens, pairs = (QUICK_TOKENS, QUICK_PAIRS) if quick else (TOKENS, PAIRS)
    begins = np.random.default_rng(seed).integers(0, len(store.tokens) - tokens, 2 * pairs)
    around = transformers.AutoTokenizer.from_pretrained(demo_model())("")["input_ids"]  # [CLS] and [SEP]
    texts = [[around[0], *store.tokens[i : i + tokens].tolist(), around[1]] for i in begins]
    ids = torch.tensor(texts).unflatten(0, (2, pairs))
    where = torch.ones(tokens + 2, dtype=torch.bool)
    where[[0, -1]] = False  # the SAE has seen none of these two
    with torch.no_grad():
        ends = [F.normalize(model(x).last_hidden_state.mean(1), dim=1) for x in ids]

    def metric(output: Any, examples: Tensor) -> Tensor:
        embedding = F.normalize(output.last_hidden_state.mean(1), dim=1)
        return (embedding * (ends[1] - ends[0])[examples]).sum(1)

    def run(**options: Any) -> attribution.Effects:
        return attribution.patch(model, SITE, sae, *ids, metric=metric, where=where, rule="left", **options)

    return curves(run, (1, 2, 4, 8) if quick else (1, 2, 4, 8, 16, 32))


def random_sae(kind: str, d: int, features: int, random: torch.Generator) -> Any:
    """Of which about a third of the features fire on a standard normal x, with thresholds θ of 0 to 1 if it is gated."""
    sae = KINDS[kind](d, features, dtype=torch.float64, seed=int(torch.randint(1 << 31, (), generator=random)))
    with torch.no_grad():
        bias, theta, r_mag = (torch.rand(3, features, generator=random).double()).unbind()
        sae.get_parameter(sae.per_feature[0]).copy_(-bias)
        if kind == "Gated":
            sae.r_mag.copy_(0.4 * (r_mag - 0.5))
            sae.b_mag.copy_(theta + sae.r_mag.exp() * sae.b_gate)
    return sae


def trained_sae(kind: str, task: _tasks.Task, d_sae: int, l1: float, steps: int, seed: int) -> Any:
    """As the sweep trains them."""
    sae = KINDS[kind](len(task.mean), d_sae, seed=seed)
    _tasks.train(sae, task, steps, lr=4e-3, l1_coefficient=l1, init_l0=min(64, d_sae // 8))
    return sae


def by_example(effects: attribution.Effects, values: Tensor | None) -> Tensor:
    """[N]: values [nnz] summed as effects are."""
    assert values is not None
    return replace(effects, effects=values).by_example()


def exact(effects: attribution.Effects) -> Tensor:
    return (effects.patched - effects.clean).double()


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def error_of(effects: attribution.Effects) -> float:
    return rms(effects.by_example() - exact(effects)) / rms(exact(effects))


# ---- What came out --------------------------------------------------------------------------------------------------


def slope(curve: dict[str, Any], name: str) -> float:
    """Of log error against log N, over the larger half of the N's."""
    n, late = np.log(curve["steps"]), slice(len(curve["steps"]) // 2 - 1, None)
    return float(np.polyfit(n[late], np.log(curve[name])[late], 1)[0])


def conclude(results: list[dict[str, Any]]) -> list[Row]:
    gated, relu = ["random Gated", "trained Gated"], ["random ReLU", "trained ReLU"]
    last = results[0]["random Gated"]["steps"][-1]

    def over_seeds(places: Sequence[str], value: Any) -> tuple[str, list[Interval]]:
        found = [interval(value(result[place]) for result in results) for place in places]
        return ", ".join(f"{each} ({place})" for each, place in zip(found, places, strict=True)), found

    def slopes(name: str, places: Sequence[str]) -> tuple[str, bool]:
        text, found = over_seeds(places, lambda curve: slope(curve, name))
        return text, all(abs(each.mean + 1) <= 0.1 for each in found)

    def row(claim: str, checked: str, result: str, verdict: str | bool, by: str = CRITIQUE) -> Row:
        verdict = verdict if isinstance(verdict, str) else HOLDS if verdict else FAILS
        return Row(claim, by, ", ".join(f"`attribution.{name}`" for name in checked.split()), result, verdict)

    rows = []
    claims = {
        "R1": "Effects of nodes, whose features are the independent variable, do not jump: the sum of IG's reaches the "
        "exact one as 1/N",
        "R2": "Through a downstream SAE whose error is recomputed nothing jumps: the sum of IG's reaches the exact one "
        "as 1/N",
    }
    for name, claim in claims.items():
        text, good = slopes(name, gated + relu)
        text = f"slopes of log error over log N, up to {last}: {text}"
        if name == "R2":
            pairs = [(r[place]["R1"], r[place]["R2"]) for r in results for place in gated + relu]
            apart = max(float(np.max(np.abs(np.divide(b, a) - 1))) for a, b in pairs)
            control, kept = over_seeds(gated, lambda curve: curve["R2, error not recomputed"][-1])
            text += (
                f"; by construction: its errors are those without that SAE, to {apart:.0e}. Control: with an error that "
            )
            text += f"carries no gradient the relative error at N = {results[0]['random Gated']['steps'][3]} is {control}"
            good = good and apart < 1e-3 and all(each.low > 0.1 for each in kept)
        rows.append(row(claim, "regimes", text, good))

    plateau, found = over_seeds(gated, lambda curve: curve["plateau"])
    _, unexplained = over_seeds(gated, lambda curve: curve["unexplained"])
    formula = max(result["linear"] for result in results)
    stays = all(abs(each.mean - 1) <= 0.02 for each in found) and all(each.high <= 0.02 for each in unexplained)
    stays = stays and formula < 1e-12
    share, _ = over_seeds(gated, lambda curve: curve["jumps"])
    smooth, converges = slopes("R3", relu)
    result = (
        f"rms error at N = {last} ÷ rms ΣJ: {plateau}; example by example ΣJ is the error, to "
        f"{100 * max(each.high for each in unexplained):.1g} %; rms ΣJ ÷ rms effect: {share}; slopes of ReLU SAEs: "
        f"{smooth}; J_i = ±max(θ_i, 0) ∂m/∂f_i for a linear metric, to {formula:.0e}"
    )
    claim = (
        "Into gated features that are encoded anew IG does not reach the exact effect for any N: what it misses is ΣJ, the "
        "jumps of the gates that open or close on the way, which a ReLU SAE does not have"
    )
    rows.append(row(claim, "regimes linear_jumps", result, HOLDS if stays and converges else CONDITION if stays else FAILS))
    text, good = slopes("R3, jump-corrected", gated)
    rows.append(row("IG plus ΣJ reaches the exact effect as 1/N", "regimes", f"slopes: {text}", good, OURS))

    toy = results[0]["counterexample"]
    good = abs(toy["atp"] - toy["exact"]) < 1e-12 and abs(toy["ig"] - toy["exact"]) > 0.9
    than, _ = over_seeds(gated, lambda curve: curve["R3"][-1] / curve["atp"]["R3"])
    result = (
        f"exact {toy['exact']:g}, AtP {toy['atp']:g}, IG {toy['ig']:g}, jump-corrected IG {toy['jump_corrected_ig']:g}; on "
        f"the other SAEs in R3 the error of IG at N = {last} ÷ that of AtP is {than}"
    )
    claim = "One gradient (AtP) can be exact where IG is not: b_gate = −1, r_mag = b_mag = 0, u from 2 to 0"
    rows.append(row(claim, "counterexample", result, good))

    plain, secants = (interval(r["edges"][name][-1] for r in results) for name in ("ig", "jump_corrected_ig"))
    n = results[0]["edges"]["steps"][-1]
    result = f"relative error at N = {n} by the midpoint rule: IG {plain}, with secants {secants}"
    claim = (
        "Edges into gated features need the correction too: IG misses the gates that open; with secants over pieces of the "
        "path in place of slopes it does not"
    )
    rows.append(row(claim, "edge_errors", result, 2 * secants.high < plain.low, OURS))

    n = results[0]["transformer Gated"]["steps"][-1]
    r1, r3, fixed, of_relu = (
        interval(result[f"transformer {kind}"][name][-1] for result in results)
        for kind, name in (("Gated", "R1"), ("Gated", "R3"), ("Gated", "R3, jump-corrected"), ("ReLU", "R3"))
    )
    result = (
        f"relative error at N = {n} in MiniLM, block {LAYER}: R1 {r1}, R3 {r3}, R3 jump-corrected {fixed}, R3 of a ReLU "
        f"SAE {of_relu}; rms ΣJ ÷ rms effect: {over_seeds(['transformer Gated'], lambda curve: curve['jumps'])[0]}"
    )
    claim = (
        "The same holds in a transformer with a gated SAE trained on it: IG's sums over nodes are right, through gates "
        "they are not until the jumps are added"
    )
    right = max(r1.high, fixed.high, of_relu.high) < 0.1
    apart = 2 * max(r1.high, fixed.high) < r3.low
    rows.append(
        row(claim, "in_the_transformer", result, HOLDS if right and apart else CONDITION if right or apart else FAILS)
    )
    return rows


def draw(results: list[dict[str, Any]], figure: Any) -> None:
    """Error against N: random gated SAEs, trained ones, and in the transformer."""
    places = {"random Gated": "Random gated SAEs", "trained Gated": "Trained gated SAEs", "transformer Gated": "In MiniLM"}
    for axes, (place, title) in zip(figure.subplots(1, 3), places.items(), strict=True):
        steps = results[0][place]["steps"]
        for name, color in CURVES.items():
            lines = np.array([result[place][name] for result in results if name in result[place]])
            if len(lines):
                axes.plot(steps, lines.T, color=color, linewidth=0.6, alpha=0.35)
                axes.plot(
                    steps,
                    np.exp(np.log(lines).mean(0)),
                    color=color,
                    marker="o",
                    markersize=3,
                    linestyle="--" if name == "R2" else "-",
                    label=f"IG, {name}",
                )
        flat = {"rms ΣJ": (INK, "--", "jumps"), "AtP, R1": (CURVES["R1"], ":", "R1"), "AtP, R3": (CURVES["R3"], "-.", "R3")}
        for label, (color, style, name) in flat.items():
            values = [result[place]["jumps"] if name == "jumps" else result[place]["atp"][name] for result in results]
            axes.axhline(np.mean(values), color=color, linestyle=style, linewidth=1, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        label_axes(axes, title, "N, points on the path", "rms error ÷ rms effect")
    figure.axes[0].legend(frameon=False, fontsize="small")
