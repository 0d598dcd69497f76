"""From an SAE and activations to a feature store: what `sae-fast encode` runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_fast import interop
from sae_fast.analysis import _store_writer
from sae_fast.extras import require
from sae_fast.train.activations import ActivationStore
from sae_fast.train.harvest import cache_folder, harvest
from sae_fast.train.text import read_text_file, stdlib_documentation

STDLIB = "stdlib_documentation()"  # where a run's text is from, when it is not a file


def encode(
    source: str | Path,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    layer: int | None = None,
    text: Path | None = None,
    context_length: int | None = None,
    activations: Path | None = None,
    batch_size: int = _store_writer.BATCH,
    overwrite: bool = False,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Writes the feature store of an SAE; returns (its folder, what its store.json says and ``seconds``).

    source: the folder of a run of `sae-fast demo` or `train`, whose activations are found again by its metrics.json and
    whose store goes into it; or any SAE that :func:`sae_fast.load` takes, with either ``model``, ``layer`` and ``text``,
    or ``activations``, a .npy or .safetensors file of [N, d_in].  Errors as of :func:`sae_fast.analysis.store.write_store`.
    """
    require("pyarrow", extra="store")
    source = Path(source) if Path(source).exists() else source
    run = isinstance(source, Path) and (source / "metrics.json").is_file() and (source / "checkpoint").is_dir()
    out = Path(out or (Path(source) / "store" if run else "out/store"))
    _store_writer.check_free(out, overwrite)
    given = [f"--{name}" for name, value in dict(model=model, layer=layer, text=text).items() if value is not None]
    if activations is not None and given:
        raise ValueError(f"--activations: got {given[0]} too, want the activations or what to make them from")
    sae = interop.load(Path(source) / "checkpoint" if run else source)
    data: ActivationStore | np.ndarray | Tensor
    if activations is not None:
        data = open_activations(activations)
    elif len(given) == 3:
        assert model is not None and layer is not None and text is not None
        data = harvest(model, read_text_file(text), layer, context_length=context_length or 128, device=device)
    elif run and not given and context_length is None:
        data = activations_of(Path(source), device)
    else:
        what = f"{source}: " + ("" if run else "is not the folder of a run; ")
        raise ValueError(
            f"{what}want --model, --layer and --text, or --activations; got {', '.join(given) or 'none of them'}"
        )
    start = time.perf_counter()
    length = None if isinstance(data, ActivationStore) else context_length
    info = _store_writer.write_store(
        out, sae.to(device), data, context_length=length, batch_size=batch_size, overwrite=overwrite, progress=progress
    )
    return out, info | {"seconds": time.perf_counter() - start}


def source_of(model: str | Path, text_from: str | Path | None, store: ActivationStore) -> dict[str, Any]:
    """What a run's metrics.json keeps, for :func:`activations_of`.  text_from: a file, STDLIB, or None for a text that is
    nowhere but in the store of the activations."""
    return {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else str(model),
        "place": store.info["place"],
        "context_length": store.context_length,
        "text": text_from if text_from in (None, STDLIB) else str(Path(text_from).resolve()),
        "activations": store.info["key"],
    }


def activations_of(run: Path, device: str = "cpu") -> ActivationStore:
    """The activations that a run was trained on: from the cache, or harvested again.

    ``ValueError`` when metrics.json does not say which, or when model or text have changed since.
    """
    file = run / "metrics.json"
    try:
        source = json.loads(file.read_text(encoding="utf-8"))["source"]
        key, text_from, where = source["activations"], source["text"], (source["model"], source["place"])
        length = source["context_length"]
    except (ValueError, KeyError, TypeError) as error:
        reason = "it does not say what the SAE was trained on, want --model, --layer and --text"
        raise ValueError(f"{file}: {reason}") from error
    cached = cache_folder() / "activations" / key
    if cached.is_dir():
        return ActivationStore.open(cached)
    if text_from is None:
        raise ValueError(f"{file}: the run's text is no longer in the cache, want --model, --layer and --text")
    text = stdlib_documentation() if text_from == STDLIB else read_text_file(text_from)
    store = harvest(where[0], text, **where[1], context_length=length, device=device)
    if store.info["key"] != key:
        raise ValueError(
            f"{file}: {where[0]} or the text, {text_from}, has changed since; want --model, --layer and --text"
        )
    return store


def open_activations(file: Path) -> np.ndarray | Tensor:
    """[N, d] in a .npy or .safetensors file, mapped, not read.  No pickle is executed."""
    if not file.is_file():
        raise FileNotFoundError(f"activations: {file} does not exist")
    if file.suffix == ".npy":
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"activations: {file} is damaged or holds no numbers: {error}") from error
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
                if len(names) != 1:
                    raise ValueError(f"activations: {file} holds {len(names)} tensors, want one of [N, d_in]")
                return tensors.get_tensor(names[0])
        except SafetensorError as error:
            raise ValueError(f"activations: {file} is truncated or damaged: {error}") from error
    raise ValueError(f"activations: got {file.name}, want a .npy or .safetensors file")
