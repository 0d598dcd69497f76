"""TransformerLens' names of the places in a transformer, as the names of `transformers`' modules.

A block of the GPT kind normalises what it reads, one of the BERT kind what it gives: there `hook_resid_post` comes before
the norm, and `hook_normalized_resid_post` is what the block gives.  Gemma's since 2, and OLMo's, also normalise what
attention and MLP add to the stream, of which the hooks see that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

NAME = re.compile(r"blocks\.(\d+)\.((?:attn|mlp)\.)?hook_\w+|ln_final\.hook_\w+|hook_(pos_)?embed")
ATTENTION, MLP = ("attn", "self_attn", "attention", "self_attention"), ("mlp", "feed_forward", "ffn")
PROJECTION = ("c_proj", "o_proj", "out_proj", "dense", "down_proj", "dense_4h_to_h", "fc2", "fc_out")
FINAL, POSITIONS = ("ln_f", "norm", "final_layer_norm", "final_layernorm", "final_norm"), ("wpe", "position_embeddings")
BERT, GPT, GEMMA = (  # what TransformerLens calls it → where it is in a block, the first of these that is there
    {
        "hook_resid_pre": (":input",),
        "hook_attn_out": ("attention.output.dense",),
        "attn.hook_z": ("attention.output.dense:input",),
        "hook_resid_mid": ("attention.output.LayerNorm:input",),
        "mlp.hook_post": ("output.dense:input",),
        "hook_mlp_out": ("output.dense",),
        "hook_resid_post": ("output.LayerNorm:input",),
        "hook_normalized_resid_post": ("",),
    },
    {
        "hook_resid_pre": (":input",),
        "hook_attn_out": ATTENTION,
        "attn.hook_z": tuple(f"{attention}.{last}:input" for attention in ATTENTION for last in PROJECTION),
        "hook_resid_mid": ("ln_2:input", "post_attention_layernorm:input"),
        "mlp.hook_post": tuple(f"{mlp}.{last}:input" for mlp in MLP for last in PROJECTION),
        "hook_mlp_out": MLP,
        "hook_resid_post": ("",),
    },
    {
        "hook_attn_out": ("post_attention_layernorm",),
        "hook_resid_mid": ("pre_feedforward_layernorm:input", *(f"{mlp}:input" for mlp in MLP)),
        "hook_mlp_out": ("post_feedforward_layernorm",),
    },
)


def blocks(model: nn.Module) -> list[str]:
    """The names of a transformer's blocks, in order; none where they are not in one list, or it is no transformer."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text_config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{name}.{i}" for i in range(count)]
    return []


def normalises_output(block: nn.Module) -> bool:
    """True for a block of the BERT kind."""
    return not {"output.LayerNorm", "output_layer_norm"}.isdisjoint(dict(block.named_modules()))


def site_of(model: nn.Module, name: str) -> str | None:
    """The site that TransformerLens calls by this name: "h.1" of "blocks.1.hook_resid_post", "h.1:input" of
    "blocks.1.hook_resid_pre".  None for what is no such name, or where the model is no transformer; ValueError for a
    place that the model has no module for."""
    found, names = NAME.fullmatch(name), blocks(model)
    if found is None or not names:
        return None
    modules = dict(model.named_modules())
    if found[1] is not None:
        if int(found[1]) >= len(names):
            raise ValueError(f"site: got {name!r}, want one of {len(names)} blocks, counted from 0")
        block = names[int(found[1])]
        kinds = BERT if normalises_output(modules[block]) else GPT
        if f"{block}.post_feedforward_layernorm" in modules:
            kinds = GPT | GEMMA
        parallel = any(getattr(model.config, said, False) for said in ("use_parallel_residual", "parallel_attn"))
        place = name.removeprefix(f"blocks.{found[1]}.")
        ends: Iterable[str] = () if parallel and place == "hook_resid_mid" else kinds.get(place, ())
        places = [block + (end if end[:1] in ("", ":") else f".{end}") for end in ends]
    elif name == "hook_embed":
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        places = [found for found, module in modules.items() if module is embedding]
    elif name in ("hook_pos_embed", "ln_final.hook_normalized"):
        ends = POSITIONS if name == "hook_pos_embed" else FINAL
        outside = [m for m in modules if not any(m.startswith(f"{block}.") for block in names)]
        places = [m for end in ends for m in outside if m.rpartition(".")[2] == end]
    else:
        places = []
    for place in places:
        if place.partition(":")[0] in modules:
            return place
    raise ValueError(
        f"site: this {type(model).__name__} has no module known to give TransformerLens' {name!r}; name a module"
    )
