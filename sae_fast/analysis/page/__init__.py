"""A page to judge features on: one HTML file that holds everything it shows, for a browser without a network.

The arrays travel in gzip and base64, a chunk an element: the table's columns first, so that it is there before
the rest of the file is read.  The page itself is in web/: a skeleton, a style sheet and a script in parts, no library.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_fast.analysis.attribution import Effects
from sae_fast.analysis.page import _data as data
from sae_fast.analysis.store import FeatureStore
from sae_fast.files import write_text
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.identity import fingerprint

HISTOGRAM_BINS, NEAREST = 24, 8
SCRIPTS = ("data.js", "marks.js", "list.js", "feature.js", "main.js")


def write_page(
    path: str | os.PathLike[str],
    store: FeatureStore,
    sae: SparseAutoencoder,
    effects: Effects | Mapping[int, float] | Tensor | None = None,
    *,
    title: str = "",
    facts: Mapping[str, str] | None = None,
    top: int = 10,
    bins: int = 4,
    per_bin: int = 2,
    before: int = 15,
    after: int = 8,
    progress: bool = False,
) -> Path:
    """Writes the page of an SAE's features as one HTML file; what was there stays until the new one is whole.

    store      where and how much each feature fires, of this SAE
    effects    what `attribution.patch` found, or feature → effect, or [F] such as `Shift.effects` gives for a site: a
               column of the table
    facts      more to say of the SAE at the top of the page: name → text, such as {"FVU on others": "0.21"}
    top, bins, per_bin   a feature is shown with its ``top`` strongest contexts and ``per_bin`` of each of ``bins``
               quantiles of its activations, as `FeatureStore.contexts` chooses them
    before, after   tokens of the context that are shown either side

    ValueError for a store of another SAE, effects of features that do not exist or that are not finite in float32,
    more than a page can hold; FileExistsError where something is that is no such page.
    """
    path = Path(path)
    check_replaceable(path)
    if store.info["sae"] != (found := fingerprint(sae)):
        raise ValueError(f"store: {store.path} is of SAE {store.info['sae']}, want one of this SAE, {found}")
    for name, value, most in (
        ("top + bins × per_bin", top + bins * per_bin, 255), ("before + after", before + after, 254), ("bins", bins, 100)
    ):  # fmt: skip
        if value > most:
            raise ValueError(f"{name}: got {value}, want at most {most}: all features together have to fit in a page")
    table = data.columns(store, data.effects_of(effects, sae.d_sae))
    shown = store.contexts(top=top, bins=bins, per_bin=per_bin, before=before, after=after, progress=progress)
    text, examples = data.texts(store, shown)
    detail = data.details(store, sae.W_dec, HISTOGRAM_BINS, NEAREST, progress)
    chunks = {"columns": table, "text": text, "examples": examples, "detail": detail}
    packed = {name: data.pack(chunk) for name, chunk in chunks.items()}
    about = {
        "sae": found,
        "d_sae": sae.d_sae,
        "n_tokens": store.n_tokens,
        "bins": bins,
        "nearest": min(NEAREST, sae.d_sae - 1),
        "histogram_bins": HISTOGRAM_BINS,
        "effects": effects is not None,
        "text": store.has_text,
        "chunks": {name: entries for name, (entries, _) in packed.items()},
        "facts": [
            ["class", type(sae).__name__],
            ["d", f"{sae.d_in:,}"],
            ["F", f"{sae.d_sae:,}"],
            ["tokens", f"{store.n_tokens:,}"],
            ["L0 on these", f"{store.n_activations / store.n_tokens:.1f}"],
            ["dead on these", f"{(store.features['fires'] == 0).mean():.1%}"],
            *map(list, (facts or {}).items()),
        ],
    }
    title = title or f"{type(sae).__name__}, {sae.d_sae:,} features"
    write_text(path, _html(title, about, {name: chunk for name, (_, chunk) in packed.items()}))
    return path


def check_replaceable(path: Path) -> None:
    """``FileExistsError`` unless there is nothing, or a page that :func:`write_page` wrote."""
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8") as file:
            ours = file.readline().startswith("<!doctype html>") and any('id="data-' in line for line in file)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise FileExistsError(f"path: {path} is there and is no report of features; move it, or write elsewhere")


def _html(title: str, about: Mapping[str, Any], chunks: Mapping[str, bytes]) -> str:
    """The page.  What comes from outside is escaped, or base64: nothing in it can end an element or begin one."""
    web = resources.files(__package__) / "web"
    style = (web / "page.css").read_text(encoding="utf-8")
    parts = "\n".join((web / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}}})();\n'
    elements = {
        name: f'<script type="text/plain" id="data-{name}">{base64.b64encode(chunk).decode()}</script>'
        for name, chunk in chunks.items()
    }
    filled = {
        "TITLE": html.escape(title),
        "STYLE": style,
        "STYLE_HASH": _hash(style),
        "SCRIPT": script,
        "SCRIPT_HASH": _hash(script),
        "ABOUT": json.dumps(about).replace("<", "\\u003c"),
        "COLUMNS": elements.pop("columns"),
        "REST": "\n".join(elements.values()),
    }
    return re.sub(r"@([A-Z_]+)@", lambda name: filled[name[1]], (web / "page.html").read_text(encoding="utf-8"))


def _hash(source: str) -> str:
    """A hash by which the page's policy knows its own script and style, and refuses all others."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
