"""splice and fidelity: what the model goes on with, what gradients it sees, and what is said of what does not fit."""

from __future__ import annotations

import math

import pytest
import torch
from problems.analysis_models import Chain, random_ends, random_sae
from problems.tiny_models import tiny_model
from torch import nn
from torch.nn import functional as F

import sae_fast as sf
from sae_fast.analysis import ablate, fidelity, splice
from sae_fast.analysis.fidelity import logits_of


@pytest.fixture
def model():
    return Chain()


@pytest.fixture
def sae():
    return random_sae("gated", 8, 32)


def site_output(model, x):
    return model.c(torch.tanh(model.a(x)) * 2)


@pytest.mark.parametrize("error", ["keep", "recompute"])
def test_an_error_that_stays_changes_nothing(model, sae, error):
    x, _ = random_ends()
    with splice(model, "c", sae, error) as spliced:
        got = model(x)
    torch.testing.assert_close(got, model(x), rtol=1e-14, atol=1e-14)
    assert spliced.code.shape == (3, 4, 32)
    torch.testing.assert_close(spliced.x_hat, sae(site_output(model, x)))
    torch.testing.assert_close(spliced.residual, spliced.x - spliced.x_hat)


def test_recompute_is_the_identity_to_the_bit_in_value_and_gradient(model, sae):
    x, _ = random_ends()
    x.requires_grad_()
    (plain,) = torch.autograd.grad(model(x).sum(), x)
    with splice(model, "c", sae, "recompute"):
        value = model(x)
        (through,) = torch.autograd.grad(value.sum(), x)
    assert torch.equal(value, model(x))
    assert torch.equal(plain, through)


def test_drop_is_the_reconstruction(model, sae):
    x, _ = random_ends()
    with splice(model, "c", sae, "drop"):
        got = model(x)
    torch.testing.assert_close(got, model.tail(sae(site_output(model, x))).sum((1, 2)))


def test_keep_lets_gradients_through_the_code_alone(model, sae):
    x, _ = random_ends()
    x.requires_grad_()
    with splice(model, "c", sae, "keep"):
        (got,) = torch.autograd.grad(model(x).sum(), x)
    z = site_output(model, x)
    wanted_value = model.tail(sae(z) + (z - sae(z)).detach()).sum()
    torch.testing.assert_close(got, torch.autograd.grad(wanted_value, x)[0])


def test_a_held_error_stays_that_of_its_pass_until_released(model, sae):
    clean, other = random_ends()
    with splice(model, "c", sae) as spliced:
        model(clean)
        spliced.hold()
        got = model(other)
        spliced.release()
        released = model(other)
    z = site_output(model, clean)
    wanted = model.tail(sae(site_output(model, other)) + z - sae(z)).sum((1, 2))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(released, model(other))


@pytest.mark.parametrize("error", ["keep", "recompute"])
def test_ablation_takes_a_feature_out_and_leaves_the_error(model, sae, error):
    x, _ = random_ends()
    z = site_output(model, x)
    feature = int(sae.encode(z).sum((0, 1)).argmax())
    with splice(model, "c", sae, error, edit=ablate([feature])):
        got = model(x)
    f = sae.encode(z)
    wanted = model.tail(z - f[..., feature, None] * sae.W_dec[feature]).sum((1, 2))
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(got, model(x))


def test_an_edit_may_give_a_dense_code(model, sae):
    x, _ = random_ends()
    with splice(model, "c", sae, "drop", edit=lambda code: 2 * code.to_dense()):
        got = model(x)
    z = site_output(model, x)
    torch.testing.assert_close(got, model.tail(sae.decode(2 * sae.encode(z))).sum((1, 2)))


