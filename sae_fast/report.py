"""From a run to the page of its features: what `sae-fast report` runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_fast import interop
from sae_fast.analysis.page import write_page
from sae_fast.analysis.store import FeatureStore
from sae_fast.encoding import encode


def report(
    source: str | Path,
    out: str | Path | None = None,
    *,
    store: str | Path | None = None,
    effects: Path | None = None,
    progress: bool = True,
    **limits: int,
) -> Path:
    """Writes the page of an SAE; returns its file.

    source: the folder of a run of `sae-fast demo` or `train`, whose store is made if it has none; or, with ``store``, any
    SAE that :func:`sae_fast.load` takes.  out: by default report.html in the run.  effects: a JSON file, {"12": 0.5, ...}.
    limits: as of :func:`sae_fast.analysis.page.write_page`.  Errors as of that, and ``FileNotFoundError`` or ``ValueError``
    for a run that is none, effects that are no such file, and a store that can be neither found nor made.
    """
    run = Path(source)
    is_run = (run / "checkpoint").is_dir()
    if not is_run and store is None:
        problem = "has no checkpoint/ in it" if run.is_dir() else "is no folder"
        raise FileNotFoundError(
            f"RUN: {source} {problem}; want the folder of a run of `sae-fast demo` or `train`, or an SAE and its --store"
        )
    sae = interop.load(run / "checkpoint" if is_run else source)
    known = None if effects is None else read_effects(effects)
    if store is None and not (run / "store").exists():
        try:
            encode(run, progress=progress)
        except (ValueError, FileNotFoundError) as error:
            remedy = f"sae-fast encode {run / 'checkpoint'} --out {run / 'store'} --model MODEL --layer LAYER --text FILE"
            raise ValueError(f"RUN: {source} has no store, and none can be made ({error}); make one: {remedy}") from error
    try:
        opened = FeatureStore.open(run / "store" if store is None else store, sae)
    except ValueError as error:
        remedy = f"; make it anew: sae-fast encode {source} --overwrite" if store is None else ""
        raise ValueError(f"{error}{remedy}") from error
    title, facts = describe(run) if is_run else ("", {})
    out = Path(out or (run / "report.html" if is_run else "report.html"))
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no folder {out.parent}")
    return write_page(out, opened, sae, known, title=title, facts=facts, progress=progress, **limits)


def read_effects(file: Path) -> dict[int, float]:
    """feature → effect from a JSON object.  ValueError, with the path, for anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"effects: {file} is not JSON: {error}") from error
    if not isinstance(value, dict) or not all(key.isascii() and key.isdigit() for key in value):
        raise ValueError(f'effects: {file} holds no object from features to effects, want {{"12": 0.5, ...}}')
    return {int(key): effect for key, effect in value.items()}


def describe(run: Path) -> tuple[str, Mapping[str, str]]:
    """(a title, more facts) from a run's metrics.json, as far as it has them."""
    try:
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "", {}
    recipe, held_out = _object(metrics, "recipe"), _object(metrics, "held_out")
    on = f"layer {recipe['layer']} of {recipe['model']}" if {"layer", "model"} <= recipe.keys() else ""
    fvu = held_out.get("fvu")
    facts = {"FVU": f"{fvu:.3g}"} if isinstance(fvu, int | float) else {}
    return f"SAE on {on}" if on else "", facts


def _object(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}
