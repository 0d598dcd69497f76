"""From an SAE and activations to a feature store: what `sae-fast encode` runs."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_fast import interop
from sae_fast.analysis.store import check_free, writer
from sae_fast.data.activations import ActivationStore
from sae_fast.data.harvest import cache_folder, harvest, reopened
from sae_fast.data.text import read_text_file, stdlib_documentation
from sae_fast.data.transformer import Source
from sae_fast.devices import usable
from sae_fast.extras import require
from sae_fast.files import lfs_pointer
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.identity import fingerprint
from sae_fast.run_folder import STORE, run_of

ALIASES = {"gpt2-small": "gpt2"}  # a name of TransformerLens' own
STDLIB = "stdlib_documentation()"  # where a run's text is from, when it is not a file


def encode(
    source: str | Path,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    text: Path | None = None,
    context_length: int | None = None,
    activations: Path | None = None,
    batch_size: int = writer.BATCH,
    overwrite: bool = False,
    anyway: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Writes the feature store of an SAE; returns (its folder, what its store.json says and ``seconds``).

    source: any SAE that :func:`sae_fast.load` takes.  What is not given of ``model``, ``layer`` or ``hook``, ``text`` and
    ``context_length`` is what the SAE's metadata says; of a run of `sae-fast demo` or `train` nothing has to be.  What
    contradicts it is an error, unless ``anyway``.  activations: a .npy or .safetensors file of [N, d_in] instead.  out: by
    default the run's store/, or a folder in out/store of the SAE's own.
    Errors as of :func:`sae_fast.load`, `harvest` and :func:`sae_fast.analysis.store.write_store`.
    """
    require("pyarrow", extra="store")
    chosen = usable(device)
    asked = {"--model": model, "--layer": layer, "--hook": hook, "--text": text}
    given = [name for name, value in asked.items() if value is not None]
    if activations is not None and given:
        raise ValueError(f"--activations: got {given[0]} too, want the activations or what to make them from")
    sae = interop.load(source)
    out = Path(out) if out is not None else default_store(source, sae)
    check_free(out, overwrite)
    data: ActivationStore | np.ndarray | Tensor
    if activations is not None:
        data = open_activations(activations)
    elif not given and context_length is None and "source" in sae.metadata:
        data = activations_of(sae, source, chosen, progress)
    else:
        known = _known(sae.metadata)
        place = {"layer": layer, "hook": hook} if layer is not None or hook is not None else known.place
        model_, text_ = model or known.model, text or known.text
        wanted = {"--model": model_, "--layer (or --hook)": place, "--text": text_}
        if missing := [name for name, value in wanted.items() if value is None]:
            which = " and ".join(missing)
            raise ValueError(f"{source}: its metadata does not say {which}; want that, or --activations")
        assert model_ is not None and place is not None and text_ is not None
        if not anyway:
            _check_agreement(known, model, place, context_length)
        data = harvest(
            model_, _text(text_), **place, context_length=context_length or known.length or 128, d=sae.d_in,
            text_from=str(text_), device=chosen, progress=progress,
        )  # fmt: skip
    start = time.perf_counter()
    length = None if isinstance(data, ActivationStore) else context_length
    info = writer.write_store(
        out, sae.to(chosen), data, context_length=length, batch_size=batch_size, overwrite=overwrite, progress=progress
    )
    return out, info | {"seconds": time.perf_counter() - start}


def default_store(source: str | Path, sae: SparseAutoencoder) -> Path:
    """Where the store of an SAE is when it is not said: in its run, or in a folder of its own in out/store."""
    if (run := run_of(source)) is not None:
        return run / STORE
    name = Path(source).resolve().name if Path(source).exists() else re.sub(r"[^\w.-]+", "-", str(source))
    return Path("out/store") / f"{name}-{fingerprint(sae)[:8]}"


# ---- What an SAE says of itself --------------------------------------------------------------------------------------


def source_of(model: str | Path, text_from: str | Path | None, store: ActivationStore) -> dict[str, Any]:
    """What an SAE's metadata keeps under "source", for :func:`activations_of`.  text_from: a file, STDLIB, or None for a
    text that is nowhere but in the store of the activations."""
    return {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else str(model),
        "place": store.info["place"],
        "context_length": store.context_length,
        "text": text_from if text_from in (None, STDLIB) else str(Path(text_from).resolve()),
        "text_sha256": store.info["text"]["sha256"],
        "activations": store.info["key"],
    }