def test_where_takes_positions_and_leaves_the_others(model, sae):
    x, _ = random_ends()
    where = torch.tensor([True, False, True, True])
    with splice(model, "c", sae, "drop", where=where) as spliced:
        got = model(x)
    z = site_output(model, x)
    torch.testing.assert_close(got, model.tail(torch.where(where[:, None], sae(z), z)).sum((1, 2)))
    assert spliced.code.shape == (9, 32)


def test_the_input_of_a_module_is_a_site_and_blocks_nest_and_end(model, sae):
    x, _ = random_ends()
    other = random_sae("relu", 10, 24)
    with splice(model, "c:input", other, "drop"), splice(model, model.c, sae, "drop"):
        got = model(x)
    wanted = model.tail(sae(model.c(other(torch.tanh(model.a(x)) * 2)))).sum((1, 2))
    torch.testing.assert_close(got, wanted)
    assert not model.c._forward_hooks and not model.c._forward_pre_hooks


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_in_transformers_whatever_their_blocks_give(kind):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(transformers, kind)
    blocks = {"bert": "encoder.layer", "gpt2": "h", "llama": "layers"}[kind]
    ids = torch.arange(12).view(2, 6)
    sae = sf.GatedSAE(16, 40, seed=0)
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        with splice(model, f"{blocks}.1", sae, "keep") as at_output:
            kept = model(input_ids=ids).last_hidden_state
        with splice(model, f"{blocks}.2:input", sae, "drop") as at_input:
            model(input_ids=ids)
    torch.testing.assert_close(at_output.x, hidden)
    torch.testing.assert_close(at_input.x, hidden)
    torch.testing.assert_close(kept, model(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_what_the_sae_saw_is_kept_from_what_writes_in_place(model, sae):
    x, _ = random_ends()
    model.tail.insert(0, nn.ReLU(inplace=True))
    with splice(model, "c", sae, "recompute") as spliced:
        model(x)
    assert spliced.x.min() < 0
    torch.testing.assert_close(spliced.residual, spliced.x - spliced.x_hat)


def test_a_dict_that_comes_through_the_site_stays_the_callers(model):
    class Inner(nn.Module):
        def forward(self, batch):
            return batch["x"].sum()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, batch):
            return self.inner(batch)

    batch = {"x": torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).double()}
    before = batch["x"].clone()
    with splice(Outer(), "inner:input", random_sae("gated", 10, 20), "drop"):
        pass
    outer = Outer()
    with splice(outer, "inner:input", random_sae("gated", 10, 20), "drop"):
        changed = outer(batch)
    assert torch.equal(batch["x"], before) and changed != before.sum()


@pytest.mark.parametrize("features", [[3, 17], (3, 17), iter([3, 17]), torch.tensor([3, 17]), range(3, 18, 14)])
def test_ablate_takes_any_run_of_features_and_takes_it_more_than_once(model, sae, features):
    x, _ = random_ends()
    edit = ablate(features)
    f = sae.encode(site_output(model, x))
    wanted = f.clone()
    wanted[..., [3, 17]] = 0
    for _ in range(2):
        with splice(model, "c", sae, "drop", edit=lambda code: edit(code)):
            got = model(x)
        torch.testing.assert_close(got, model.tail(sae.decode(wanted)).sum((1, 2)))


# ---- What does not fit ----------------------------------------------------------------------------------------------


def test_a_site_that_does_not_exist_lists_the_near_names(model, sae):
    with (
        pytest.raises(ValueError, match=r"site: the model has no module 'tial\.1'; near names: .*tail\.1"),
        splice(model, "tial.1", sae),
    ):
        pass
    with pytest.raises(ValueError, match="site: got 'c:outputs'"), splice(model, "c:outputs", sae):
        pass
    with (
        pytest.raises(ValueError, match="site: got a Linear that is not in the model"),
        splice(model, nn.Linear(1, 1), sae),
    ):
        pass
    with pytest.raises(ValueError, match="site: got int"), splice(model, 3, sae):
        pass


