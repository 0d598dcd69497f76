"""circuit-tracer's per-layer transcoders: ``layer_{i}.safetensors``, and ``config.yaml`` that says for all of a folder
which model, places and activation they are of.  mwhanna's of Qwen3, whose ``wandb-config.yaml`` has the sizes, are such.

b_dec is never subtracted; W_skip is used as x @ W_skip.T; a TopK keeps the k largest, negative ones too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_fast import arguments, nn
from sae_fast.interop._files import Tensors, read_safetensors, read_yaml
from sae_fast.interop.formats._common import (
    Loaded,
    build,
    mapping,
    not_negative,
    place_of,
    remember,
    the_weights,
    transcoder,
    weights_in,
)

NAME, ORDER, SIGN = "circuit_tracer", 18, "layer_0.safetensors (circuit-tracer)"
CONFIG, SIZES = "config.yaml", ("wandb-config.yaml", "wanb-config.yaml")  # the second is so spelt in some repositories
FILES, BESIDE, OPTIONS = ("layer_*.safetensors",), (CONFIG, *SIZES), ("k",)
THRESHOLD = "activation_function.threshold"


def finds(path: Path) -> bool:
    return bool(weights_in(path, FILES))


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    F, d = shapes.get("b_enc", ()), shapes.get("b_dec", ())
    return THRESHOLD in shapes or (bool(weights_in(file, FILES)) and shapes.get("W_enc") == F + d)


def read(path: Path, k: int | None = None) -> Loaded:
    file = the_weights(path, FILES)
    tensors = read_safetensors(file)
    config = read_yaml(file.with_name(CONFIG)) if file.with_name(CONFIG).is_file() else {}
    kind = config.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise ValueError(f"{file.with_name(CONFIG)}: model_kind: got {kind!r}, want 'transcoder_set'")
    b_enc, b_dec = tensors.take("b_enc", None), tensors.take("b_dec", None)
    F, d = len(b_enc), len(b_dec)
    values = dict(
        W_enc=tensors.take("W_enc", F, d), b_enc=b_enc, W_dec=tensors.take("W_dec", F, d), b_dec=b_dec
    )  # fmt: skip
    if "W_skip" in tensors:
        values["W_skip"] = tensors.take("W_skip", d, d)
    _check_sizes(file, F, d)
    sae = _layer(tensors, values, config, k)
    tensors.finish()
    if config:
        remember(sae, config, NAME)
    sae.metadata |= _about(config, file)
    return Loaded(sae, notes=[transcoder(sae, sae.metadata.get("hook_name_out"))])


def _layer(tensors: Tensors, values: dict[str, Tensor], config: dict[str, Any], k: int | None) -> nn.SparseAutoencoder:
    activation, F = config.get("activation"), len(values["b_enc"])
    if activation not in (None, "relu", "topk"):
        raise ValueError(f"{tensors.file.with_name(CONFIG)}: activation: got {activation!r}, want 'relu' or 'topk'")
    if k is not None and activation != "topk":
        raise ValueError(f"k: got {k}, but {tensors.file} is of no TopK transcoder")
    if activation == "topk":
        said = int(tensors.take("k")) if "k" in tensors else config.get("k")
        k = arguments.whole(f"{tensors.file}: k", said if k is None else k, 1, F, f"an int with 1 ≤ k ≤ d_sae = {F}")
        return build(nn.TopKSAE, tensors.file, values, k=k, largest="any", apply_b_dec_to_input=False)
    if THRESHOLD in tensors and activation is None:
        values["threshold"] = not_negative(tensors, THRESHOLD, tensors.take(THRESHOLD, F))
        return build(nn.JumpReluSAE, tensors.file, values, apply_b_dec_to_input=False)
    return build(nn.ReluSAE, tensors.file, values, apply_b_dec_to_input=False)


def _check_sizes(file: Path, F: int, d: int) -> None:
    """``ValueError`` unless the sizes that a repository's second config says are those of the tensors."""
    for name in SIZES:
        if file.with_name(name).is_file():
            config = read_yaml(file.with_name(name))
            for size, held in (("d_model", d), ("d_feature", F)):
                got = mapping(config.get(size)).get("value")
                if got not in (None, held):
                    raise ValueError(f"{file.with_name(name)}: {size}: got {got!r}, but {file.name} holds {held}")
            return


def _about(config: dict[str, Any], file: Path) -> dict[str, Any]:
    about: dict[str, Any] = {}
    if isinstance(config.get("model_name"), str):
        about["model_name"] = config["model_name"]
    elif found := re.search(r"qwen3-(\d+(?:\.\d+)?)b", place_of(file)):  # the 14b ones have no config
        about["model_name"] = f"Qwen/Qwen3-{found.group(1)}B"
    layer = re.fullmatch(r"layer_(\d+)\.safetensors", file.name)
    if layer is None:
        return about
    about["layer"] = int(layer.group(1))
    for ours, theirs, usual in (
        ("hook_name", "feature_input_hook", "mlp.hook_in"),
        ("hook_name_out", "feature_output_hook", "hook_mlp_out"),
    ):
        said = config.get(theirs, usual)
        about[ours] = f"blocks.{layer.group(1)}.{said if isinstance(said, str) else usual}"
    return about
