"""The claims' own checks: they notice a wrong formula, and what trains many variants at once trains each rightly."""

import numpy as np
import pytest
import torch

from benchmarks.claims import _fronts, _identities, _variants, ablations, loss_terms
from benchmarks.claims._claim import CONDITION, FAILS, HOLDS, Interval
from sae_fast import reference

EXACT = 1e-12


@pytest.fixture(scope="module")
def point():
    return _identities.random_point(7)


# ---- The identities -------------------------------------------------------------------------------------------------


def test_identities_hold_and_their_controls_do_not(point):
    forms, one, two = _identities.closed_forms(*point), _identities.perspective_1(*point), _identities.perspective_2(*point)
    assert forms["deviation"] < EXACT and forms["numerical"] < 1e-7 and 0 < forms["gate_only"] < 1
    assert one["deviation"] < EXACT and one["control"] > 0.01
    assert two["deviation"] < EXACT and two["control"] > 0.01 and two["left"] > 0.1
    assert _identities.rescaling(*point)["deviation"] < EXACT
    assert _identities.only_closing(*point)["deviation"] < EXACT


def test_the_reconstruction_moves_the_gate_nowhere(point):
    found = _identities.reconstruction_alone(*point)
    assert {key for key, value in found.items() if value} == {"W_enc, tied, autograd", "W_enc, tied, numerical"}


def test_points_are_away_from_kinks(point):
    x, p = point
    for code in (_identities.code_of(x, p), _identities.code_of(x, p, tied=False)):
        assert min(code.pi_gate.abs().min(), code.pi_mag.abs().min()) > _identities.KINK
    assert len(x) == 48


@pytest.mark.parametrize("name", ["W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"])
def test_a_wrong_sign_in_a_closed_form_shows(point, monkeypatch, name):
    right = _identities.one_support
    monkeypatch.setattr(_identities, "one_support", lambda x, p: right(x, p) | {name: -right(x, p)[name]})
    assert _identities.closed_forms(*point)["deviation"] == pytest.approx(2)


def test_entries_of_an_open_gate_without_magnitude_are_needed(point, monkeypatch):
    """Dropping S \\ S', as a kernel might that keeps only what the decoder sees, is a wrong gradient."""
    right = _identities.code_of

    def smaller(x, p, tied=True):
        code = right(x, p, tied)
        return code._replace(pi_gate=torch.where(code.f > 0, code.pi_gate, -1.0))

    x, p = point
    truth = _identities.one_support(x, p)
    monkeypatch.setattr(_identities, "code_of", smaller)
    assert _identities.deviation(_identities.one_support(x, p), truth) > 0.01


def test_a_loss_without_the_stop_gradient_shows(point, monkeypatch):
    right = _identities.equation_8
    monkeypatch.setattr(_identities, "equation_8", lambda x, p, stopped=None: right(x, p))
    assert _identities.closed_forms(*point)["numerical"] > 0.01
    assert _identities.perspective_1(*point)["control"] < EXACT
    assert _identities.perspective_2(*point)["deviation"] > 0.01


def test_rescaling_without_r_mag_is_no_symmetry(point):
    x, p = point
    before = _identities.code_of(x, p).f
    after = _identities.code_of(x, p | {"W_enc": 0.5 * p["W_enc"], "b_gate": 0.5 * p["b_gate"]}).f
    assert float((after - before).abs().max()) > 0.01


# ---- The variants ---------------------------------------------------------------------------------------------------

ENCODER = ("W_enc", "b_gate", "b_mag", "r_mag")
VARIANTS = [
    _variants.GATED, _variants.NO_R_MAG, _variants.UNTIED, _variants.UNFROZEN_DECODER, _variants.NO_AUXILIARY,
    _variants.NO_AUXILIARY_UNTIED, _variants.BASELINE, _variants.RESCALE_AND_SHIFT,
]  # fmt: skip


def loss(x, p, l1, variant):
    """A variant's loss by the reference's functions."""
    p = p | {name: p[name].detach() for name in variant.fixed}
    gated = {name: p[name] for name in (*ENCODER, "W_dec", "b_dec")}
    if variant is _variants.BASELINE:
        return reference.relu_loss(x, p["W_enc"], p["b_gate"], p["W_dec"], p["b_dec"], l1).total
    if variant in (_variants.GATED, _variants.NO_R_MAG):
        return reference.gated_loss(x, **gated, l1_coefficient=l1).total
    code = reference.gated_encode(x, *(p[name] for name in ENCODER), p["b_dec"])
    f, gates = code.f, torch.relu(code.pi_gate)
    if not variant.tied:
        f = code.gate * torch.relu(reference.pre_activation(x, p["W_mag"], p["b_dec"]) + p["b_mag"])
    total = (x - reference.decode(f, p["W_dec"], p["b_dec"])).pow(2).sum(-1).mean() + l1 * gates.sum(-1).mean()
    if variant.auxiliary:
        stop = (lambda t: t) if variant.auxiliary == _variants.UNFROZEN else torch.Tensor.detach
        total = total + (x - reference.decode(gates, stop(p["W_dec"]), stop(p["b_dec"]))).pow(2).sum(-1).mean()
    return total


