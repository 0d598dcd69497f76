"""Goodfire's files, whose names say model and layer: ``Llama-3.1-8B-Instruct-SAE-l19.pth``.  ReLU, b_dec not subtracted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sae_fast import nn
from sae_fast.interop._files import Tensors, read_state_dict
from sae_fast.interop.formats._common import Loaded, biases, build, named_after_model, the_weights, weights_in

NAME, ORDER, SIGN = "goodfire", 13, "Llama-…-SAE-l19.pth (Goodfire)"
FILES, BESIDE, OPTIONS = ("Llama-*-SAE-l*.pth", "Llama-*-SAE-l*.pt"), (), ()


def finds(path: Path) -> bool:
    return bool(weights_in(path, FILES))


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return any(name.startswith(("encoder_linear.", "decoder_linear.")) for name in shapes)


def read(path: Path) -> Loaded:
    file = the_weights(path, FILES)
    tensors = Tensors(file, read_state_dict(file))
    b_enc, b_dec = biases(tensors, "encoder_linear.bias", "decoder_linear.bias")
    F, d = len(b_enc), len(b_dec)
    W_enc, W_dec = tensors.take("encoder_linear.weight", F, d), tensors.take("decoder_linear.weight", d, F).T
    tensors.finish()
    values = dict(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)
    sae = build(nn.ReluSAE, file, values, apply_b_dec_to_input=False)
    named_after_model(sae, file, "meta-llama")
    return Loaded(sae)
