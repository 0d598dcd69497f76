"""Formats that are known here but not read yet: an error says what a folder or file is, instead of what it is not.

By the names of files, which is all there is to go by on the Hub, and by the names of tensors, as these formats share their
files' names with those that are read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

QWEN, HOOK_Z = "Qwen-Scope", "hook_z (ckkissane's attention SAEs)"
FILES: list[tuple[str, str]] = [  # a pattern of one file's name or of its path below the folder, and the format
    (r"params\.safetensors", "Gemma Scope 2"),
    (r"params\.npz", "Gemma Scope"),
    (r"hyperparams\.json", "Llama Scope"),
    (r"sae_weights\.(pt|dcp)(/.*)?", "Llamascopium"),
    (r"checkpoints/(final|pruned)\.(safetensors|pt|dcp)(/.*)?", "Llamascopium"),
    (r"layer\d+\.sae\.pt", QWEN),
    (r"(?!runner_)[^/]+_cfg\.json", HOOK_Z),
    (r"Llama-.*-SAE-l\d+\.pth?", "Goodfire"),
    (r"latest_ckpt\.safetensors", "temporal SAEs"),
    (r"W_enc_\d+\.safetensors", "circuit-tracer's cross-layer transcoders"),
    (r"layer_\d+\.safetensors", "circuit-tracer's transcoders"),
]
LARGE = (  # of those the weights, as patterns of the Hub: to be named they need not be fetched
    "params.safetensors", "latest_ckpt.safetensors", "layer[0-9]*.sae.pt", "layer_[0-9]*.safetensors",
    "W_*_[0-9]*.safetensors",
)  # fmt: skip
TENSORS: list[tuple[set[str], str]] = [  # names that a file has, among others
    ({"W_E", "b_E"}, "Llamascopium"),
    ({"encoder.weight", "log_jumprelu_threshold"}, "Llama Scope R1"),
    ({"pre_bias", "latent_bias"}, "OpenAI's GPT-2 SAEs"),
    ({"w_enc", "w_dec"}, "Gemma Scope 2"),
    ({"encoder_linear.weight"}, "Goodfire"),
]


def of_files(names: Iterable[str]) -> str | None:
    """The format that files of these names, or paths below a folder, are of."""
    there = list(names)
    return next((format for pattern, format in FILES if any(re.fullmatch(pattern, name) for name in there)), None)


def of_tensors(file: Path, tensors: Mapping[str, Any]) -> str | None:
    """The format that a file of these tensors is of."""
    for names, format in TENSORS:
        if names <= set(tensors):
            return format
    if set(tensors) == {"W_enc", "W_dec", "b_enc", "b_dec"}:  # of more than one
        shape, features = (tuple(getattr(tensors[name], "shape", ())) for name in ("W_enc", "b_enc"))
        if shape[:1] == features != shape[1:] or of_files([file.name]) == QWEN:
            return QWEN
        return HOOK_Z if file.with_name(f"{file.stem}_cfg.json").is_file() else None
    return None


def refuse(file: Path, tensors: Mapping[str, Any]) -> None:
    """``ValueError`` if a file of these tensors is of a format that is not read."""
    if format := of_tensors(file, tensors):
        raise ValueError(f"{file}: {said(format)}")


def said(format: str) -> str:
    return f"this is of {format}, a format that is known but cannot be read yet"


def below(path: Path) -> Collection[str]:
    """The paths below a folder, as :func:`of_files` takes them, two levels deep."""
    return [str(p.relative_to(path)) for pattern in ("*", "*/*") for p in sorted(path.glob(pattern))]
