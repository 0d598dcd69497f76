"""Tiles and tensors where Triton's kernels run."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.code import SparseCode
from sae_fast.kernels import _config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "screen": {"rows": 16, "features": 32, "depth": 32, "warps": 4, "stages": 2, "group": 2, "persistent": 0},
    "compact": {"words": 4, "warps": 1},
    "sampled_dots": {"entries": 16, "columns": 32, "finish": 16},
}


def set_tiles(monkeypatch, changes: dict[str, dict[str, int]]) -> None:
    for generation, every in _config.SHIPPED.items():
        new = {op: {**every[op], **change} for op, change in changes.items()}
        monkeypatch.setitem(_config.SHIPPED, generation, {**every, **new})


def on(value):
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def moved(kwargs: dict, to=on) -> dict:
    return {k: to(v) for k, v in kwargs.items()}


def home(indptr: Tensor, indices: Tensor, u: Tensor, values: Tensor, features: int) -> SparseCode:
    return SparseCode(torch.Size((len(indptr) - 1, features)), indptr.cpu(), indices.cpu(), u.cpu(), values.cpu())
