"""Formats that are known and refused: an error says what a folder or file is, and why no layer here is that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Refused(NamedTuple):
    """A format: a pattern of its files' paths, names of tensors in them (a number is how many dimensions one has), what it
    is, and why it is refused."""

    path: str
    tensors: dict[str, int]
    what: str
    why: str


CLT = "a feature of it writes into the outputs of many layers, which no layer here does yet"
REFUSED = [
    Refused(r"W_(enc|dec)_\d+\.safetensors", {"W_enc_0": 2}, "circuit-tracer's cross-layer transcoders", CLT),
    Refused(
        r"(.*/)?clt(_\w+)?/.+\.(safetensors|npz)|params_layer_\d+\.safetensors",
        {"w_enc": 2, "w_dec": 3},
        "Gemma Scope 2's cross-layer transcoders",
        CLT,
    ),
    Refused(
        r"latest_ckpt\.safetensors",
        {"D": 2, "attn_layers.0.k_ctx.weight": 2},
        "temporal SAEs",
        "they attend to the tokens before, and a layer here sees one example at a time",
    ),
    Refused(
        r"(.*/)?\w+\.dcp(/.*)?",
        {},
        "Llamascopium's sharded checkpoints",
        "want sae_weights.safetensors, which the package's save_pretrained writes on one device",
    ),
]


def check(path: Path | str, file: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """``ValueError`` with name and reason if a file, by its path below what was asked for or by what is in it, is of a
    format that is refused."""
    for refused in REFUSED:
        inside = refused.tensors and all(len((shapes or {}).get(name, ())) == n for name, n in refused.tensors.items())
        if inside or re.fullmatch(rf"(.*/)?(?:{refused.path})", file):
            raise ValueError(f"path: {path} is of {refused.what}, which are refused: {refused.why}")
