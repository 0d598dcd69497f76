"""attribution.patch: each method against its definition on dense codes, the regimes of MATH.md §5, and what it refuses."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch
from problems.analysis_models import KINDS, Chain, identity, random_ends, random_sae, step_sae
from problems.tiny_models import tiny_model
from torch import nn

import sae_fast as sf
from sae_fast.analysis import attribution, batching, splice

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def model():
    return Chain()


def site_output(model, x):
    with torch.no_grad():
        return model.c(torch.tanh(model.a(x)) * 2)


def codes(model, sae, *inputs):
    """Dense codes [R, F] at the site c, and the error [R, d] of the first."""
    with torch.no_grad():
        x = [site_output(model, each).flatten(0, 1) for each in inputs]
        return *[sae.encode(each) for each in x], x[0] - sae(x[0])


def metric_of(model, sae, f, rest, shape):
    return model.tail((sae.decode(f) + rest).view(shape)).sum((1, 2))


def dense_ig(model, sae, f, f_patch, rest, shape, alphas):
    """[R, F], as the definition says it."""
    total = torch.zeros_like(f)
    for alpha in alphas:
        point = (f + alpha * (f_patch - f)).requires_grad_()
        total += torch.autograd.grad(metric_of(model, sae, point, rest, shape).sum(), point)[0]
    return total / len(alphas) * (f_patch - f)


ALPHAS = {"left": [0, 0.25, 0.5, 0.75], "right": [0.25, 0.5, 0.75, 1], "midpoint": [0.125, 0.375, 0.625, 0.875]}


@kinds
@pytest.mark.parametrize("rule", ALPHAS)
def test_ig_is_the_mean_gradient_times_the_change(model, kind, rule):
    sae, (clean, patch) = random_sae(kind, 8, 32), random_ends()
    f, f_patch, rest = codes(model, sae, clean, patch)
    got = attribution.patch(model, "c", sae, clean, patch, metric=identity, steps=4, rule=rule)
    wanted = dense_ig(model, sae, f, f_patch, rest, (3, 4, 8), ALPHAS[rule])
    torch.testing.assert_close(got.to_dense(), wanted, rtol=1e-12, atol=1e-14)
    assert got.support.nnz == int(((f != 0) | (f_patch != 0)).sum())
    torch.testing.assert_close(got.support.to_dense(got.support.values[0]), f)
    torch.testing.assert_close(got.support.to_dense(got.support.values[1]), f_patch)
    change = metric_of(model, sae, f_patch, rest, (3, 4, 8)) - model(clean)
    assert got.total == pytest.approx(float(change.sum().detach()), rel=1e-12)


@kinds
def test_atp_is_one_gradient(model, kind):
    sae, (clean, patch) = random_sae(kind, 8, 32), random_ends()
    got = attribution.patch(model, "c", sae, clean, patch, metric=identity, method="atp")
    wanted = dense_ig(model, sae, *codes(model, sae, clean, patch), (3, 4, 8), [0.0])
    torch.testing.assert_close(got.to_dense(), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("per_example", [True, False], ids=["by example", "one number"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "ragged"])
def test_exact_is_a_forward_pass_an_entry(model, per_example, masked):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    where = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]]).bool() if masked else torch.ones(3, 4).bool()
    metric = identity if per_example else torch.sum
    got = attribution.patch(model, "c", sae, clean, patch, metric=metric, method="exact", where=where)
    x, x_patch = (site_output(model, each) for each in (clean, patch))
    f, f_patch = (sae.encode(each[where]).detach() for each in (x, x_patch))
    rows = got.support.row_ids()
    for j in range(0, got.support.nnz, 3):
        row, feature = int(rows[j]), int(got.support.indices[j])
        changed = x.clone()
        at = where.nonzero()[row]
        changed[at[0], at[1]] += (f_patch - f)[row, feature] * sae.W_dec[feature].detach()
        wanted = (model.tail(changed).sum((1, 2)) - model(clean)).sum().detach()
        assert float(got.effects[j]) == pytest.approx(float(wanted), rel=1e-9, abs=1e-13)


def test_the_zero_baseline_takes_every_feature_out(model):
    sae, (clean, _) = random_sae("gated", 8, 32), random_ends()
    f, rest = codes(model, sae, clean)
    got = attribution.patch(model, "c", sae, clean, metric=identity, steps=4)
    wanted = dense_ig(model, sae, f, torch.zeros_like(f), rest, (3, 4, 8), ALPHAS["midpoint"])
    torch.testing.assert_close(got.to_dense(), wanted, rtol=1e-12, atol=1e-14)


def test_only_chosen_features_move(model):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    f, f_patch, rest = codes(model, sae, clean, patch)
    chosen = [3, 4, 17, 30]
    moved = f.clone()
    moved[:, chosen] = f_patch[:, chosen]
    got = attribution.patch(model, "c", sae, clean, patch, metric=identity, steps=4, features=chosen)
    wanted = dense_ig(model, sae, f, moved, rest, (3, 4, 8), ALPHAS["midpoint"])
    torch.testing.assert_close(got.to_dense(), wanted, rtol=1e-12, atol=1e-14)
    assert set(got.support.indices.tolist()) <= set(chosen)


def test_dropping_the_error_moves_the_reconstruction(model):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    f, f_patch, _ = codes(model, sae, clean, patch)
    got = attribution.patch(model, "c", sae, clean, patch, metric=identity, steps=4, error="drop")
    wanted = dense_ig(model, sae, f, f_patch, torch.zeros(8).double(), (3, 4, 8), ALPHAS["midpoint"])
    torch.testing.assert_close(got.to_dense(), wanted, rtol=1e-12, atol=1e-14)


def test_points_that_share_a_pass_and_points_that_do_not_give_the_same(model, monkeypatch):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    for options in ({"vary": "input"}, {"method": "jump_corrected_ig"}, {"method": "exact"}, {}):
        together = attribution.patch(model, "c", sae, clean, patch, metric=identity, steps=7, **options)
        with monkeypatch.context() as patched:
            patched.setattr(batching, "TOKENS_PER_PASS", 1)
            apart = attribution.patch(model, "c", sae, clean, patch, metric=identity, steps=7, **options)
        one = attribution.patch(model, "c", sae, clean, patch, metric=torch.sum, steps=7, **options)
        torch.testing.assert_close(together.effects, apart.effects, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(together.effects, one.effects, rtol=1e-11, atol=1e-14)


def test_a_metric_with_data_of_its_own_is_told_how_to_index_it(model):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    weights = torch.tensor([1.0, -2.0, 0.5]).double()
    with pytest.raises(ValueError, match=r"the batch of 3 is repeated .* takes \(output, examples\)"):
        attribution.patch(model, "c", sae, clean, patch, metric=lambda m: m[:3] * weights)
    for metric in (lambda m, examples: m * weights[examples], lambda m, examples=None: m * weights[examples]):
        attribution.patch(model, "c", sae, clean, patch, metric=metric)


@pytest.mark.parametrize("method", ["exact", "atp", "ig", "jump_corrected_ig"])
def test_a_metric_may_ask_which_examples_it_is_given(model, method):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    weights = torch.tensor([1.0, -2.0, 0.5]).double()
    got = attribution.patch(
        model, "c", sae, clean, patch, metric=lambda m, examples: m * weights[examples], method=method, steps=5
    )
    plain = attribution.patch(model, "c", sae, clean, patch, metric=identity, method=method, steps=5)
    torch.testing.assert_close(got.effects, plain.effects * weights[got.example[got.support.row_ids()]])


# ---- Regimes --------------------------------------------------------------------------------------------------------


@kinds
def test_moving_the_input_is_what_autograd_through_the_spliced_sae_sees(model, kind):
    """R3's ig, summed over features, is the gradient of the spliced model with respect to the site, times the change."""
    sae, (clean, patch) = random_sae(kind, 8, 32), random_ends()
    got = attribution.patch(model, "c", sae, clean, patch, metric=identity, vary="input", steps=4, error="drop")
    x, x_patch = (site_output(model, each) for each in (clean, patch))
    total = torch.zeros(3).double()
    for alpha in ALPHAS["midpoint"]:
        point = (x + alpha * (x_patch - x)).requires_grad_()
        (g,) = torch.autograd.grad(model.tail(sae(point)).sum(), point)
        total += (g * (x_patch - x)).sum((1, 2)) / 4
    torch.testing.assert_close(got.by_example(), total, rtol=1e-10, atol=1e-13)


