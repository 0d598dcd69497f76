"""SHIFT: effects by hand, what a judge may say, ablation against its definition, the head, and what is refused."""

import pytest
import torch
from problems.analysis_models import random_sae
from problems.page_data import small_store
from torch import nn

import sae_fast as sf
from sae_fast.analysis import attribution, shift
from sae_fast.analysis.marks import Marks
from sae_fast.analysis.shift import Candidate, Probe, Shift, accuracies, fit_head
from sae_fast.nn.identity import fingerprint


class Net(nn.Module):
    """x [N, T, 6] → a [N, T, 8] → b [N, T, 8]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
        self.double()

    def forward(self, x):
        return torch.tanh(self.b(torch.tanh(self.a(x))))


def margin(logits):
    return logits[:, 1] - logits[:, 0]


@pytest.fixture
def probe():
    probe = Probe(Net(), "b", 8).double()
    with torch.no_grad():
        probe.head.weight.copy_(torch.randn(2, 8, generator=torch.Generator().manual_seed(1)))
    return probe


@pytest.fixture
def saes():
    return {"model.a": random_sae("gated", 8, 24, 1), "model.b": random_sae("relu", 8, 24, 2)}


@pytest.fixture
def x():
    return torch.randn(12, 5, 6, generator=torch.Generator().manual_seed(2)).double()


def test_effects_are_means_over_the_examples_of_all_batches(probe, saes, x):
    work = Shift(probe, saes)
    found = work.effects([x[:4], x[4:]], margin, steps=4)
    for site, sae in saes.items():
        wanted = attribution.patch(probe, site, sae, x, metric=margin, steps=4).by_feature() / 12
        assert torch.allclose(found[site], wanted, rtol=1e-10, atol=1e-12)
    # At the probe's own site nothing is nonlinear: an effect is what the feature adds to the margin.
    sae = saes["model.b"]
    added = sae.encode(probe.model.b(torch.tanh(probe.model.a(x)))).mean((0, 1)) * (
        sae.W_dec @ (probe.head.weight[1] - probe.head.weight[0])
    )
    assert torch.allclose(found["model.b"], -added, atol=1e-10)


def test_candidates_are_those_above_the_threshold_the_strongest_first(probe, saes, x):
    work = Shift(probe, saes)
    effects = work.effects([x], margin)
    found = work.candidates([x], margin, threshold=0.02)
    wanted = {(site, i) for site, e in effects.items() for i in range(24) if abs(float(e[i])) > 0.02}
    assert {(c.site, c.feature) for c in found} == wanted and 0 < len(wanted) < 48
    sizes = [abs(c.effect) for c in found]
    assert sizes == sorted(sizes, reverse=True)
    assert work.candidates([x], margin, top=5) == found[:5]


def test_a_judge_is_shown_site_feature_effect_and_contexts(probe, saes, x):
    work, asked = Shift(probe, saes), []
    found = work.candidates([x], margin, top=6)

    def judge(candidate):
        asked.append(candidate)
        return "irrelevant" if candidate.effect > 0 else None if candidate.site == "model.a" else "relevant"

    class Store:
        def top(self, feature, k):
            return [("text", feature)] * k

    off = work.judge(found, judge, contexts={"model.a": Store(), "model.b": lambda feature: f"of {feature}"}, k=3)
    for c in asked:
        assert c.contexts == ([("text", c.feature)] * 3 if c.site == "model.a" else f"of {c.feature}")
    assert [(c.site, c.feature, c.effect) for c in asked] == [(c.site, c.feature, c.effect) for c in found]
    assert off == {site: sorted(c.feature for c in found if c.site == site and c.effect > 0) for site in saes}


def test_a_store_of_another_sae_is_refused_before_the_judge_is_asked(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("duckdb")
    sae, store = small_store(tmp_path / "store")
    found = [Candidate("0", 3, 1.0)]
    seen = []
    work = Shift(nn.Sequential(nn.Identity()), {"0": sae})
    assert work.judge(found, lambda c: seen.append(c) or "irrelevant", contexts={"0": store}, k=2) == {"0": [3]}
    assert [c.token for c in seen[0].contexts] == [c.token for c in store.top(3, 2)]
    other = sf.GatedSAE(8, 60, seed=5)
    message = rf"contexts: got .*{store.info['sae']}, for site '0', want .*{fingerprint(other)}"
    with pytest.raises(ValueError, match=message):
        Shift(nn.Sequential(nn.Identity()), {"0": other}).judge(found, seen.append, contexts={"0": store})
    assert len(seen) == 1


def test_marks_of_each_sae_are_a_judge_as_objects_or_files(probe, saes, x, tmp_path):
    work, (a, b) = Shift(probe, saes), saes.values()
    file = Marks.of(a, {3: "irrelevant", 7: "relevant", 1: "irrelevant"}).write(tmp_path / "a.json")
    of_b = Marks.of(b, {0: "irrelevant"})
    assert work.judge([], {"model.a": file, "model.b": of_b}) == {"model.a": [1, 3], "model.b": [0]}
    assert work.judge([], {"model.a": str(file)}) == {"model.a": [1, 3], "model.b": []}
    assert Shift(probe, {"model.a": a}).judge([], file) == {"model.a": [1, 3]}
    with pytest.raises(ValueError, match=r"want \{site: marks\}"):
        work.judge([], file)
    with pytest.raises(ValueError, match=r"a\.json: got marks of SAE .* they are another's"):
        work.judge([], {"model.b": file})
    with pytest.raises(ValueError, match=r"got site 'model.c', want one of 'model.a', 'model.b'"):
        work.judge([], {"model.c": file})


def test_ablated_features_leave_and_the_error_stays(probe, saes, x):
    work, off = Shift(probe, saes), {"model.a": [1, 4, 9], "model.b": [2, 5]}
    whole = probe(x)
    with torch.no_grad(), work.ablated(off):
        got = probe(x)
    with torch.no_grad():
        h = probe.model.a(x)
        h = h - saes["model.a"].encode(h)[..., off["model.a"]] @ saes["model.a"].W_dec[off["model.a"]]
        h = probe.model.b(torch.tanh(h))
        h = h - saes["model.b"].encode(h)[..., off["model.b"]] @ saes["model.b"].W_dec[off["model.b"]]
    assert torch.allclose(got, probe.head(h.mean(1)), atol=1e-10)
    assert not torch.allclose(got, whole) and torch.equal(probe(x), whole)
    with torch.no_grad(), work.ablated({"model.a": [], "model.b": []}):
        assert torch.equal(probe(x), whole)


def test_positions_that_where_leaves_out_keep_their_features(probe, saes, x):
    where = torch.tensor([False, True, True, True, True])
    off = {"model.b": list(range(24))}
    with torch.no_grad(), Shift(probe, saes, where).ablated(off):
        got = probe(x)
    with torch.no_grad():
        h, sae = probe.model.b(torch.tanh(probe.model.a(x))), saes["model.b"]
        h[:, 1:] -= sae.encode(h[:, 1:]) @ sae.W_dec
    assert torch.allclose(got, probe.head(h.mean(1)), atol=1e-10)


def test_the_head_is_the_minimum_of_logistic_regression(x):
    net = nn.Sequential(nn.Linear(6, 3)).double()
    rows, labels = x[:, 0] * torch.tensor([1, 10, 1, 1, 0.1, 1]), torch.arange(12) % 3
    head = fit_head(net, "0", [rows[:5], rows[5:]], labels, weight_decay=0.01)
    assert head is net[0]
    spread = rows.std()
    loss = nn.functional.cross_entropy(net(rows), labels) + 0.01 * (head.weight * spread).square().sum() / 2
    for gradient in torch.autograd.grad(loss, [head.weight, head.bias]):
        assert gradient.abs().max() < 1e-5
    before = head.weight.clone()
    fit_head(net, net[0], [rows], labels, weight_decay=0.01)
    assert torch.allclose(head.weight, before, atol=1e-6), "where it begins does not matter"


def test_shift_on_a_planted_direction_makes_a_probe_right_where_it_was_wrong():
    """Two directions: the task's, weak, and a strong one that agrees with it in training only."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2

    def texts(attribute):
        out = 0.05 * torch.randn(400, 3, 4, generator=random)
        out[:, :, 0] += labels[:, None]
        out[:, :, 1] += 3 * attribute[:, None]
        return out

    sae = sf.ReluSAE(4, 4, seed=0)
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(torch.eye(4))
        sae.b_enc.fill_(-0.3)
    probe = Probe(nn.Sequential(nn.Identity()), "0", 4)
    train, attribute = texts(labels), torch.randint(2, (400,), generator=random)
    test = texts(attribute)
    fit_head(probe, "head", [train], labels)
    before = accuracies(probe(test), labels, attribute)
    work = Shift(probe, {"model.0": sae})
    found = work.candidates([train], margin, threshold=0.1)
    assert {c.feature for c in found} == {0, 1}
    off = work.judge(found, lambda c: "irrelevant" if c.feature == 1 else "relevant")
    with torch.no_grad(), work.ablated(off):
        fit_head(probe, "head", [train], labels)
        after = accuracies(probe(test), labels, attribute)
    assert before.spurious > 0.95 and before.worst_group < 0.1
    assert after.task > 0.95 and after.worst_group > 0.9 and abs(after.spurious - 0.5) < 0.1