def started(variant, models, perturbed=True):
    random = torch.Generator().manual_seed(3)
    x = torch.randn(64, 6, dtype=torch.double, generator=random) + 1
    p = _variants.untie(_variants.start(x, 20, models, seed=1, l0=6))
    if perturbed:  # so that magnitudes and gates, tied and untied, differ
        for name in ("b_mag", "r_mag", "W_mag", "W_enc"):
            p[name] += 0.1 * torch.randn(p[name].shape, dtype=torch.double, generator=random)
    if "r_mag" in variant.fixed:
        p["r_mag"].zero_()
    if variant.tied:
        del p["W_mag"]
    return x, p


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_many_at_once_train_as_one_by_one_with_autograd(variant):
    x, p = started(variant, 2)
    first = {name: value.clone() for name, value in p.items()}
    l1, lr = torch.tensor([0.1, 0.5], dtype=torch.double), torch.tensor([1e-2, 3e-3], dtype=torch.double)
    batches = list(x.split(16)) + list(x.flip(0).split(16)[:2])
    _variants.train(p, batches, l1, lr, variant)
    for m in range(2):
        one = {name: value[m].clone().requires_grad_() for name, value in first.items()}
        state = {name: torch.zeros(2, *value.shape, dtype=torch.double) for name, value in one.items()}
        for step, rows in enumerate(batches, 1):
            trained = [name for name in one if name not in variant.fixed]
            grads = torch.autograd.grad(loss(rows, one, float(l1[m]), variant), [one[name] for name in trained])
            rate = float(lr[m]) * min(1, (len(batches) - step + 1) / (len(batches) - len(batches) * 4 // 5))
            with torch.no_grad():
                for name, grad in zip(trained, grads, strict=True):
                    reference.adam_step(one[name], grad, *state[name], step, rate, (0.0, 0.999), 1e-8, name == "W_dec")
        for (
            name,
            value,
        ) in one.items():  # Adam makes of a gradient of rounding, 1e-17, up to 1e-9 of a step (its eps is 1e-8)
            torch.testing.assert_close(
                p[name][m], value.detach(), rtol=1e-8, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
            )
            assert (name in variant.fixed) == bool((value.detach() == first[name][m]).all()), name


def test_a_wrong_gradient_would_show_in_training(monkeypatch):
    right = _variants.gradients
    x, p = started(_variants.GATED, 1)
    q = {name: value.clone() for name, value in p.items()}
    arguments = ([x], torch.ones(1, dtype=torch.double), torch.full((1,), 1e-2, dtype=torch.double), _variants.GATED)
    _variants.train(p, *arguments)
    monkeypatch.setattr(_variants, "gradients", lambda *a: right(*a) | {"b_gate": -right(*a)["b_gate"]})
    _variants.train(q, *arguments)
    assert float((p["b_gate"] - q["b_gate"]).abs().max()) > 1e-3


def test_quality_and_bias_are_those_of_the_reference():
    x, p = started(_variants.GATED, 2)
    code = reference.gated_encode(x, *(p[name][1] for name in ENCODER), p["b_dec"][1])
    x_hat, mean = reference.decode(code.f, p["W_dec"][1], p["b_dec"][1]), x.mean(0)
    l0, fvu = _variants.quality(p, x, _variants.GATED)
    assert float(l0[1]) == float(code.f.count_nonzero() / len(x))
    assert float(fvu[1]) == pytest.approx(float((x - x_hat).pow(2).sum() / (x - mean).pow(2).sum()))
    bias = float((x_hat - mean).pow(2).sum() / ((x_hat - mean) * (x - mean)).sum())
    assert float(_variants.reconstruction_bias(p, x, _variants.GATED)[1]) == pytest.approx(bias)


def test_rescale_and_shift_starts_as_the_baseline():
    x, p = started(_variants.BASELINE, 1, perturbed=False)
    baseline = _variants.quality(p, x, _variants.BASELINE)
    p["b_mag"].copy_(p["b_gate"])
    torch.testing.assert_close(_variants.quality(p, x, _variants.RESCALE_AND_SHIFT), baseline)


def test_jobs_side_by_side_have_one_thread_each_and_leave_torch_as_it_was():
    before = torch.get_num_threads()
    jobs = [lambda i=i: (i, torch.get_num_threads()) for i in range(5)]
    assert _variants.side_by_side(jobs) == [(i, 1) for i in range(5)]
    assert torch.get_num_threads() == before


# ---- Fronts ---------------------------------------------------------------------------------------------------------


def models(times, lrs=(1e-3,)):
    """A front L0 = times ÷ FVU of each learning rate, the first the better one by twice."""
    fvu = np.geomspace(0.05, 0.5, 5)
    columns = {name: [] for name in ("lr", "test fvu", "validation fvu", "test l0", "validation l0")}
    for i, lr in enumerate(lrs):
        columns["lr"] += [lr] * 5
        for data in _fronts.DATA:
            columns[f"{data} fvu"] += fvu.tolist()
            columns[f"{data} l0"] += (times * 2**i / fvu).tolist()
    return columns


def test_a_front_that_needs_more_is_told_by_how_much():
    assert _fronts.cost(models(3.0), models(2.0)) == pytest.approx([np.log(1.5)] * 3)
    far = models(1.0) | {name: [5.0] * 5 for name in ("test fvu", "validation fvu")}
    assert _fronts.cost(models(1.0), far) is None


def test_a_front_takes_the_better_learning_rate_and_leaves_out_what_is_dead():
    both = models(2.0, lrs=(3e-3, 1e-2))
    assert _fronts.cost(both, models(2.0)) == pytest.approx([0] * 3)
    for name in _fronts.L0S:
        both[name][5:] = [0.0] * 5
    assert _fronts.cost(both, models(2.0)) == pytest.approx([0] * 3)


@pytest.mark.parametrize(
    "whole, sparse, dense, verdict",
    [
        (0.1, 0.1, 0.1, HOLDS), (0.1, 0.1, 0.0, HOLDS), (0.1, 0.2, -0.1, CONDITION), (0.0, 0.1, 0.0, CONDITION),
        (0.0, 0.0, 0.0, FAILS), (-0.1, 0.0, -0.1, FAILS), (-0.1, 0.1, -0.2, CONDITION), (-0.1, -0.1, -0.1, FAILS),
    ],
)  # fmt: skip
def test_the_verdict_is_the_intervals(whole, sparse, dense, verdict):
    cost = _fronts.Cost(*(Interval(mean, mean - 0.05, mean + 0.05) for mean in (whole, sparse, dense)))
    assert cost.verdict[0] == verdict
    assert bool(cost.verdict[1]) == (verdict == CONDITION or not any((whole, sparse, dense)))


# ---- What the ablations conclude ------------------------------------------------------------------------------------


def ablated(times, bias=0.7):
    """Three seeds: the fronts' L0 over the Gated SAE's, by variant, with noise; 1 where not said."""
    variants = (*ablations.TRAINED, _variants.RESCALE_AND_SHIFT)
    gamma = {_variants.BASELINE: bias}
    return [
        {
            v.name: models(times.get(v, 1) * noise ** (v in times)) | {"test bias": [gamma.get(v, 0.99)] * 5}
            for v in variants
        }
        for noise in (0.99, 1.0, 1.01)
    ]


@pytest.mark.parametrize(
    "variant, times, verdict, text",
    [
        (_variants.UNFROZEN_DECODER, 1.5, HOLDS, "58 % of the baseline's"),
        (_variants.UNFROZEN_DECODER, 1.05, CONDITION, "not of the size"),
        (_variants.UNFROZEN_DECODER, 1.0, FAILS, "no difference can be told from none"),
        (_variants.UNTIED, 1.1, HOLDS, "14 % of the baseline's"),
        (_variants.UNTIED, 1.9, CONDITION, "not of the size"),
        (_variants.UNTIED, 0.8, FAILS, "-32 % of the baseline's"),
    ],
)
def test_an_ablation_is_judged_by_direction_and_size(variant, times, verdict, text):
    claimed = {_variants.UNFROZEN_DECODER: 0, _variants.UNTIED: 1}[variant]
    row = ablations.conclude(ablated({_variants.BASELINE: 2.0, variant: times}))[claimed]
    assert row.verdict == verdict and text in row.result


@pytest.mark.parametrize("baseline", [1.0, 0.5])
def test_where_the_baseline_is_not_worse_no_share_of_its_gap_is_given(baseline):
    rows = ablations.conclude(ablated({_variants.BASELINE: baseline, _variants.UNFROZEN_DECODER: 1.5}))
    assert rows[0].verdict == CONDITION and "of what size is not told" in rows[0].result
    assert all("is not surely more" in row.result and " % of the baseline's" not in row.result for row in rows[:4])


# ---- What the loss terms conclude -----------------------------------------------------------------------------------

HEALTHY = {"l0": 0.8, "open": 0.8, "fvu": 0.01}
GONE = {"l0": 1e-3, "open": 1e-3, "fvu": 0.99}


def trained(tied, untied=GONE, gated=HEALTHY):
    """Three seeds: each variant's curves, from 16 features and a start of 1 to the values given (a list: one for each λ);
    of l0 and open as shares of the start."""

    def curve(end, noise):
        end = {"pi": 1.0, "norm": 1.0, "r_mag": 0.0} | end
        start = {"l0": 16, "open": 16, "fvu": 0.7, "pi": 1, "norm": 1, "r_mag": 0}
        factor = {"l0": 16 * noise, "open": 16 * noise}
        return {"step": [0, 9]} | {key: [start[key], end[key] * factor.get(key, 1)] for key in start}

    ends = zip(loss_terms.TRAINED, (gated, tied, untied), strict=True)
    ends = {v.name: end if isinstance(end, list) else [end] * 2 for v, end in ends}
    return [
        {"training": {name: [curve(end, noise) for end in pair] for name, pair in ends.items()}} for noise in (0.9, 1, 1.1)
    ]


@pytest.mark.parametrize(
    "results, verdict, text",
    [
        (trained(GONE), HOLDS, ""),
        (trained([GONE | {"fvu": 0.85}, GONE]), CONDITION, "FVU 0.85 [0.85, 0.85] is not surely above 0.9 (no aux"),
        (trained(GONE, GONE | {"l0": 0.02}), CONDITION, "L0 at 0.02 ["),
        (trained(GONE, GONE | {"open": 0.02}), CONDITION, "open gates at 0.02 ["),
        (trained(HEALTHY, HEALTHY), FAILS, "not surely above"),
        (trained(GONE, gated=GONE), FAILS, "not surely below 0.5 (Gated"),
    ],
)
def test_collapse_is_judged_by_fvu_l0_and_open_gates(results, verdict, text):
    row = loss_terms._collapse_row(results)
    assert row.verdict == verdict and text in row.result
    assert ("not surely" in row.result) == (verdict != HOLDS)


@pytest.mark.parametrize(
    "tied, verdict, text",
    [
        (GONE, HOLDS, "the larger part at every λ"),
        (GONE | {"norm": 1.3, "r_mag": -0.3}, HOLDS, "the larger part at every λ"),  # grown
        (GONE | {"norm": 0.6}, CONDITION, "encoders shrink as well"),
        ([GONE, GONE | {"r_mag": 0.4}], CONDITION, "exp(−r_mag) 0.67 [0.67, 0.67], encoders shrink as well"),
        (GONE | {"norm": 1e-4}, FAILS, "closing is not surely the larger part"),
        (GONE | {"pi": 1e-4}, FAILS, "closing is not the larger part"),
    ],
)
def test_which_way_the_sparsity_cost_was_made_small(tied, verdict, text):
    row = loss_terms._route_row(trained(tied))
    assert row.verdict == verdict and text in row.result
    swapped = loss_terms._route_row(trained(GONE, tied))  # the untied encoder is judged as well, but for its r_mag of 0
    assert swapped.verdict == verdict or "r_mag" in text


def test_encoders_that_shrank_in_one_seed_may_have_shrunk():
    results = trained(GONE)
    results[0]["training"][_variants.NO_AUXILIARY.name][0]["norm"][-1] = 0.7
    row = loss_terms._route_row(results)
    assert row.verdict == CONDITION and "encoders may shrink as well" in row.result


def test_a_seed_whose_gates_are_all_closed_is_judged_at_its_last_open_one():
    curve = {"open": [16, 2, 0], "pi": [1.0, 0.5, 0.0], "norm": [1.0, 0.5, 0.4], "r_mag": [0.0, 0.1, 0.2]}
    want = {"open": -np.log(8), "pi": -np.log(2), "norm": -np.log(2), "r_mag": -0.1}
    assert loss_terms.changes(curve) == pytest.approx(want)


@pytest.mark.parametrize(
    "changed, verdict", [({}, CONDITION), ({"left": 0.0}, HOLDS), ({"deviation": 0.1}, FAILS), ({"control": 0.0}, FAILS)]
)
def test_perspective_2_can_be_wholly_true_partly_and_false(point, checked, changed, verdict):
    results = [result | checked for result in trained(GONE)]
    for result in results:
        result["perspective_2"] = result["perspective_2"] | changed
    row = loss_terms.conclude(results)[3]
    assert "perspective 2" in row.claim and row.verdict == verdict
    assert ("but ∇W_dec and ∇b_dec differ" in row.result) == ("left" not in changed)


@pytest.fixture(scope="module")
def checked(point):
    return {check.__name__: check(*point) for check in loss_terms.CHECKS}