@kinds
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_jump_corrected_ig_closes_what_ig_leaves_open(model, kind, error):
    sae, (clean, patch) = random_sae(kind, 8, 32), random_ends(examples=8)
    common = {"metric": identity, "steps": 4000, "error": error}
    plain = attribution.patch(model, "c", sae, clean, patch, vary="input", **common)
    corrected = attribution.patch(model, "c", sae, clean, patch, method="jump_corrected_ig", **common)
    torch.testing.assert_close(corrected.effects - corrected.jumps, plain.effects)
    scale = float((corrected.patched - corrected.clean).abs().max())
    left_open = (plain.by_example() - (plain.patched - plain.clean)).abs().max() / scale
    closed = (corrected.by_example() - (corrected.patched - corrected.clean)).abs().max() / scale
    assert closed < 2e-3
    if kind == "relu":
        assert left_open < 2e-3 and not corrected.jumps.any()
    else:
        assert left_open > 0.05
    assert plain.total == pytest.approx(corrected.total, rel=1e-12)


def test_linear_jumps_are_exact_for_a_linear_metric_and_not_for_others(model):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    direction = torch.linspace(-1, 1, 8).double()

    class Linear(Chain):
        def forward(self, x):
            return (self.c(torch.tanh(self.a(x)) * 2) @ direction).sum(1)

    for net, same in ((Linear(), True), (model, False)):
        exact, linear = (
            attribution.patch(net, "c", sae, clean, patch, metric=identity, method="jump_corrected_ig", jumps=jumps)
            for jumps in ("exact", "linear")
        )
        assert exact.jumps.count_nonzero() > 20
        assert torch.allclose(exact.jumps, linear.jumps, rtol=1e-9, atol=1e-12) == same