def test_accuracies_by_hand():
    predicted = torch.tensor([0, 0, 1, 1, 1, 0])
    got = accuracies(
        nn.functional.one_hot(predicted).double(), torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 0, 0])
    )
    assert (got.task, got.spurious, got.worst_group) == (pytest.approx(4 / 6), pytest.approx(5 / 6), 0.0)


def test_a_probe_runs_the_model_to_its_site_only_and_pools_as_told(x):
    net = Net()
    net.b.forward = None  # not reached
    probe = Probe(net, "a", 8, classes=3, pool=lambda h, x: h[:, -1] * x[0, 0, 0]).double()
    assert torch.equal(probe(x), probe.head(net.a(x)[:, -1] * x[0, 0, 0]))
    assert not any(p.requires_grad for p in net.parameters()) and probe.head.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold: got -0.1, want a number ≥ 0"),
        ({"threshold": float("nan")}, "threshold: got nan"),
        ({"threshold": "0.1"}, "threshold: got '0.1'"),
        ({"top": 0}, "top: got 0"),
        ({}, "want one of the two"),
        ({"top": 3, "threshold": 0.1}, "want one of the two"),
    ],
)
def test_what_candidates_refuses(probe, saes, x, options, message):
    with pytest.raises(ValueError, match=message):
        Shift(probe, saes).candidates([x], margin, **options)


