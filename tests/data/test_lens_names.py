"""TransformerLens' names of places in a transformer, translated to those of `transformers`' modules."""

from __future__ import annotations

import pytest
import torch
from problems.tiny_models import tiny_model
from torch import nn

import sae_fast as sf
from sae_fast.data import sites

PLACES = {
    "gpt2": {
        "hook_embed": "wte",
        "hook_pos_embed": "wpe",
        "blocks.0.hook_resid_pre": "h.0:input",
        "blocks.1.hook_attn_out": "h.1.attn",
        "blocks.1.attn.hook_z": "h.1.attn.c_proj:input",
        "blocks.1.hook_resid_mid": "h.1.ln_2:input",
        "blocks.1.mlp.hook_post": "h.1.mlp.c_proj:input",
        "blocks.1.hook_mlp_out": "h.1.mlp",
        "blocks.2.hook_resid_post": "h.2",
        "ln_final.hook_normalized": "ln_f",
    },
    "llama": {
        "hook_embed": "embed_tokens",
        "blocks.1.hook_attn_out": "layers.1.self_attn",
        "blocks.1.attn.hook_z": "layers.1.self_attn.o_proj:input",
        "blocks.1.hook_resid_mid": "layers.1.post_attention_layernorm:input",
        "blocks.1.mlp.hook_post": "layers.1.mlp.down_proj:input",
        "ln_final.hook_normalized": "norm",
    },
    "gpt_neox": {
        "blocks.1.attn.hook_z": "layers.1.attention.dense:input",
        "blocks.1.mlp.hook_post": "layers.1.mlp.dense_4h_to_h:input",
        "ln_final.hook_normalized": "final_layer_norm",
        "blocks.1.hook_resid_mid": None,  # attention and MLP are parallel
    },
    "bert": {
        "hook_embed": "embeddings.word_embeddings",
        "hook_pos_embed": "embeddings.position_embeddings",
        "blocks.1.hook_attn_out": "encoder.layer.1.attention.output.dense",
        "blocks.1.hook_resid_mid": "encoder.layer.1.attention.output.LayerNorm:input",
        "blocks.1.hook_resid_post": "encoder.layer.1.output.LayerNorm:input",
        "blocks.1.hook_normalized_resid_post": "encoder.layer.1",
        "ln_final.hook_normalized": None,
        "blocks.1.attn.hook_pattern": None,
    },
}


@pytest.mark.parametrize("kind", PLACES)
def test_names_of_transformer_lens_are_those_of_modules(kind):
    model = tiny_model(pytest.importorskip("transformers"), kind)
    for name, site in PLACES[kind].items():
        if site is None:
            with pytest.raises(ValueError, match=f"site: this .* has no module known to give TransformerLens' '{name}'"):
                sites.find(model, name)
        else:
            found = sites.find(model, name)
            assert (found.name, found.at_input) == (site.removesuffix(":input"), ":" in site), name


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma2", "gemma3", "olmo2"])
def test_the_stream_adds_up_at_the_sites_that_are_found(kind):
    """resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out: under a head, too."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(tiny_model(transformers, kind).config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(0)))  # norms with weights of their own
    ids = torch.arange(12).view(2, 6)
    at = {
        name: sites.read(model, sites.find(model, f"blocks.1.hook_{name}"), {"input_ids": ids})[0]
        for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    }
    torch.testing.assert_close(at["resid_pre"] + at["attn_out"], at["resid_mid"])
    torch.testing.assert_close(at["resid_mid"] + at["mlp_out"], at["resid_post"])


def test_every_analysis_takes_such_a_name():
    transformers = pytest.importorskip("transformers")
    model, ids = tiny_model(transformers, "gpt2"), {"input_ids": torch.arange(12).view(2, 6)}
    sae, names = sf.GatedSAE(16, 24, seed=0), ("blocks.1.hook_resid_post", "h.1")

    def metric(output):
        return output.last_hidden_state.sum()

    for of in (
        lambda name: _spliced(model, name, sae, ids),
        lambda name: sf.analysis.attribution.patch(model, name, sae, ids, metric=metric).effects,
    ):
        theirs, ours = map(of, names)
        assert theirs.any() and torch.equal(theirs, ours)


def _spliced(model, name, sae, ids):
    with sf.analysis.splice(model, name, sae, error="drop"), torch.no_grad():
        return model(**ids).last_hidden_state


def test_a_block_that_is_not_there_and_a_model_that_is_no_transformer():
    model = tiny_model(pytest.importorskip("transformers"), "gpt2")
    with pytest.raises(ValueError, match=r"got 'blocks\.3\.hook_resid_post', want one of 3 blocks, counted from 0"):
        sites.find(model, "blocks.3.hook_resid_post")
    with pytest.raises(ValueError, match="the model has no module"):
        sites.find(nn.Sequential(nn.Linear(2, 2)), "blocks.0.hook_resid_post")