def test_atp_is_exact_where_ig_is_not():
    sae = step_sae()
    model = nn.Sequential(nn.Identity())
    ends = torch.tensor([[2.0]]).double(), torch.tensor([[0.0]]).double()
    effects = {
        method: attribution.patch(model, "0", sae, *ends, metric=torch.sum, method=method, vary="input", steps=100)
        for method in ("exact", "atp", "ig", "jump_corrected_ig")
    }
    got = {method: float(e.effects) for method, e in effects.items()}
    assert got == pytest.approx({"exact": -2, "atp": -2, "ig": -1, "jump_corrected_ig": -2})
    assert float(effects["jump_corrected_ig"].jumps) == pytest.approx(-1)


def test_through_a_downstream_sae_that_recomputes_its_error_nothing_changes(model):
    up, down, (clean, patch) = random_sae("gated", 10, 40), random_sae("gated", 8, 32), random_ends()
    plain = attribution.patch(model, "a", up, clean, patch, metric=identity)
    with splice(model, "c", down, error="recompute"):
        spliced = attribution.patch(model, "a", up, clean, patch, metric=identity)
    assert torch.equal(plain.effects, spliced.effects)


# ---- On the engine, and in transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gated", "relu", "topk"])
def test_on_the_engine_in_fp32_the_numbers_are_those_of_float64(kind):
    sae = sf.TopKSAE(8, 32, 5, seed=0) if kind == "topk" else random_sae(kind, 8, 32).float()
    model, (clean, patch) = Chain().float(), (x.float() for x in random_ends(5, 7))
    got = attribution.patch(model, "c", sae, clean, patch, metric=identity)
    model, sae = model.double(), sae.double()
    wanted = attribution.patch(model, "c", sae, clean.double(), patch.double(), metric=identity)
    assert torch.equal(got.support.indices, wanted.support.indices)
    assert float((got.effects - wanted.effects).abs().max() / wanted.effects.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_in_transformers_with_keywords_and_a_mask(kind):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(transformers, kind).double()
    block = {"bert": "encoder.layer.1", "gpt2": "h.1", "llama": "layers.1"}[kind]
    random = torch.Generator().manual_seed(0)
    clean, patch = ({"input_ids": torch.randint(3, 16, (4, 6), generator=random)} for _ in range(2))
    for batch in (clean, patch):
        batch["attention_mask"] = torch.ones(4, 6, dtype=torch.long)
    where = torch.tensor([False, True, True, True, True, False])
    sae = random_sae("gated", 16, 40)

    def metric(output, examples):
        return output.last_hidden_state[torch.arange(len(examples)), -1, examples]

    before = {name: p.requires_grad for name, p in model.named_parameters()}
    found = {
        method: attribution.patch(model, block, sae, clean, patch, metric=metric, method=method, steps=400, where=where)
        for method in ("ig", "jump_corrected_ig")
    }
    for effects in found.values():
        torch.testing.assert_close(effects.by_example(), effects.patched - effects.clean, rtol=0.02, atol=2e-4)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in [*model.parameters(), *sae.parameters()])
    assert found["ig"].example.tolist() == [n for n in range(4) for _ in range(4)]
    assert found["ig"].position.tolist() == [1, 2, 3, 4] * 4


