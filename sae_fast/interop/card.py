"""A model card: the README.md beside an SAE on the Hub, which says what it is, where it comes from and how it is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sae_fast.nn import SparseAutoencoder

NAME = "README.md"
ABOUT = {
    "model_name": "model", "layer": "layer", "hook_name": "takes the activations of", "hook_name_out": "gives those of",
    "dataset_path": "trained on", "context_size": "context length", "format": "was read from a file of",
}  # fmt: skip
THEIRS = {
    "saelens": "from sae_lens import SAE\n\nsae = SAE.load_from_disk({folder})",
    "dictionary_learning": "from dictionary_learning.utils import load_dictionary\n\n"
    'sae, config = load_dictionary({folder}, device="cpu")',
    "sparsify": "from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_disk({folder})",
}  # in the package whose format it is
END = re.compile(r"<!-- sae_fast made this card: ([0-9a-f]{16}) -->\s*")


def text(
    sae: SparseAutoencoder, format: str, repo_id: str, folder: str, about: Mapping[str, Any], metrics: Mapping[str, Any]
) -> str:
    """The card of an SAE that is in a ``folder`` of a repository in a format.  ``about``: its metadata; ``metrics``:
    numbers by name, others are left out."""
    card = "\n".join(_lines(sae, format, repo_id, folder.strip("/"), about, metrics))
    return f"{card}\n<!-- sae_fast made this card: {_digest(card)} -->\n"


def is_ours(card: str) -> bool:
    """True for a card that :func:`text` made, and nobody changed since."""
    end = END.search(card)
    return end is not None and end.end() == len(card) and _digest(card[: end.start()].removesuffix("\n")) == end[1]


def _lines(
    sae: SparseAutoencoder, format: str, repo_id: str, folder: str, about: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Iterator[str]:
    model = about.get("model_name")
    yield from ("---", "library_name: sae_fast", "tags:", "- sparse-autoencoder")
    if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        yield f"base_model: {json.dumps(model)}"
    yield from ("---", "", f"# {type(sae).__name__}, {sae.d_sae} features", "", "| | |", "|---|---|")
    sizes = {"d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": str(sae.W_enc.dtype).removeprefix("torch."), **sae.options()}
    if isinstance(k := getattr(sae, "k", None), (int, float)):
        sizes["k"] = k
    for name, value in sizes.items():
        yield f"| {name} | {_cell(value)} |"
    for name, words in ABOUT.items():
        if isinstance(value := about.get(name), (str, int)) and value != "":
            yield f"| {words} | {_cell(value)} |"
    numbers = {n: v for n, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    if numbers:
        yield from ("", "## Metrics", "", "| | |", "|---|---|", *(f"| {_cell(n)} | {v:.6g} |" for n, v in numbers.items()))
    place = f"{repo_id}/{folder}" if folder else repo_id
    yield from ("", "## How to load it", "", "```python", "import sae_fast as sf", "")
    yield from (f"sae = sf.load({json.dumps(place)})", "code = sae.encode_sparse(x)", "```")
    if format in THEIRS:
        local = f"snapshot_download({json.dumps(repo_id)})" + (f" + {json.dumps('/' + folder)}" if folder else "")
        yield from ("", f"It is in the format of {format}, which loads it so:", "", "```python")
        yield from ("from huggingface_hub import snapshot_download", THEIRS[format].format(folder=local), "```")


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _digest(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()[:16]
