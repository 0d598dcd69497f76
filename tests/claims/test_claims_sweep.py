"""The claims about shrinkage and about fronts: interpolation, the tuning rule, identities, and verdicts from numbers."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.claims import _claim, _sweep, _tasks, bias, pareto
from benchmarks.claims._sweep import GATED, REAL, RELU, SYNTHETIC
from sae_fast.metrics import Metrics


def line(factor, fvus):
    """Points (FVU, log L0) of a front L0 = factor · exp(−10 FVU)."""
    return [(fvu, math.log(factor) - 10 * fvu) for fvu in fvus]


def test_a_known_ratio_is_recovered_from_fronts_of_other_points():
    gap = pareto.gap(line(20, (0.1, 0.17, 0.3)), line(40, (0.05, 0.22, 0.25, 0.4)))
    for value in (gap.mean, gap.largest, gap.first, gap.last):
        assert math.exp(value) == pytest.approx(0.5, rel=1e-12)
    assert gap.x == (0.1, 0.3)


def test_the_mean_gap_is_the_integral_of_the_gap():
    gap = pareto.gap([(0, 0), (2, 0)], [(0, 0), (1, 4), (2, 0)])  # a triangle of height 4
    assert gap == (-2, 0, 0, 0, (0, 2))


def test_fronts_that_do_not_overlap_are_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"do not overlap: 0.1 to 0.2, and 0.3 to 0.4"):
        pareto.gap(line(20, (0.1, 0.2)), line(40, (0.3, 0.4)))


@pytest.mark.parametrize("run", [(0.22, math.log(30)), (0.35, 0.0), (0.3, 0.0)])
def test_a_run_that_others_beat_in_both_is_no_part_of_a_front(run):
    points = line(20, (0.1, 0.2, 0.3))
    assert pareto.front([run, *reversed(points)]) == points


@pytest.mark.parametrize("best", [0.1, 1.0, 8.0])
def test_the_learning_rate_is_climbed_to_and_its_neighbours_are_tried(best):
    asked = []

    def score(lr):
        asked.append(lr)
        return abs(math.log2(lr / best) - 0.1)

    found = _sweep.climb(score, start=1.0 if best != 0.1 else 0.4)
    assert found["lr"] == pytest.approx(best)
    tried = sorted(map(float, found["tried"]))
    assert tried[0] < best < tried[-1]
    assert len(set(asked)) == len(asked) == len(tried)


def test_a_learning_rate_that_fails_is_never_chosen():
    assert _sweep.climb(lambda lr: math.nan if lr > 1 else -lr, start=1.0)["lr"] == 1.0
    with pytest.raises(RuntimeError, match="still improving at 32"):
        _sweep.climb(lambda lr: -lr, start=1.0)
    assert _sweep.climb(lambda lr: 1.0 if lr < 1 else math.inf, start=1.0)["lr"] == 0.5
    with pytest.raises(RuntimeError, match="no score at 3 nor at its neighbours"):
        _sweep.climb(lambda lr: math.nan, start=3.0)


@pytest.mark.parametrize("l1", [0.1, 2.0, 30.0])
def test_fvu_at_an_l0_is_taken_between_two_runs_from_any_lambda(l1):
    def train(l1):  # on this line itself, so that what is taken between two of its points is exact
        return 40 / l1, 0.3 - 0.1 * math.log(40 / l1) / math.log(10)

    assert _sweep.fvu_at(train, 10.0, l1) == pytest.approx(0.2)
    assert _sweep.fvu_at(train, 1e9, l1) == math.inf  # out of reach: not extrapolated


@pytest.fixture(scope="module")
def shrinkage():
    torch.manual_seed(0)
    x = torch.randn(100, 8, dtype=torch.float64)
    metrics = Metrics(4)
    for rows in x.split(30):
        metrics.update(rows, 0.7 * rows + 0.2 * torch.randn_like(rows), torch.ones(len(rows), 4))
    return _sweep.shrinkage(metrics)


def test_the_identities_of_the_measures_hold(shrinkage):
    assert bias.identity_error(shrinkage) < bias.EXACT


WRONG = {
    "relative_reconstruction_bias": lambda m: m["C"] / m["B"],
    "projection_bias": lambda m: m["A"] / m["B"],
    "optimal_rescale": lambda m: m["B"] / m["C"],
    "legacy_bias": lambda m: math.sqrt(m["A"] / m["B"]),
    "rho_squared": lambda m: m["C"] / math.sqrt(m["A"] * m["B"]),
    "D": lambda m: m["D"] * (1 + 1e-9),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_formula_breaks_an_identity(shrinkage, name):
    assert bias.identity_error(shrinkage | {name: WRONG[name](shrinkage)}) > bias.EXACT


@pytest.mark.parametrize("name", bias.MEASURES[:2])
def test_gamma_and_c1_are_the_minimisers_and_another_is_not(shrinkage, name):
    assert bias.off_minimum(shrinkage) == 0
    assert bias.off_minimum(shrinkage | {name: 1.01 * shrinkage[name]}) == pytest.approx(0.01, abs=2e-4)


@pytest.mark.parametrize(("changed", "verdict"), [("", _claim.HOLDS), ("γ", _claim.CONDITION), ("first", _claim.FAILS)])
def test_the_verdict_on_the_formulas_follows_from_example_and_minimisers(shrinkage, changed, verdict):
    off = {"relative_reconstruction_bias": 1.01 * shrinkage["relative_reconstruction_bias"]} if changed == "γ" else {}
    example = dict(bias.EXAMPLE) | ({"legacy_bias": 0.5} if changed == "first" else {})
    row = bias._formulas([{"runs": [{"raw": shrinkage | off, "identity_error": 0.0}], "example": example}])
    assert row.verdict == verdict
    assert ("off the minimisers" in row.result) == (changed == "γ")


def result(gated, relu, gamma):
    """One seed's result: fronts L0 = factor · exp(−10 FVU), and γ of the baseline falling from ``gamma``."""
    runs = []
    for data in (REAL, SYNTHETIC):
        for kind, factor in ((GATED, gated), (RELU, relu)):
            for i, fvu in enumerate((0.1, 0.2, 0.3)):
                ours = {"relative_reconstruction_bias": 1.0 if kind == GATED else gamma - 0.1 * i, "rho_squared": 1 - fvu}
                run = {
                    "data": data,
                    "kind": kind,
                    "d_sae": 4,
                    "l1": 1.0 + i,
                    "l0": factor * math.exp(-10 * fvu),
                    "fvu": fvu,
                }
                runs.append(run | {"centred": ours, "cosine": 0.9, "found": 0.8})
    return {"runs": runs, "tuned": {data: {kind: {"lr": 1e-3} for kind in (GATED, RELU)} for data in (REAL, SYNTHETIC)}}


