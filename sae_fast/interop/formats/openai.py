"""OpenAI's GPT-2 SAEs (arXiv 2406.04093), ``autoencoders/6.pt``: a state_dict that names its activation, and that one's k.

Whatever has TopK takes a layer norm's output; see the package's ``Autoencoder.from_state_dict``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_fast import nn
from sae_fast.files import key
from sae_fast.interop._files import Tensors, read_state_dict
from sae_fast.interop.formats._common import Loaded, build, mapping, place_of
from sae_fast.nn.normalize import LayerNorm

NAME, ORDER, SIGN = "openai", 15, ""
FILES, BESIDE, OPTIONS = (), (), ()  # its weights may have any name
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


def finds(path: Path) -> bool:
    return False  # by names it is any .pt file


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return "pre_bias" in shapes or "latent_bias" in shapes


def read(path: Path) -> Loaded:
    state = read_state_dict(path)
    activation, options = state.pop("activation", "ReLU"), mapping(state.pop("activation_state_dict", {}))
    tensors = Tensors(path, state)
    b_dec, b_enc = tensors.take("pre_bias", None), tensors.take("latent_bias", None)
    F, d = len(b_enc), len(b_dec)
    W_enc = tensors.take("encoder.weight", F, d)
    tied = "decoder.linear.weight" in tensors  # of TiedTranspose
    W_dec = tensors.take("decoder.linear.weight", F, d) if tied else tensors.take("decoder.weight", d, F).T
    for name in STATISTICS:
        if name in tensors:
            tensors.take(name, F)
    tensors.finish()
    cls, given = _layer(activation, options, path)
    sae = build(cls, path, dict(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec), **given)
    if found := re.search(rf"gpt2-small/({'|'.join(HOOKS)})\w*/autoencoders/(\d+)\.pt$", place_of(path)):
        layer = int(found.group(2))
        sae.metadata |= {"model_name": "gpt2-small", "layer": layer, "hook_name": f"blocks.{layer}.{HOOKS[found.group(1)]}"}
    return Loaded(sae)


def _layer(activation: Any, options: Any, file: Path) -> tuple[type[nn.SparseAutoencoder], dict[str, Any]]:
    """The layer of an activation, and its options."""
    if activation == "ReLU":
        return nn.ReluSAE, {}
    if activation == "TopK":
        k, after = key(options, file, int, "k"), key(options, file, str, "postact_fn")
        if after not in ("ReLU", "Identity"):
            raise ValueError(f"{file}: postact_fn: got {after!r}, want 'ReLU' or 'Identity'")
        return nn.TopKSAE, {"k": k, "normalize": LayerNorm(), "largest": "positive" if after == "ReLU" else "any"}
    if activation == "Identity":
        raise ValueError(f"{file}: activation: got 'Identity': every feature is active, and a layer here is sparse")
    raise ValueError(f"{file}: activation: got {activation!r}, want 'ReLU', 'TopK' or 'Identity'")