def activations_of(
    sae: SparseAutoencoder, name: str | Path = "sae", device: str | torch.device = "cpu", progress: bool = True
) -> ActivationStore:
    """The activations that an SAE was trained on, as its metadata says: from the cache, or harvested again.

    ``ValueError`` when it does not say, or when model or text have changed since.  name: what errors call the SAE.
    """
    remedy = "want --model, --layer (or --hook) and --text"
    try:
        source = sae.metadata["source"]
        key, text_from, model = source["activations"], source["text"], source["model"]
        place, length = source["place"], source["context_length"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}: its metadata does not say what it was trained on, {remedy}") from error
    cached = cache_folder() / "activations" / key
    if cached.is_dir():
        return reopened(cached)
    if text_from is None:
        raise ValueError(f"{name}: its text is no longer in the cache, {remedy}")
    store = harvest(
        model, _text(text_from), **place, context_length=length, d=sae.d_in, text_from=text_from, device=device,
        progress=progress,
    )  # fmt: skip
    if store.info["key"] != key:
        raise ValueError(f"{name}: {model} or the text, {text_from}, has changed since; {remedy}")
    return store


class _Known(NamedTuple):
    """What an SAE's metadata says of where it belongs; None where it does not."""

    model: str | None
    place: dict[str, Any] | None
    length: int | None
    text: str | None


def _known(metadata: Mapping[str, Any]) -> _Known:
    source = metadata["source"] if isinstance(metadata.get("source"), dict) else {}
    hook, layer = metadata.get("hook_name"), metadata.get("layer")
    place = {"hook": hook} if hook else None if layer is None else {"layer": layer}
    model = metadata.get("model_name")
    return _Known(
        source.get("model") or ALIASES.get(str(model), model),
        source.get("place") or place,
        source.get("context_length") or metadata.get("context_size"),
        source.get("text"),
    )


def _check_agreement(known: _Known, model: str | None, place: dict[str, Any], length: int | None) -> None:
    """ValueError, with both, for what is given and the metadata contradicts.  Models agree by the last part of their
    names; places are compared in the model."""

    def differ(option: str, got: Any, said: Any) -> ValueError:
        return ValueError(f"{option}: got {got}, but the SAE's metadata says {said}; want that, or --anyway")

    if model is not None and known.model is not None and _short(model) != _short(known.model):
        raise differ("--model", model, known.model)
    if length is not None and known.length is not None and length != known.length:
        raise differ("--context-length", length, known.length)
    if known.place is not None and place != known.place:
        source = Source.open(model or known.model or "")
        if source.place(**place)[:2] != source.place(**known.place)[:2]:
            (got,), (said,) = ([pair for pair in p.items() if pair[1] is not None] for p in (place, known.place))
            raise differ(f"--{got[0]}", got[1], " ".join(map(str, said)))


def _short(model: str) -> str:
    name = Path(model).name.lower()
    return ALIASES.get(name, name)


def _text(text_from: str | Path) -> str:
    return stdlib_documentation() if text_from == STDLIB else read_text_file(text_from)


def open_activations(file: Path) -> np.ndarray | Tensor:
    """[N, d] in a .npy or .safetensors file, mapped, not read.  No pickle is executed."""
    if not file.is_file():
        raise FileNotFoundError(f"activations: {file} does not exist")
    if file.suffix == ".npy":
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            said = lfs_pointer(file) or f"damaged or holds no numbers: {error}"
            raise ValueError(f"activations: {file} is {said}") from error
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
                if len(names) != 1:
                    raise ValueError(f"activations: {file} holds {len(names)} tensors, want one of [N, d_in]")
                return tensors.get_tensor(names[0])
        except SafetensorError as error:
            said = lfs_pointer(file) or f"truncated or damaged: {error}"
            raise ValueError(f"activations: {file} is {said}") from error
    raise ValueError(f"activations: got {file.name}, want a .npy or .safetensors file")