@pytest.mark.parametrize(
    ("gated", "verdict"), [(20, _claim.HOLDS), (12, _claim.HOLDS), (30, _claim.CONDITION), (44, _claim.FAILS)]
)
def test_the_verdict_on_half_as_many_features_follows_from_the_ratio(gated, verdict):
    results = [result(gated * noise, 40, 0.9) for noise in (0.99, 1.0, 1.01)]
    rows = pareto.conclude(results)
    assert rows[0].verdict == rows[1].verdict == verdict
    assert rows[0].result.startswith(f"{gated / 40:.3g} [")
    assert rows[2].verdict == (_claim.FAILS if gated > 40 else _claim.HOLDS)


def test_noise_does_not_help_half_as_many():
    results = [result(22 * noise, 40, 0.9) for noise in (0.8, 1.0, 1.2)]  # an interval around 0.55 that has 0.5 in it
    row = pareto._half(results, REAL)
    assert row.verdict == _claim.CONDITION and row.result.endswith("fewer at every FVU, half as many at neither end")
    row = pareto._half([result(38 * noise, 40, 0.9) for noise in (0.8, 1.0, 1.2)], REAL)
    assert row.verdict == _claim.FAILS and row.result.endswith("no difference can be told from none")


def crossing(gated, data=(REAL, SYNTHETIC)):
    """Results in which the Gated SAE's L0 at its largest FVU on ``data`` is ``gated`` times as large."""
    results = [result(19 * noise, 40, 0.9) for noise in (0.99, 1.0, 1.01)]
    for run in (run for one in results for run in one["runs"]):
        if run["kind"] == GATED and run["data"] in data and run["fvu"] == 0.3:
            run["l0"] *= gated
    return results


