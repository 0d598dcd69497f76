"""sparsify's folder, one for each hookpoint: ``sae.safetensors`` and ``cfg.json``.  TopK, and transcoders' TopK."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_fast import nn
from sae_fast.files import json_writer, key, read_json, safetensors_writer, write_files
from sae_fast.interop._files import read_safetensors
from sae_fast.interop._norms import Unfold
from sae_fast.interop.formats._common import KEY, Loaded, build, config_of, layer_of, refuse, remember, to_keep
from sae_fast.nn import SparseAutoencoder

NAME, ORDER, UNIT_ROWS = "sparsify", 3, False
FILES_OF, SIGN = NAME, "sae.safetensors (sparsify)"
WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
FILES, BESIDE, OPTIONS = (WEIGHTS,), (CONFIG, "../config.json"), ()


def finds(path: Path) -> bool:
    return (path / WEIGHTS).is_file()


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return "encoder.weight" in shapes and "W_dec" in shapes


def read(path: Path) -> Loaded:
    file, tensors = path / CONFIG, read_safetensors(path / WEIGHTS)
    config = read_json(file)
    for name, only in (("activation", "topk"), ("signed", False)):
        if config.get(name, only) != only:
            raise ValueError(f"{file}: {name}: got {config[name]!r}, want {only!r}: no layer here holds it")
    W_enc = tensors.take("encoder.weight", None, None)
    F, d = W_enc.shape
    values = dict(
        W_enc=W_enc,
        b_enc=tensors.take("encoder.bias", F),
        W_dec=tensors.take("W_dec", F, d),
        b_dec=tensors.take("b_dec", d),
    )
    if config.get("skip_connection", "W_skip" in tensors) is not ("W_skip" in tensors):
        held = "a" if "W_skip" in tensors else "no"
        raise ValueError(f"{file}: skip_connection: got {config['skip_connection']!r}, but {WEIGHTS} has {held} W_skip")
    if "W_skip" in tensors:
        values["W_skip"] = tensors.take("W_skip", d, d)
    tensors.finish()
    if key(config, file, int, "d_in") != d:
        raise ValueError(f"{file}: d_in: got {config['d_in']}, but {WEIGHTS} holds {d}")
    factor = config.get("expansion_factor")
    if F not in (config.get("num_latents"), d * factor if isinstance(factor, (int, float)) else None):
        raise ValueError(f"{file}: num_latents: got {config.get('num_latents')!r}, but {WEIGHTS} holds {F}")
    transcode = config.get("transcode", False)
    k, centred = key(config, file, int, "k"), not transcode  # b_dec is the output's mean in a transcoder
    sae = build(nn.TopKSAE, tensors.file, values, k=k, apply_b_dec_to_input=centred)
    remember(sae, config, NAME)
    if layer_of(path.resolve().name) is not None:  # else it is no hookpoint's folder
        sae.metadata.setdefault("hook_name", path.resolve().name)
    notes = ["transcode: this is a transcoder: what it gives is another place's activation"] if transcode else []
    return Loaded(sae, notes=notes)


def write(sae: SparseAutoencoder, folder: Path, overwrite: bool, unfold: Unfold | None) -> None:
    if not isinstance(sae, nn.TopKSAE):
        raise refuse(NAME, sae, "it holds TopKSAE only")
    sae.check_plain(f"save it as {NAME}")
    if sae.group_sizes is not None:
        raise refuse(NAME, sae, "group_sizes: it has no groups")
    config: dict[str, Any] = config_of(sae, NAME)
    transcode = bool(config.get("transcode", False))
    if not sae.apply_b_dec_to_input and not transcode:
        raise refuse(NAME, sae, "apply_b_dec_to_input: got False, which it has in transcoders only")
    if sae.apply_b_dec_to_input:
        transcode = False
    defaults = {"expansion_factor": max(1, sae.d_sae // sae.d_in), "normalize_decoder": True, "multi_topk": False}
    config = {**defaults, **config, "activation": "topk", "num_latents": sae.d_sae, "k": sae.k, "skip_connection": False}
    config |= {"transcode": transcode, "d_in": sae.d_in, KEY: to_keep(sae, NAME)}
    state = sae.state_dict()
    tensors = {
        "encoder.weight": state["W_enc"],
        "encoder.bias": state["b_enc"],
        "W_dec": state["W_dec"],
        "b_dec": state["b_dec"],
    }
    write_files(folder, {WEIGHTS: safetensors_writer(tensors, {"format": "pt"}), CONFIG: json_writer(config)}, overwrite)
