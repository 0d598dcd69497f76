"""Qwen-Scope's files, ``layer{n}.sae.pt``: TopK over ReLU, b_dec not subtracted.  k and the number of features are in the
repository's name: SAE-Res-Qwen3-1.7B-Base-W32K-L0_50.

The names are SAELens', the matrices its transposes: W_enc [F, d], W_dec [d, F].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sae_fast import arguments, nn
from sae_fast.interop._files import Tensors, read_state_dict
from sae_fast.interop.formats._common import Loaded, biases, build, place_of, the_weights, weights_in

NAME, ORDER, SIGN = "qwen_scope", 12, "layer0.sae.pt (Qwen-Scope)"
FILES, BESIDE, OPTIONS = ("layer*.sae.pt",), (), ("k",)
KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}
REPOSITORY = re.compile(r"SAE-Res-(?P<model>[\w.-]+?)-W(?P<width>\d+)K-L0_(?P<k>\d+)(?![\w-])")


def finds(path: Path) -> bool:
    return bool(weights_in(path, FILES))


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    if set(shapes) != KEYS or file.suffix != ".pt":
        return False
    F, d = shapes["b_enc"], shapes["b_dec"]
    return bool(weights_in(file, FILES)) or shapes["W_enc"] == F + d != d + F


def read(path: Path, k: int | None = None) -> Loaded:
    file = the_weights(path, FILES)
    tensors = Tensors(file, read_state_dict(file))
    b_enc, b_dec = biases(tensors, "b_enc", "b_dec")
    F, d = len(b_enc), len(b_dec)
    values = dict(W_enc=tensors.take("W_enc", F, d), b_enc=b_enc, W_dec=tensors.take("W_dec", d, F).T, b_dec=b_dec)
    tensors.finish()
    said = REPOSITORY.search(place_of(file))
    if said and int(said["width"]) * 1024 != F:
        raise ValueError(f"{file}: b_enc: got {F} features, but its repository says W{said['width']}K")
    if k is None and said is None:
        raise ValueError(f"{file}: no folder above it is named as its repository, SAE-Res-…-W32K-L0_50; want k")
    k = arguments.whole("k", int(said["k"]) if k is None and said else k, 1, F, f"an int with 1 ≤ k ≤ d_sae = {F}")
    if said and k != int(said["k"]):
        raise ValueError(f"k: got {k}, but the repository of {file} says L0_{said['k']}")
    sae = build(nn.TopKSAE, file, values, k=k, apply_b_dec_to_input=False)
    if said:
        sae.metadata["model_name"] = f"Qwen/{said['model']}"
    if layer := re.match(r"layer(\d+)\.", file.name):
        sae.metadata |= {"layer": int(layer.group(1)), "hook_name": f"blocks.{layer.group(1)}.hook_resid_post"}
    return Loaded(sae)