def test_a_worst_point_that_is_no_better_is_told():
    for data, verdict in (((), _claim.HOLDS), ((REAL,), _claim.CONDITION), ((REAL, SYNTHETIC), _claim.CONDITION)):
        row = pareto._beyond_shrinkage(crossing(2.2, data))
        assert row.verdict == verdict
        assert row.result.count("fewer on average only") == len(data)
    assert pareto._half(crossing(2.2), REAL).result.endswith("fewer on average only, half as many at the lowest FVU only")
    row = pareto._beyond_shrinkage([result(44, 40, 0.9)] * 2)
    assert row.verdict == _claim.FAILS and row.result.count("not surely fewer") == 2


@pytest.mark.parametrize(
    ("cosine", "found", "noise", "verdict", "text"),
    [
        (0.0, 0.0, 0.001, _claim.HOLDS, "as well at equal L0, as well at equal FVU"),
        (-0.01, -0.02, 0.001, _claim.HOLDS, "as well at equal L0"),  # surely worse, by less than the margin
        (0.0, 0.0, 0.1, _claim.CONDITION, "undecided at equal L0"),  # an interval that covers none and the margin
        (-0.05, 0.0, 0.001, _claim.FAILS, "worse at equal L0"),
        (0.0, -0.1, 0.001, _claim.FAILS, "worse at equal L0"),
    ],
)
def test_recovery_as_well_is_non_inferiority(cosine, found, noise, verdict, text):
    results = [result(20, 40, 0.9) for _ in range(3)]
    for one, sign in zip(results, (-1, 0, 1), strict=True):
        for run in (run for run in one["runs"] if run["kind"] == GATED):
            run["cosine"] += cosine + sign * noise
            run["found"] += found + sign * noise
    row = pareto._recovery(results)
    assert row.verdict == verdict and text in row.result


def test_recovery_as_well_at_one_of_the_two_is_a_condition():
    results = [result(20, 40, 0.9) for _ in range(3)]
    for run in (run for one in results for run in one["runs"]):
        # One function of L0 for both kinds: at equal FVU, where the Gated SAE's L0 is half, it is lower.
        run["cosine"], run["found"] = (0.9 + 0.1 * math.log(run["l0"]), 0.8)
    row = pareto._recovery(results)
    assert row.verdict == _claim.CONDITION and "as well at equal L0, worse at equal FVU" in row.result


@pytest.mark.parametrize(("gamma", "verdict"), [(0.9, _claim.HOLDS), (1.3, _claim.FAILS)])
def test_the_verdict_on_shrinkage_follows_from_gamma(gamma, verdict):
    results = [result(20, 40, gamma + noise) for noise in (-0.01, 0.01)]
    assert bias._resolved(results, REAL).verdict == verdict


def test_an_sae_of_which_nothing_fires_has_gamma_1():
    torch.manual_seed(0)
    x = 2 + torch.randn(5000, 4)
    task = _tasks.Task(x.mean(0), lambda: iter([x]), x, None)
    found = _sweep._collapsed(task)
    assert found["l0"] == 0
    assert found["fvu"] == pytest.approx(1, abs=1e-6)
    assert found["raw"]["relative_reconstruction_bias"] == pytest.approx(1, abs=1e-6)
    assert bias.identity_error(found["raw"]) < bias.EXACT