def test_nothing_judged_is_an_error(probe, saes, x, tmp_path):
    work = Shift(probe, saes)
    with pytest.raises(ValueError, match="nothing is judged: got an opinion on none of 0"):
        work.judge([], lambda _: "irrelevant")
    with pytest.raises(ValueError, match="nothing is judged: got an opinion on none of 1"):
        work.judge([Candidate("model.a", 0, 1.0)], lambda _: None)
    with pytest.raises(ValueError, match="nothing is judged: got marks without a single feature"):
        work.judge([], {"model.a": Marks.of(saes["model.a"], {})})
    assert work.judge([Candidate("model.a", 0, 1.0)], lambda _: "relevant") == {"model.a": [], "model.b": []}
    with pytest.raises(ValueError, match=r"it says True for feature 0 of 'model.a'"):
        work.judge([Candidate("model.a", 0, 1.0)], lambda _: True)


def test_sites_and_features_that_do_not_exist_are_errors(probe, saes, x):
    with pytest.raises(ValueError, match=r"no module 'model.aa'; near names: .*model\.a"):
        Shift(probe, {"model.aa": saes["model.a"]})
    with pytest.raises(ValueError, match=r"no module 'c'; near names"):
        Probe(Net(), "c", 8)
    with pytest.raises(ValueError, match="saes: got"):
        Shift(probe, {})
    work = Shift(probe, saes)
    with pytest.raises(ValueError, match=r"got site 'model.c', want one of"), work.ablated({"model.c": [1]}):
        pass
    with pytest.raises(ValueError, match="got 24, want 0 to 23"), work.ablated({"model.a": [24]}):
        pass
    with pytest.raises(ValueError, match=r"got site 'b', want one of"):
        work.judge([Candidate("b", 0, 1.0)], lambda _: "relevant")
    with pytest.raises(ValueError, match="want a list of inputs"):
        work.effects(x, margin)
    with pytest.raises(ValueError, match="a number for each"):
        work.effects([x], torch.sum)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(12, dtype=torch.long), r"got only class \[1\].*a probe on one class learns nothing"),
        (torch.zeros(0, dtype=torch.long), r"got only class \[\]"),
        (torch.arange(12) % 3, "got classes 0 to 2, want 0 to 1"),
        (torch.arange(11) % 2, "a row for each of the labels"),
        (torch.zeros(12), "labels: got torch.float32"),
        ([0, 1], "labels: got list"),
    ],
)
def test_labels_a_head_cannot_learn_from(probe, x, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_head(probe, "head", [x], labels)


def test_a_head_that_is_none(probe, x):
    labels = torch.arange(12) % 2
    with pytest.raises(ValueError, match=r"no module 'haed'; near names: .*head"):
        fit_head(probe, "haed", [x], labels)
    with pytest.raises(ValueError, match=r"head: got a Net, want an nn.Linear"):
        fit_head(probe, "model", [x], labels)
    with pytest.raises(ValueError, match=r"head: it is given \(12, 5, 6\)"):
        fit_head(probe, "model.a", [x], labels)


@pytest.mark.parametrize("what", ["NaN", "no bias", "too large for float16"])
def test_a_head_that_cannot_be_fitted_is_left_as_it_was(what):
    labels, x = torch.arange(12) % 2, torch.randn(12, 6, generator=torch.Generator().manual_seed(3))
    head, error, message = nn.Linear(6, 2), ValueError, "in 2 rows, the first is row 7"
    if what == "NaN":
        x[7, 2], x[9, 0] = float("nan"), float("inf")
    elif what == "no bias":
        head, message = nn.Linear(6, 2, bias=False), "head: got an nn.Linear without bias"
    else:  # the labels are far apart in units of the spread, and the W that parts them is beyond float16
        x = ((labels * 2 - 1)[:, None] * 1e-6).expand(12, 6).half()
        head, error, message = head.half(), FloatingPointError, "not finite in torch.float16"
    before = head.weight.detach().clone()
    with pytest.raises(error, match=message):
        fit_head(nn.Sequential(head), "0", [x[:5], x[5:]], labels)
    assert torch.equal(head.weight, before)


def test_candidates_without_a_threshold_are_all_with_an_effect():
    found = shift.strongest({"a": torch.tensor([0.0, -2.0, 1.0]), "b": torch.tensor([3.0, 0.0])})
    assert [(c.site, c.feature, c.effect) for c in found] == [("b", 0, 3.0), ("a", 1, -2.0), ("a", 2, 1.0)]
