"""The source of an SAE's activations in its metadata: written when it is trained, read to make them again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_fast.data.activations import ActivationStore
from sae_fast.data.harvest import cache_folder, harvest, reopened
from sae_fast.data.text import read_text_file, stdlib_documentation
from sae_fast.data.transformer import Source
from sae_fast.nn import SparseAutoencoder

ALIASES = {"gpt2-small": "gpt2"}  # a name of TransformerLens' own
STDLIB = "stdlib_documentation()"  # where a run's text is from, when it is not a file


def source_of(model: str | Path, text_from: str | Path | None, store: ActivationStore) -> dict[str, Any]:
    """The entry "source" of an SAE's metadata, for :func:`activations_of`.  text_from: a file, STDLIB, or None for a
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
        model, text_of(text_from), **place, context_length=length, d=sae.d_in, text_from=text_from, device=device,
        progress=progress,
    )  # fmt: skip
    if store.info["key"] != key:
        raise ValueError(f"{name}: {model} or the text, {text_from}, has changed since; {remedy}")
    return store


class Known(NamedTuple):
    """The place that an SAE belongs to, as its metadata says; None where it does not."""

    model: str | None
    place: dict[str, Any] | None
    length: int | None
    text: str | None


def known_of(metadata: Mapping[str, Any]) -> Known:
    """The place that an SAE of this metadata belongs to, as a run's source says, or another package's config."""
    source = metadata["source"] if isinstance(metadata.get("source"), dict) else {}
    hook, layer = metadata.get("hook_name"), metadata.get("layer")
    place = {"hook": hook} if hook else None if layer is None else {"layer": layer}
    model = metadata.get("model_name")
    return Known(
        source.get("model") or ALIASES.get(str(model), model),
        source.get("place") or place,
        source.get("context_length") or metadata.get("context_size"),
        source.get("text"),
    )


def check_agreement(known: Known, model: str | None, place: dict[str, Any], length: int | None) -> None:
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


def text_of(text_from: str | Path) -> str:
    """The text that a run was made of: a file's, or the documentation inside Python's library."""
    return stdlib_documentation() if text_from == STDLIB else read_text_file(text_from)
