"""The arrays of the page: its table, details of each feature, the text and the windows of it; packed in chunks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sae_fast.analysis.attribution import Effects
from sae_fast.analysis.store import Contexts, FeatureStore

LARGEST = float(np.finfo(np.float32).max)
LEVELS = 65535  # an activation in a context is kept as a fraction of its feature's maximum
KINDS = {"uint8": "u1", "uint16": "u2", "uint32": "u4", "int16": "i2", "float32": "f4"}  # as data.js knows them
Chunk = Mapping[str, "NDArray[Any] | Sequence[str]"]


def columns(store: FeatureStore, effects: NDArray[np.float32]) -> Chunk:
    """The table: [F] each."""
    found = store.features
    return {
        "fires": found["fires"].astype(np.uint32),
        "maximum": found["maximum"].astype(np.float32),
        "mean": found["mean"].astype(np.float32),
        "effect": effects,
    }


def effects_of(effects: Effects | Mapping[int, float] | Tensor | None, d_sae: int) -> NDArray[np.float32]:
    """[F], NaN where nothing is known.  ValueError for features that do not exist, and for effects that are not finite in
    float32."""
    known: list[int]
    values: list[float]
    if isinstance(effects, Effects):
        if effects.support.d_sae != d_sae:
            raise ValueError(f"effects: got those of {effects.support.d_sae} features, want {d_sae}, as this SAE has")
        fired = effects.support.indices.unique().cpu().long()
        known, values = fired.tolist(), effects.by_feature().detach().cpu()[fired].tolist()
    elif isinstance(effects, Tensor):
        if effects.shape != (d_sae,) or not effects.is_floating_point():
            raise ValueError(f"effects: got {effects.dtype} {tuple(effects.shape)}, want floats [{d_sae}], one a feature")
        known, values = list(range(d_sae)), effects.tolist()
    else:
        known, values = list(effects or {}), list((effects or {}).values())
    out = np.full(d_sae, np.nan, dtype=np.float32)
    for feature, effect in zip(known, values, strict=True):
        if isinstance(feature, bool) or not isinstance(feature, int) or not 0 <= feature < d_sae:
            raise ValueError(f"effects: got feature {feature!r}, want 0 to {d_sae - 1}, those of this SAE")
        if isinstance(effect, bool) or not isinstance(effect, int | float) or not abs(effect) <= LARGEST:
            raise ValueError(f"effects: got {effect!r} for feature {feature}, want a finite number that float32 can hold")
        out[feature] = effect
    return out


def details(store: FeatureStore, W_dec: Tensor, bins: int, nearest_rows: int, progress: bool) -> Chunk:
    """histogram [F, bins]; neighbour, cosine [F, k]."""
    indices, cosines = nearest(W_dec, nearest_rows, progress=progress)
    return {
        "histogram": store.histogram(bins=bins)[0].astype(np.uint32),
        "neighbour": indices.numpy().astype(np.uint32),
        "cosine": np.rint(cosines.numpy() * 32767).astype(np.int16),
    }


def nearest(W_dec: Tensor, k: int = 8, block: int = 256, progress: bool = False) -> tuple[Tensor, Tensor]:
    """(features [F, k] int64, cosines [F, k] float32) of the decoder rows nearest to each row of W_dec [F, d].

    The row itself is left out, so k is at most F − 1; a row of zeros has cosine 0 with all.  A block of rows at a time:
    nothing of size F × F exists.
    """
    k = min(k, len(W_dec) - 1)
    rows = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    indices = torch.empty(len(rows), k, dtype=torch.int64)
    cosines = torch.empty(len(rows), k)
    memory = rows.new_empty(min(block, len(rows)), len(rows))
    for begin in tqdm(range(0, len(rows), block), "decoder rows", disable=not progress, dynamic_ncols=True):
        mine = rows[begin : begin + block]
        products = torch.mm(mine, rows.T, out=memory[: len(mine)])
        here = torch.arange(len(products), device=rows.device)
        products[here, begin + here] = -torch.inf
        found = products.topk(k)
        indices[begin : begin + block], cosines[begin : begin + block] = found.indices.cpu(), found.values.cpu()
    return indices, cosines.clamp(-1, 1)


def texts(store: FeatureStore, shown: Contexts) -> tuple[Chunk, Chunk]:
    """(the tokens that are shown, each once; the contexts as windows of them).

    Windows overlap a lot, so what they cover is kept as one stream of tokens, in runs of neighbours in one context.
    """
    covered = np.zeros((shown.first + shown.length).max(initial=0) + 1, dtype=np.int64)
    np.add.at(covered, shown.first, 1)
    np.add.at(covered, shown.first + shown.length, -1)
    tokens = np.flatnonzero(np.cumsum(covered[:-1]))
    begins = np.ones(len(tokens), dtype=bool)
    begins[1:] = (np.diff(tokens) > 1) | (tokens[1:] % (store.context_length or 1) == 0)
    words: list[str] = []
    ids = np.zeros(0, dtype=np.int64)
    if store.has_text:
        of_token, strings = store.pieces
        used, ids = np.unique(of_token[tokens], return_inverse=True)
        words = [strings[i] for i in used.tolist()]
    fires = shown.activations > 0
    maximum = store.features["maximum"].astype(np.float64)[shown.feature]
    level = np.rint(shown.activations / maximum[:, None] * LEVELS)[fires]
    text = {
        "words": words,
        "ids": ids.astype(np.uint16 if len(words) <= 1 << 16 else np.uint32),
        "run": np.flatnonzero(begins).astype(np.uint32),
        "run_token": tokens[begins].astype(np.uint32),
    }
    return text, {
        "count": np.bincount(shown.feature, minlength=store.d_sae).astype(np.uint8),
        "group": shown.stratum.astype(np.uint8),
        "start": np.searchsorted(tokens, shown.first).astype(np.uint32),
        "length": shown.length.astype(np.uint8),
        "peak": (shown.token - shown.first).astype(np.uint8),
        "firing": fires.sum(1).astype(np.uint8),
        "offset": np.nonzero(fires)[1].astype(np.uint8),
        "level": np.maximum(level, 1).astype(np.uint16),  # what fires is above zero
    }


def pack(chunk: Chunk) -> tuple[list[list[Any]], bytes]:
    """([name, kind, begin in bytes, length] of each array, all of them in gzip).  The same arrays give the same bytes."""
    entries: list[list[Any]] = []
    parts: list[bytes] = []
    at = 0
    for name, value in chunk.items():
        if isinstance(value, np.ndarray):
            kind, length = KINDS[value.dtype.name], value.size
            data = value.astype(value.dtype.newbyteorder("<")).tobytes()
        else:
            data = json.dumps(value).encode("ascii")
            kind, length = "json", len(data)
        entries.append([name, kind, at, length])
        parts.append(data + b"\0" * (-len(data) % 8))
        at += len(parts[-1])
    return entries, gzip.compress(b"".join(parts), compresslevel=6, mtime=0)
