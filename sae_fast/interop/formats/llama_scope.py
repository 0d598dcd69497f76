"""Llama Scope's folders (arXiv 2410.20526): ``hyperparams.json`` with ``checkpoints/final.safetensors``, where one
number is all thresholds; and those of its R1-Distill series: ``config.json`` with ``sae_weights.safetensors``, which has
log thresholds.

They take activations of an average norm of √d, and do not subtract b_dec.  OpenMOSS' program and SAELens' disagree on
what opens a gate; which of them reproduces the published figures is an open question
(https://github.com/OpenMOSS/Llamascopium/issues/128).  ``recipe`` chooses:

openmoss   π_i ‖d_i‖ > θ, where the config says sparsity_include_decoder_norm, else π_i > θ: the default
plain      π_i > θ, whatever the config says
saelens    π_i > θ s, s the scale, of the first series; of the second as plain
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_fast import arguments, nn
from sae_fast.files import key, read_json
from sae_fast.interop._files import read_safetensors
from sae_fast.interop.formats import _openmoss
from sae_fast.interop.formats._common import Loaded, biases, build, layer_of, remember, the_weights, transcoder, weights_in

NAME, ORDER, SIGN = "llama_scope", 16, "hyperparams.json (Llama Scope)"
FILES = ("checkpoints/final.safetensors", "sae_weights.safetensors")
BESIDE, OPTIONS = ("../hyperparams.json", "config.json"), ("recipe",)
LOG = "log_jumprelu_threshold"
RECIPES = ("openmoss", "plain", "saelens")


def finds(path: Path) -> bool:
    return any(_config(file).is_file() for file in weights_in(path, FILES) if path.is_dir())


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return file.suffix == ".safetensors" and (LOG in shapes or {"encoder.weight", "decoder.weight"} <= set(shapes))


def read(path: Path, recipe: str | None = None) -> Loaded:
    weights = the_weights(path, FILES)
    first, file = weights.parent.name == "checkpoints", _config(weights)
    config, tensors = read_json(file), read_safetensors(weights, "decoder.weight")
    if recipe not in (*RECIPES, None):
        raise ValueError(f"recipe: got {recipe!r}, want one of {RECIPES}")
    b_enc, b_dec = biases(tensors, "encoder.bias", "decoder.bias")
    F, d = len(b_enc), len(b_dec)
    W_enc, W_dec = tensors.take("encoder.weight", F, d), tensors.take("decoder.weight", d, F).T
    _openmoss.whole_features(config, file, F, d)
    if config.get("apply_decoder_bias_to_pre_encoder", False) is not False:
        raise ValueError(f"{file}: apply_decoder_bias_to_pre_encoder: got true, want false, as in all that are published")
    place, out = (key(config, file, str, name) if name in config else "" for name in ("hook_point_in", "hook_point_out"))
    norms = _openmoss.norm_of(config) | _openmoss.take_norms(tensors)
    unscaled, scale, scale_out = _openmoss.scales(config, file, d, norms, (place, out or place))
    if first:
        theta = arguments.number(
            f"{file}: jump_relu_threshold", config.get("jump_relu_threshold"), lambda n: 0 <= n < 2**63, "a number from 0"
        )
        threshold = torch.full((F,), theta)
    else:
        threshold = _openmoss.of_log(tensors, LOG, F)
    tensors.finish()
    with_norms = recipe in (None, "openmoss") and _openmoss.counts_norms(config, file, default=False)
    if recipe == "saelens" and first:
        if scale is None:
            raise ValueError(f"recipe: got 'saelens', whose thresholds count the scale, and {file} has none")
        threshold = threshold * scale
    values = dict(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)
    sae = build(
        nn.JumpReluSAE, weights, values | {"threshold": _openmoss.gates(threshold, W_dec, with_norms)},
        apply_b_dec_to_input=False,
    )  # fmt: skip
    remember(sae, config, NAME)
    sae.metadata |= _about(place)
    notes = [] if recipe else [_said(with_norms, scale)]
    if out not in ("", place):
        notes.append(transcoder(sae, out))
    else:
        scale_out = None
    return Loaded(sae, unscaled=unscaled, scale=scale, scale_out=scale_out, free_scale=True, notes=notes)


def _config(weights: Path) -> Path:
    folder = weights.parent
    return folder.parent / "hyperparams.json" if folder.name == "checkpoints" else folder / "config.json"


def _about(place: str) -> dict[str, Any]:
    layer = layer_of(place)
    about = {"model_name": "meta-llama/Llama-3.1-8B", "layer": layer, "hook_name": place}
    return {name: value for name, value in about.items() if value not in (None, "")}


def _said(with_norms: bool, scale: float | None) -> str:
    """The recipe that was taken, in words."""
    gate = "π_i ‖d_i‖ > θ, as its config asks for" if with_norms else "π_i > θ"
    scaled = f"activations times {scale:.6g}" if scale else "activations times what activation_scale says"
    return (
        f"recipe 'openmoss' was taken: {scaled}, gates {gate}; SAELens has others (recipe='saelens', 'plain'), and "
        "which is right is an open question: docs/formats.md"
    )