def test_bad_arguments_of_splice(model, sae):
    x, _ = random_ends()
    with pytest.raises(ValueError, match="error: got 'kept'"), splice(model, "c", sae, "kept"):
        pass
    with (
        pytest.raises(ValueError, match=r"sae: its d_in is 8, want 10: the site gives \(3, 4, 10\)"),
        splice(model, "a", sae),
    ):
        model(x)
    with pytest.raises(ValueError, match="features: got 32, want 0 to 31"), splice(model, "c", sae, edit=ablate([32])):
        model(x)
    with pytest.raises(ValueError, match="f: got"), splice(model, "c", sae, edit=lambda code: code.to_dense()[..., :-1]):
        model(x)
    with (
        pytest.raises(ValueError, match="edit: got a code of shape"),
        splice(model, "c", sae, edit=lambda code: code.to_dense()[:1]),
    ):
        model(x)
    with pytest.raises(ValueError, match=r"where: got shape \(5,\)"), splice(model, "c", sae, where=torch.ones(5) > 0):
        model(x)
    with pytest.raises(ValueError, match=r"where: got torch.float32"), splice(model, "c", sae, where=torch.ones(4)):
        model(x)
    with splice(model, "c", sae) as spliced:
        with pytest.raises(ValueError, match=r"hold: got .* no pass yet"):
            spliced.hold()
        model(x)
        spliced.hold()
        with pytest.raises(ValueError, match="the shape of the error that is held"):
            model(x[:2])


def test_a_site_that_never_runs_is_no_silent_nothing(model, sae):
    x, _ = random_ends()
    model.blocks, model.aside = nn.ModuleList([nn.Identity()]), nn.Linear(8, 8)
    with (
        pytest.raises(ValueError, match=r"'blocks' is a list of modules, .* want one of them: blocks\.0"),
        splice(model, "blocks", sae),
    ):
        pass
    with pytest.raises(ValueError, match="site: 'aside' is not reached"), splice(model, "aside", sae):
        model(x)
    with splice(model, "aside", sae):
        pass  # nothing ran: nothing to say
    with pytest.raises(ValueError, match="near names: a, c"), splice(model, "", sae):
        pass
    with pytest.raises(ValueError, match="sae: got a Linear, want one of sae_fast's"), splice(model, "c", model.a):
        pass
    for features, message in ((3, "features: got 3, want a list"), ([-1], "features: got -1, want 0 to 31")):
        with pytest.raises(ValueError, match=message), splice(model, "c", sae, edit=ablate(features)):
            model(x)


def test_a_module_that_gives_no_activations(sae):
    class Say(nn.Module):
        def forward(self, x):
            return ["a", "b"]

    words = nn.Sequential(Say())
    with pytest.raises(ValueError, match="site: '0' gives a str, want activations"), splice(words, "0", sae):
        words(torch.zeros(2, 3))


# ---- fidelity -------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """Ids [N, T] → logits [N, T, 11], by way of a site of width 8."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.site, self.head = nn.Embedding(11, 8), nn.Identity(), nn.Linear(8, 11)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.site(self.embedding(input_ids)))


def test_fidelity_is_what_its_formula_says_over_batches_of_unequal_size():
    model, sae = Words(), sf.ReluSAE(8, 24, seed=0)
    ids = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(0))
    got = fidelity(model, "site", sae, [ids[:2], ids[2:]])
    with torch.no_grad():
        x = model.embedding(ids)
        logits = [model.head(rows) for rows in (x, sae(x), 0 * x)]
        clean, spliced, zero = (F.cross_entropy(each[:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1)) for each in logits)
        p, q = (each.log_softmax(-1) for each in logits[:2])
    assert got.predictions == 30
    assert got.clean == pytest.approx(float(clean), rel=1e-6)
    assert got.spliced == pytest.approx(float(spliced), rel=1e-6)
    assert got.zero == pytest.approx(float(zero), rel=1e-6)
    assert got.loss_recovered == pytest.approx(float(1 - (spliced - clean) / (zero - clean)), rel=1e-4)
    assert got.kl == pytest.approx(float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()), rel=1e-4)


