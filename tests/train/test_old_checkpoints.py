"""Checkpoints that earlier versions wrote: they load, and training goes on as it went on then.

Each folder of old_checkpoints/ is one, and its .resumed.safetensors what the version that wrote it made of x.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sae_fast as sf

HERE = Path(__file__).parent / "old_checkpoints"
TRAINERS = {
    "gated": (sf.GatedSAE, dict(eps=1e-3, grad_clip=0.5, lr_warmup_steps=4, l1_warmup_steps=8)),
    "gated_frozen": (sf.GatedSAE, dict(dialect="saelens", betas=(0.0, 0.999))),
    "relu": (sf.ReluSAE, dict(dialect="saelens", betas=(0.9, 0.99), lr_decay_start=8, total_steps=20)),
}
LAYERS = {"jumprelu": sf.JumpReluSAE, "topk": sf.TopKSAE, "batchtopk": sf.BatchTopKSAE}


def near(got, wanted, name):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, msg=lambda said: f"{name}: {said}")


@pytest.mark.parametrize("name", TRAINERS)
def test_an_old_training_resumes_as_it_went_on(name, isa):
    cls, settings = TRAINERS[name]
    trainer, then = sf.Trainer.load(HERE / name), load_file(HERE / f"{name}.resumed.safetensors")
    assert type(trainer.sae) is cls and trainer.step_count == 6 and trainer.sae.metadata["model_name"] == "tiny"
    assert {key: getattr(trainer.settings, key) for key in settings} == settings
    near(torch.stack([trainer.step(x).losses for x in then.pop("x")]), then.pop("losses"), "losses")
    for key, wanted in then.items():
        parameter, _, of_state = key.partition(".")
        parameter = trainer.sae.get_parameter(parameter)
        near(trainer.optimizer.state[parameter][of_state] if of_state else parameter.detach(), wanted, key)
    frozen = [key for key, parameter in trainer.sae.named_parameters() if not parameter.requires_grad]
    assert frozen == (["b_dec"] if name == "gated_frozen" else [])


@pytest.mark.parametrize("name", [*LAYERS, *TRAINERS])
def test_an_old_layer_is_the_same_function(name):
    sae, then = sf.load(HERE / name), load_file(HERE / f"{name}.resumed.safetensors")
    if name in LAYERS:
        assert type(sae) is LAYERS[name]
        near(sae.encode(then["x"]).detach(), then["f"], "f")
        near(sae(then["x"]).detach(), then["x_hat"], "x_hat")
    else:
        assert torch.equal(sae.W_enc, sf.Trainer.load(HERE / name).sae.W_enc)
