"""Gemma Scope 2's folders: ``params.safetensors``, beside which ``config.json`` may be missing, so that the names of
repository and folders count: google/gemma-scope-2-4b-pt, resid_post/layer_12_width_16k_l0_small.

b_dec is not subtracted, and a feature is active where π > threshold.  Some transcoders have a path around the features,
used as x @ affine_skip_connection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_fast import nn
from sae_fast.files import key, read_json
from sae_fast.interop._files import read_safetensors
from sae_fast.interop.formats._common import (
    Loaded,
    biases,
    build,
    layer_of,
    not_negative,
    place_of,
    remember,
    the_weights,
    transcoder,
    weights_in,
)
from sae_fast.interop.formats.gemma_scope import check_width

NAME, ORDER, SIGN = "gemma_scope_2", 11, "params.safetensors (Gemma Scope 2)"
FILES, BESIDE, OPTIONS, CONFIG = ("params.safetensors",), ("config.json",), (), "config.json"
SKIP = "affine_skip_connection"
HOOKS = {
    "resid_post": "hook_resid_post",
    "attn_out": "attn.hook_z",
    "mlp_out": "hook_mlp_out",
    "transcoder": "hook_mlp_in",
}


def finds(path: Path) -> bool:
    return bool(weights_in(path, FILES))


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return bool({"w_enc", "w_dec"} & set(shapes))


def read(path: Path) -> Loaded:
    weights = the_weights(path, FILES)
    file, tensors = weights.parent / CONFIG, read_safetensors(weights, "w_enc", SKIP)
    config = read_json(file) if file.is_file() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"{file}: architecture: got {config['architecture']!r}, want 'jump_relu'")
    b_enc, b_dec = biases(tensors, "b_enc", "b_dec")
    F, d = len(b_enc), len(b_dec)
    values = dict(
        W_enc=tensors.take("w_enc", d, F).T, b_enc=b_enc, W_dec=tensors.take("w_dec", F, d), b_dec=b_dec,
        threshold=not_negative(tensors, "threshold", tensors.take("threshold", F)),
    )  # fmt: skip
    affine = SKIP in tensors
    if affine:
        values["W_skip"] = tensors.take(SKIP, d, d).T
    said = config.get("affine_connection")
    if said not in (None, affine):
        raise ValueError(
            f"{file}: affine_connection: got {said!r}, but {weights.name} has {SKIP if affine else f'no {SKIP}'}"
        )
    place = place_of(weights)
    if not affine and "_affine/" in place:
        raise ValueError(f"{weights}: tensor {SKIP!r} is missing, but its folder's name says affine")
    tensors.finish()
    check_width(place, F, weights)
    sae = build(nn.JumpReluSAE, weights, values, apply_b_dec_to_input=False)
    if config:
        remember(sae, config, NAME)
    site = next((site for site in HOOKS if re.search(rf"(?:^|/){site}(?:_all)?/", place)), None)
    about = _about(config, file, place, site)
    sae.metadata |= about
    if site == "transcoder" or affine:
        out = None if about.get("layer") is None else f"blocks.{about['layer']}.hook_mlp_out"
        return Loaded(sae, notes=[transcoder(sae, out)])
    return Loaded(sae)


def _about(config: dict[str, Any], file: Path, place: str, site: str | None) -> dict[str, Any]:
    """The metadata that config and names say."""
    about: dict[str, Any] = {}
    if "model_name" in config:
        name = key(config, file, str, "model_name").replace("-v3", "-3")
        about["model_name"] = name if name.startswith("google/") else f"google/{name}"
    elif found := re.search(r"gemma-scope-2-(\d+[mb]-(?:pt|it))(?![\w-])", place):
        about["model_name"] = f"google/gemma-3-{found.group(1)}"
    if about.get("model_name", "").endswith("270m-pt"):  # which is called so
        about["model_name"] = about["model_name"].removesuffix("-pt")
    hook = config.get("hf_hook_point_in")
    found = re.search(r"(?:^|/)layer_(\d+)_", place)
    layer = int(found.group(1)) if found else layer_of(hook if isinstance(hook, str) else None)
    if layer is not None:
        about |= {"layer": layer} | ({"hook_name": f"blocks.{layer}.{HOOKS[site]}"} if site else {})
    return about
