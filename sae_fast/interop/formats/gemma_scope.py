"""Gemma Scope's folder (arXiv 2408.05147): ``params.npz`` and nothing else, so that the names of repository and folders say
which model and place it is of: google/gemma-scope-2b-pt-res, layer_20/width_16k/average_l0_71.

b_dec is not subtracted, and a feature is active where π > threshold.  SAEs of embeddings were trained on √d times them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from sae_fast import nn
from sae_fast.interop._files import read_npz
from sae_fast.interop.formats._common import (
    HEADS,
    Loaded,
    biases,
    build,
    not_negative,
    place_of,
    refuse_scaling_factor,
    the_weights,
    transcoder,
    weights_in,
)

NAME, ORDER, SIGN = "gemma_scope", 10, "params.npz (Gemma Scope)"
FILES, BESIDE, OPTIONS = ("params.npz",), (), ()
REPOSITORY = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<tuned>pt|it)-(?P<site>res|mlp|att|transcoders)(?![\w-])")
HOOKS = {
    "res": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "att": "attn.hook_z",
    "transcoders": "ln2.hook_normalized",
}


def finds(path: Path) -> bool:
    return bool(weights_in(path, FILES))


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return file.suffix == ".npz"


def read(path: Path) -> Loaded:
    file = the_weights(path, FILES)
    tensors = read_npz(file)

    def name(ours: str) -> str:  # some files have lower case
        return ours if ours in tensors or ours.lower() not in tensors else ours.lower()

    refuse_scaling_factor(tensors)
    b_enc, b_dec = biases(tensors, "b_enc", "b_dec")
    F, d = len(b_enc), len(b_dec)
    values = dict(
        W_enc=tensors.take(name("W_enc"), d, F).T, b_enc=b_enc, W_dec=tensors.take(name("W_dec"), F, d), b_dec=b_dec,
        threshold=not_negative(tensors, "threshold", tensors.take("threshold", F)),
    )  # fmt: skip
    tensors.finish()
    place = place_of(file)
    check_width(place, F, file)
    embedding = "embedding" in place.split("/")
    if embedding:
        values["W_enc"], values["W_dec"] = values["W_enc"] / math.sqrt(d), values["W_dec"] * math.sqrt(d)
    sae = build(nn.JumpReluSAE, file, values, apply_b_dec_to_input=False)
    repository, layer = REPOSITORY.search(place), re.search(r"(?:^|/)layer_(\d+)/", place)
    if repository:
        sae.metadata["model_name"] = f"google/gemma-2-{repository['size']}" + "-it" * (repository["tuned"] == "it")
    if embedding:
        sae.metadata |= {"layer": 0, "hook_name": "hook_embed"}
    elif layer:
        sae.metadata["layer"] = int(layer.group(1))
    else:
        return Loaded(
            sae,
            notes=[
                "neither layer_N nor embedding is among its folders' names: taken for a layer's; one of embeddings gets √d "
                "times them"
            ],
        )
    if l0 := re.search(r"average_l0_(\d+)", place):
        sae.metadata["l0"] = int(l0.group(1))
    if embedding or not (repository and layer):
        return Loaded(sae)
    site = repository["site"]
    sae.metadata["hook_name"] = f"blocks.{layer.group(1)}.{HOOKS[site]}"
    if site == "transcoders":
        return Loaded(sae, notes=[transcoder(sae, f"blocks.{layer.group(1)}.hook_mlp_out")])
    return Loaded(sae, notes=[HEADS] if site == "att" else [])


def check_width(place: str, F: int, file: Path) -> None:
    """``ValueError`` unless the features are as many as a folder's name, width_16k or width_1m, says, where one does."""
    said = re.search(r"width_(\d+)([km])", place)
    if said and (wanted := 2 ** round(math.log2(int(said.group(1)) * {"k": 1e3, "m": 1e6}[said.group(2)]))) != F:
        raise ValueError(f"{file}: b_enc: got {F} features, but its folder says {said.group()}, {wanted}")