def test_sums_and_the_largest(model):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    effects = attribution.patch(model, "c", sae, clean, patch, metric=identity)
    dense = effects.to_dense()
    torch.testing.assert_close(effects.by_feature(), dense.sum(0))
    torch.testing.assert_close(effects.by_example(), dense.view(3, 4, 32).sum((1, 2)))
    top = effects.top(3)
    assert [i for i, _ in top] == dense.sum(0).abs().argsort(descending=True)[:3].tolist()
    assert effects.total == pytest.approx(float((effects.patched - effects.clean).sum()))


# ---- What models do -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "atp", "ig", "jump_corrected_ig"])
def test_what_comes_after_the_site_may_write_in_place(model, method):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    model.tail.insert(0, nn.ReLU())
    plain = attribution.patch(model, "c", sae, clean, patch, metric=identity, method=method)
    model.tail[0].inplace = True
    written = attribution.patch(model, "c", sae, clean, patch, metric=identity, method=method)
    assert torch.equal(plain.effects, written.effects) and torch.equal(plain.patched, written.patched)


@pytest.mark.parametrize("method", ["exact", "ig", "jump_corrected_ig"])
@pytest.mark.parametrize("pooled", [False, True], ids=["one position", "pooled site"])
def test_a_pass_holds_no_more_positions_than_allowed(model, monkeypatch, method, pooled):
    class Counted(Chain):
        most = 0

        def forward(self, x):
            Counted.most = max(Counted.most, x.shape[0] * x.shape[1])
            if pooled:
                return self.tail(self.c(torch.tanh(self.a(x)).mean(1))).sum(1)
            return super().forward(x)

    monkeypatch.setattr(batching, "TOKENS_PER_PASS", 64)
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends(2, 16)
    where = None if pooled else torch.arange(16) == 3
    attribution.patch(Counted(), "c", sae, clean, patch, metric=identity, method=method, steps=50, where=where)
    assert 32 < Counted.most <= 64


