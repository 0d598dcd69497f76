"""SAEBench's folder: dictionary_learning's, with the model's name and the layer that its loaders compare, the
trainer_class that they look for, and unit decoder rows.  It is read as what it is: dictionary_learning's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sae_fast.interop import _norms
from sae_fast.interop._norms import Unfold
from sae_fast.interop.formats import dictionary_learning
from sae_fast.interop.formats._common import Loaded, layer_of, refuse
from sae_fast.nn import ReluSAE, SparseAutoencoder

NAME, ORDER, UNIT_ROWS = "saebench", 4, True
FILES_OF, CONFIG, SIGN = dictionary_learning.NAME, dictionary_learning.CONFIG, ""
FILES, BESIDE, OPTIONS = (), (), ()


def finds(path: Path) -> bool:
    return False


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return False


def read(path: Path) -> Loaded:
    return dictionary_learning.read(path)


def write(sae: SparseAutoencoder, folder: Path, overwrite: bool, unfold: Unfold | None) -> None:
    layer = sae.metadata.get("layer", layer_of(sae.metadata.get("hook_name")))
    if not isinstance(layer, int):
        raise refuse(NAME, sae, f"layer: got {layer!r}, want an int, in sae.metadata or as an argument (--layer)")
    if not sae.metadata.get("model_name"):
        raise refuse(NAME, sae, "model_name: missing; want it in sae.metadata or as an argument (--model-name)")
    if said := _norms.why_not_unit(sae):
        raise refuse(NAME, sae, said)
    if isinstance(sae, ReluSAE) and not sae.apply_b_dec_to_input:
        raise refuse(NAME, sae, "apply_b_dec_to_input: got False, and its ReLU class always subtracts b_dec")
    if sae.d_sae < sae.d_in:
        raise refuse(NAME, sae, f"d_sae: got {sae.d_sae}, want at least d_in = {sae.d_in}")
    dictionary_learning.write(sae, folder, overwrite, unfold)
