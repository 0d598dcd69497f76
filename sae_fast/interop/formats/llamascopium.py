"""Llamascopium's folder: ``config.json`` with ``sae_weights.safetensors`` or ``.pt``, or a checkpoint of its training.

x is scaled to an average norm of √d, b_D is not subtracted, and gates count the decoder's norms unless the config says no.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast import arguments, nn
from sae_fast.files import key, read_json
from sae_fast.interop import _norms
from sae_fast.interop._files import Tensors, read_safetensors, read_state_dict
from sae_fast.interop.formats import _openmoss
from sae_fast.interop.formats._common import Loaded, build, layer_of, mapping, remember, the_weights, transcoder, weights_in

NAME, ORDER, SIGN = "llamascopium", 17, "sae_weights.safetensors (Llamascopium)"
FILES = tuple(
    f"{name}.{s}" for name in ("sae_weights", "checkpoints/pruned", "checkpoints/final") for s in ("safetensors", "pt")
)
BESIDE, OPTIONS, CONFIG = ("config.json", "../config.json"), (), "config.json"
LOG = "activation_function.log_jumprelu_threshold"


def finds(path: Path) -> bool:
    return any(_config(file).is_file() for file in weights_in(path, FILES) if path.is_dir())


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return bool({"W_E", "b_E", "W_D", "b_D"} & set(shapes)) or (file.suffix == ".pt" and set(shapes) <= {"sae", "version"})


def read(path: Path) -> Loaded:
    weights = the_weights(path, FILES)
    file = _config(weights)
    config = read_json(file)
    for name, only in (("sae_type", "sae"), ("use_glu_encoder", False)):
        if config.get(name, only) != only:
            raise ValueError(f"{file}: {name}: got {config[name]!r}, want {only!r}: no layer here holds it")
    tensors = read_safetensors(weights, "W_E") if weights.suffix == ".safetensors" else Tensors(
        weights, mapping(read_state_dict(weights).get("sae"))
    )  # fmt: skip
    norms = _openmoss.norm_of(config) | _openmoss.take_norms(tensors)
    b_enc = tensors.take("b_E", None)
    W_enc = tensors.take("W_E", None, len(b_enc)).T
    F, d = W_enc.shape
    W_dec = tensors.take("W_D", F, d)
    _openmoss.whole_features(config, file, F, d)
    with_bias = key(config, file, bool, "use_decoder_bias") if "use_decoder_bias" in config else True
    values = dict(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=tensors.take("b_D", d) if with_bias else W_dec.new_zeros(d))
    with_norms = _openmoss.counts_norms(config, file, default=True)
    sae, notes = _layer(tensors, values, config, file, with_norms)
    tensors.finish()
    remember(sae, config, NAME)
    place, out = (key(config, file, str, name) for name in ("hook_point_in", "hook_point_out"))
    sae.metadata |= {"hook_name": place} | ({} if layer_of(place) is None else {"layer": layer_of(place)})
    unscaled, scale, scale_out = _openmoss.scales(config, file, d, norms, (place, out))
    if out != place:
        notes.append(transcoder(sae, out))
    else:
        scale_out = None
    return Loaded(sae, unscaled=unscaled, scale=scale, scale_out=scale_out, free_scale=True, notes=notes)


def _config(weights: Path) -> Path:
    """Beside the weights, or above the folder ``checkpoints``."""
    folder = weights.parent
    return (folder.parent if folder.name == "checkpoints" and not (folder / CONFIG).is_file() else folder) / CONFIG


def _layer(
    tensors: Tensors, values: dict[str, Tensor], config: dict[str, Any], file: Path, with_norms: bool
) -> tuple[nn.SparseAutoencoder, list[str]]:
    """The layer of these weights, and what to tell."""
    activation = config.get("act_fn", "relu")
    options: dict[str, Any] = {"apply_b_dec_to_input": False}
    if activation == "relu":
        return build(nn.ReluSAE, tensors.file, values, **options), []
    if activation == "jumprelu":
        threshold = _openmoss.of_log(tensors, LOG, len(values["b_enc"]))
        values["threshold"] = _openmoss.gates(threshold, values["W_dec"], with_norms)
        return build(nn.JumpReluSAE, tensors.file, values, **options), []
    if activation not in ("topk", "batchtopk"):
        wanted = "one of relu, jumprelu, topk, batchtopk"
        raise ValueError(f"{file}: act_fn: got {activation!r}, want {wanted}")
    F = len(values["b_enc"])
    options["k"] = arguments.whole(f"{file}: top_k", config.get("top_k", 50), 1, F, f"an int with 1 ≤ k ≤ d_sae = {F}")
    if activation == "batchtopk":
        values["threshold"] = torch.tensor(-1.0)
    sae = build(nn.TopKSAE if activation == "topk" else nn.BatchTopKSAE, tensors.file, values, **options)
    if not with_norms or _norms.is_unit(sae):
        return sae, []
    _norms.fold(sae, chosen_with_norms=True)
    return sae, [
        "sparsity_include_decoder_norm: it chooses by π_i ‖d_i‖; the norms were folded into the encoder, to rounding"
    ]