def test_gates_that_open_at_one_point_add_up_one_after_the_other():
    """Two equal rows, whose gates open together, and a metric in which they multiply."""
    sae = step_sae()
    site = nn.Sequential(nn.Identity())
    for ends in ((0.0, 2.0), (2.0, 0.0)):
        clean, patch = (torch.full((1, 2, 1), end).double() for end in ends)
        common = {"metric": lambda x: x.sum((1, 2)) ** 2, "method": "jump_corrected_ig", "steps": 2000}
        effects = attribution.patch(site, "0", sae, clean, patch, **common)
        assert float(effects.effects.sum()) == pytest.approx(effects.total, rel=1e-3)
        assert abs(effects.total) == pytest.approx(16)


def test_examples_of_which_no_position_is_taken_have_no_effect(model):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    where = torch.ones(3, 4).bool()
    where[2] = False
    for method in ("exact", "ig", "jump_corrected_ig"):
        effects = attribution.patch(model, "c", sae, clean, patch, metric=identity, method=method, where=where, steps=3)
        assert effects.by_example().shape == (3,) and effects.by_example()[2] == 0
        assert effects.clean[2] == effects.patched[2]


def test_a_metric_may_be_a_module_and_inputs_a_named_tuple(model):
    class Weighted(nn.Module):
        def forward(self, output, examples):
            return output * (1 + examples)

    class Named(NamedTuple):
        x: torch.Tensor

    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    got = attribution.patch(model, "c", sae, Named(clean), Named(patch), metric=Weighted())
    wanted = attribution.patch(model, "c", sae, clean, patch, metric=lambda m, n: m * (1 + n))
    assert torch.equal(got.effects, wanted.effects)


def test_a_module_that_has_two_names_is_found_by_both(model):
    model.alias = model.c
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    effects = [attribution.patch(model, name, sae, clean, patch, metric=identity).effects for name in ("c", "alias")]
    assert torch.equal(*effects)


def test_linear_jumps_take_no_passes_of_their_own(model):
    calls = []
    model.c.register_forward_hook(lambda *_: calls.append(1))
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    for options in ({"vary": "input"}, {"method": "jump_corrected_ig", "jumps": "linear"}):
        attribution.patch(model, "c", sae, clean, patch, metric=torch.sum, **options)
        calls.append(0)
    first = calls.index(0)
    assert len(calls) == 2 * (first + 1)


# ---- What does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps: got 0, want an int ≥ 1"),
        ({"steps": 2.5}, r"steps: got 2\.5"),
        ({"rule": "simpson"}, r"rule: got 'simpson', want one of"),
        ({"method": "shap"}, r"method: got 'shap', want one of"),
        ({"vary": "weights"}, r"vary: got 'weights'"),
        ({"error": "recompute"}, r"error: got 'recompute'"),
        ({"jumps": "none"}, r"jumps: got 'none'"),
        ({"method": "jump_corrected_ig", "vary": "features"}, r"features that move do not jump"),
        ({"vary": "input", "patch": None}, r'patch: got None with vary="input"'),
        ({"features": [0, 32]}, r"features: got 32, want 0 to 31"),
        ({"features": [5, 5]}, r"features: got 5 twice, want each once"),
        ({"features": [3.7]}, r"features: got 3\.7, want feature numbers"),
        ({"where": torch.zeros(4).bool()}, r"where: got a mask that takes no position"),
        ({"where": torch.ones(5).bool()}, r"where: got shape \(5,\)"),
        ({"site": "d"}, r"site: the model has no module 'd'; near names: "),
        ({"metric": lambda m: m.detach()}, r"metric: the model's output, or .*, carries no gradient back .* 'c'"),
        ({"metric": lambda m: m[:2]}, r"metric: got torch\.float64 \(2,\), want a floating-point tensor \[N\]"),
        ({"metric": None}, r"metric: got None, want a function"),
        ({"metric": lambda m: 3.0}, r"metric: got float, want"),
        ({"metric": lambda m: m.round().long()}, r"metric: got torch\.int64"),
        ({"metric": lambda m: m / 0}, r"metric: got .*, want finite values"),
    ],
)  # fmt: skip
def test_bad_arguments(model, options, message):
    clean, patch = random_ends()
    arguments = {"site": "c", "patch": patch, "metric": identity} | options
    with pytest.raises(ValueError, match=message):
        attribution.patch(model, sae=random_sae("gated", 8, 32), clean=clean, **arguments)


