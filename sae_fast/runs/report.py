"""`sae-fast report`: from a run to the page of its features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sae_fast import files, interop
from sae_fast.analysis.page import check_replaceable, write_page
from sae_fast.analysis.store import FeatureStore
from sae_fast.devices import usable
from sae_fast.nn import SparseAutoencoder
from sae_fast.runs.encode import default_store, encode
from sae_fast.runs.folder import METRICS, PAGE, run_of


def report(
    source: str | Path,
    out: str | Path | None = None,
    *,
    store: str | Path | None = None,
    effects: Path | None = None,
    device: str | None = None,
    progress: bool = True,
    **limits: int,
) -> Path:
    """Writes the page of an SAE; returns its file.

    source: the folder of a run of `sae-fast demo` or `train`, or its checkpoint, whose store is made if it has none; or any
    SAE that :func:`sae_fast.load` takes, of which there is a store.  out: by default report.html in the run, else here.
    store: by default where `sae-fast encode` writes it.  effects: a JSON file, {"12": 0.5, ...}.
    limits: as of :func:`sae_fast.analysis.page.write_page`.  Errors as of that and of :func:`sae_fast.load`;
    ``FileNotFoundError`` or ``ValueError`` for effects that are no such file and a store that is not there nor can be made.
    """
    run = run_of(source)
    out = Path(out or (run / PAGE if run is not None else PAGE))
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no folder {out.parent}")
    check_replaceable(out)
    sae = interop.load(source)
    known = None if effects is None else read_effects(effects)
    place = default_store(source, sae) if store is None else Path(store)
    if store is None and not place.exists():
        try:
            if "source" not in sae.metadata:
                raise ValueError("its metadata does not say what it was trained on")
            encode(source, place, device=device, progress=progress)
        except (ValueError, FileNotFoundError) as error:
            remedy = f"sae-fast encode {source} --out {place} --model MODEL --layer LAYER --text FILE"
            raise ValueError(f"{source}: it has no store, and none can be made ({error}); make one: {remedy}") from error
    try:
        opened = FeatureStore.open(place, sae)
    except ValueError as error:
        remedy = f"; make it anew: sae-fast encode {source} --overwrite" if store is None else ""
        raise ValueError(f"{error}{remedy}") from error
    sae = sae.to(usable(device))
    title, facts = title_of(sae), {} if run is None else facts_of(run)
    return write_page(out, opened, sae, known, title=title, facts=facts, progress=progress, **limits)


def read_effects(file: Path) -> dict[int, float]:
    """feature → effect from a JSON object.  ValueError, with the path, for anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"effects: {file} is {files.lfs_pointer(file) or f'not JSON: {error}'}") from error
    if not isinstance(value, dict) or not all(key.isascii() and key.isdigit() for key in value):
        raise ValueError(f'effects: {file} holds no object from features to effects, want {{"12": 0.5, ...}}')
    return {int(key): effect for key, effect in value.items()}


def title_of(sae: SparseAutoencoder) -> str:
    """The place and model that an SAE's metadata names, or nothing."""
    model, place = sae.metadata.get("model_name"), sae.metadata.get("hook_name")
    if place is None and sae.metadata.get("layer") is not None:
        place = f"layer {sae.metadata['layer']}"
    return f"SAE on {place} of {model}" if model and place else ""


def facts_of(run: Path) -> Mapping[str, str]:
    """The facts that a run's metrics.json adds to the page, as far as it is there."""
    try:
        held_out = files.read_json(run / METRICS)["held_out"]
        return {f"FVU on {held_out['tokens']:,} held-out tokens": f"{held_out['fvu']:.3g}"}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