def test_fidelity_leaves_padding_out():
    model, sae = Words(), sf.ReluSAE(8, 24, seed=0)
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    whole, short = {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, :4]}
    padded, cut = (fidelity(model, "site", sae, [batch]) for batch in (whole, short))
    assert padded.predictions == cut.predictions == 12
    assert padded == pytest.approx(cut, rel=1e-6)


def test_fidelity_takes_a_mask_for_each_batch():
    model, sae = Words(), sf.ReluSAE(8, 24, seed=0)
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    parts = [ids[:2], ids[2:, :4]]
    got = fidelity(model, "site", sae, parts, where=lambda batch: torch.arange(batch.shape[1]) > 0)
    each = [fidelity(model, "site", sae, [b], where=torch.arange(b.shape[1]) > 0) for b in parts]
    assert got.zero == pytest.approx((10 * each[0].zero + 6 * each[1].zero) / 16, rel=1e-6)
    assert got.zero != pytest.approx(fidelity(model, "site", sae, parts).zero, rel=1e-3)


def test_fidelity_predicts_nothing_from_padding_on_the_left():
    model, sae = Words(), sf.ReluSAE(8, 24, seed=0)
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    padded = fidelity(model, "site", sae, [{"input_ids": ids, "attention_mask": mask}])
    cut = fidelity(model, "site", sae, [{"input_ids": ids[:, 2:]}])
    assert padded.predictions == cut.predictions == 12
    assert padded == pytest.approx(cut, rel=1e-6)


def test_fidelity_of_impossible_tokens_and_of_models_that_draw_lots():
    model, sae = Words(), sf.ReluSAE(8, 24, seed=0)
    ids = torch.randint(10, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.bias[10] = -torch.inf
    assert math.isfinite(fidelity(model, "site", sae, [ids]).kl)
    model.drop = nn.Dropout(0.5)
    with pytest.raises(ValueError, match="model: 'drop' is a Dropout in training mode"):
        fidelity(model, "site", sae, [ids])


def test_fidelity_of_a_perfect_sae_and_of_none():
    model, ids = Words(), torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    perfect = sf.ReluSAE(8, 16)
    with torch.no_grad():
        perfect.W_enc.copy_(torch.cat([torch.eye(8), -torch.eye(8)]))
        perfect.W_dec.copy_(perfect.W_enc)
    best = fidelity(model, "site", perfect, [ids])
    assert best.loss_recovered == pytest.approx(1) and best.kl == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        perfect.b_enc.fill_(-1e6)
    assert fidelity(model, "site", perfect, [ids]).loss_recovered == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        model.head.weight.zero_()
    assert math.isnan(fidelity(model, "site", perfect, [ids]).loss_recovered)


def test_bad_arguments_of_fidelity():
    model, sae = Words(), sf.ReluSAE(8, 24, seed=0)
    ids = torch.zeros(2, 3, dtype=torch.long)
    for batches in (ids, {"input_ids": ids}, "text"):
        with pytest.raises(ValueError, match=r"batches: got a \w+, want a list of batches"):
            fidelity(model, "site", sae, batches)
    with pytest.raises(ValueError, match="inputs: got text"):
        fidelity(model, "site", sae, [["some", "text"]])
    with pytest.raises(ValueError, match="batches: got none"):
        fidelity(model, "site", sae, [])
    with pytest.raises(ValueError, match=r"loss: got shape \(\), want \[n\]"):
        fidelity(model, "site", sae, [ids], loss=lambda output, batch: output.mean())
    with pytest.raises(ValueError, match="logits: got a dict"):
        fidelity(model, "site", sae, [ids], loss=lambda o, b: o.mean((1, 2)), logits=lambda o: logits_of({}))