def test_shapes_that_differ_between_clean_and_patch(model):
    clean, patch = random_ends()
    with pytest.raises(
        ValueError, match=r"patch: clean gives \(3, 4, 8\) at 'c' and patch \(3, 3, 8\), want the same shapes"
    ):
        attribution.patch(model, "c", random_sae("gated", 8, 32), clean, patch[:, :3], metric=identity)


def test_a_site_that_the_metric_does_not_depend_on_or_that_runs_twice_or_never(model):
    sae, (clean, _) = random_sae("gated", 8, 32), random_ends()

    class Aside(Chain):
        def forward(self, x):
            hidden = torch.tanh(self.a(x))
            self.c(hidden)
            return hidden.sum((1, 2))

    with pytest.raises(ValueError, match="carries no gradient back to the site 'c'"):
        attribution.patch(Aside(), "c", sae, clean, metric=identity)

    class Twice(Chain):
        def forward(self, x):
            hidden = torch.tanh(self.a(x))
            return (self.c(hidden) + self.c(2 * hidden)).sum((1, 2))

    with pytest.raises(ValueError, match="site: 'c' is reached 2 times"):
        attribution.patch(Twice(), "c", sae, clean, metric=identity)

    class Never(Chain):
        def forward(self, x):
            return torch.tanh(self.a(x)).sum((1, 2))

    with pytest.raises(ValueError, match="site: 'c' is not reached"):
        attribution.patch(Never(), "c", sae, clean, metric=identity)


def test_an_sae_whose_features_compete_has_no_path_of_its_own(model):
    clean, patch = random_ends()
    sae = sf.TopKSAE(8, 32, 4, dtype=torch.float64, seed=0)
    with pytest.raises(ValueError, match='vary: got "input" for a TopKSAE'):
        attribution.patch(model, "c", sae, clean, patch, metric=identity, vary="input")


def test_a_model_that_draws_lots_is_refused(model):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()
    model.tail.insert(0, nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"model: 'tail\.0' is a Dropout in training mode, want model\.eval\(\)"):
        attribution.patch(model, "c", sae, clean, patch, metric=identity)
    attribution.patch(model.eval(), "c", sae, clean, patch, metric=identity)


def test_a_model_that_draws_lots_unseen_is_refused(model):
    class Drawn(Chain):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends(8)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"model: got a metric of .* and then of .* on the same inputs"):
        attribution.patch(Drawn(), "c", sae, clean, patch, metric=identity)


def test_a_model_that_computes_without_gradients(model):
    sae, (clean, patch) = random_sae("gated", 8, 32), random_ends()

    class Quiet(Chain):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(ValueError, match="carries no gradient"):
        attribution.patch(Quiet(), "c", sae, clean, patch, metric=identity)


def test_the_benchmark_checks_both_formulations_against_each_other(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from benchmarks import attribution as benchmark

    out = tmp_path / "attribution.json"
    arguments = ["--quick", "--rounds", "1", "--out", str(out)]
    assert CliRunner().invoke(benchmark.app, arguments, catch_exceptions=False).exit_code == 0
    results = json.loads(out.read_text())["results"]
    assert [r["blocks"] for r in results] == [0, 1] and all(0 <= r["difference"] < 1e-5 for r in results)
    dense = benchmark.dense
    monkeypatch.setattr(benchmark, "dense", lambda *arguments: dense(*arguments) * 1.001)
    assert CliRunner().invoke(benchmark.app, arguments).exit_code == 1
