"""What the tests of the feature report share: stores with text of any kind, and the page as the browser reads it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import sae_fast as sf
from sae_fast.analysis.store import Contexts, FeatureStore, write_store

# Each would break a page that took text for markup, script or JSON.
HOSTILE = [
    "</script><script>window.hacked = 1</script>", "<img src=x onerror='window.hacked=1'>", "<!--", "]]>", "&lt;b&gt;",
    "\"'`${window.hacked=1}", "\\u003c\\", "line\u2028paragraph\u2029", "\u202egnp.exe", "\U0001f9e8\ufe0f", "e\u0301", "ﬁ",
    "İstanbul", "日本語", "tab\tnew\nline", "@SCRIPT@", "#hash", "\x07\x1b[31m",
]  # fmt: skip
WORDS = ["the", "of", "Gate", "opens", "when", "its", "sum", "is", "above", "zero", "12"]


def small_store(folder: Path, d_sae: int = 60, n_tokens: int = 640, text: bool = True, seed: int = 0):
    """(a Gated SAE of which feature 5 is dead, its store in contexts of 32 tokens)."""
    generator = torch.Generator().manual_seed(seed)
    sae = sf.GatedSAE(8, d_sae, seed=seed)
    x = torch.randn(n_tokens, 8, generator=generator)
    sae.calibrate_(x, l0=4)
    with torch.no_grad():
        sae.b_gate[5] = -1e3
    picks = torch.randint(len(HOSTILE) + len(WORDS), (n_tokens,), generator=generator).tolist()
    texts = [" " + (HOSTILE + WORDS)[i] for i in picks]
    texts[10::32], texts[11::32] = ([word] * (n_tokens // 32) for word in (" when", " its"))  # something that tokens share
    texts[0::32], texts[31::32] = (
        [word] * (n_tokens // 32) for word in (" alpha", " omega")
    )  # neighbours, not in one context
    write_store(folder, sae, x, texts=texts if text else None, context_length=32 if text else None)
    return sae, FeatureStore.open(folder, sae)


def wide_store(sae, n_tokens: int = 1_000_000, length: int = 128, per_feature: int = 18, window: int = 24):
    """In the place of a store of 24 576 features that would take minutes to write: as much as one has for a page, of random
    numbers.  A feature fires on 2.5 tokens of a window; token frequencies fall as Zipf's law says."""
    rng, d_sae = np.random.default_rng(0), sae.d_sae
    fires = (rng.pareto(1.1, d_sae) * n_tokens / 2000 + 1).astype(np.int64)
    fires[rng.random(d_sae) < 0.05] = 0
    maximum = np.where(fires > 0, rng.gamma(4, 1, d_sae), 0).astype(np.float32)
    feature = np.repeat(np.arange(d_sae, dtype=np.int32), np.where(fires > 0, per_feature, 0))
    stratum = np.tile(
        np.array([0] * (per_feature - 8) + [1, 1, 2, 2, 3, 3, 4, 4], dtype=np.int8), len(feature) // per_feature
    )
    first = rng.integers(0, n_tokens // length, len(feature)) * length + rng.integers(0, length - window, len(feature))
    activations = rng.random((len(feature), window), dtype=np.float32) * (rng.random((len(feature), window)) < 0.065)
    activations[:, 15] = 1 - rng.random(len(feature), dtype=np.float32)
    activations *= maximum[feature, None]
    alphabet = np.array(list("etaoinshrdlu"))
    words = [" " * int(rng.random() < 0.7) + "".join(rng.choice(alphabet, rng.integers(1, 8))) for _ in range(20_000)]
    weight = 1 / (np.arange(len(words)) + 5.0)
    ids = rng.choice(len(words), n_tokens, p=weight / weight.sum()).astype(np.int32)
    shown = Contexts(
        None, feature, stratum, first + 15, activations[:, 15], first, np.full(len(feature), window, np.int32), activations
    )
    return SimpleNamespace(
        path="wide", d_sae=d_sae, n_tokens=n_tokens, n_activations=int(fires.sum()), context_length=length, has_text=True,
        info={"sae": sf.nn.identity.fingerprint(sae)}, pieces=(ids, words), contexts=lambda **_: shown,
        features={"fires": fires, "maximum": maximum, "mean": maximum / 3},
        histogram=lambda bins: (rng.poisson(np.geomspace(40, 0.2, bins), (d_sae, bins)), None),
    )  # fmt: skip


def read_page(file: Path) -> tuple[dict, dict[str, dict]]:
    """(about, {chunk: {name: array or list}}) of a page."""
    page = file.read_text(encoding="utf-8")
    about = json.loads(re.search(r'<script type="application/json" id="about">(.*?)</script>', page, flags=re.S)[1])
    kinds = {"u1": "u1", "u2": "<u2", "u4": "<u4", "i2": "<i2", "f4": "<f4"}
    chunks = {}
    for name, entries in about["chunks"].items():
        packed = re.search(rf'id="data-{name}">([^<]*)</script>', page)[1]
        data = gzip.decompress(base64.b64decode(packed, validate=True))
        chunks[name] = {
            key: json.loads(data[at : at + n]) if kind == "json" else np.frombuffer(data, kinds[kind], n, at)
            for key, kind, at, n in entries
        }
    return about, chunks
