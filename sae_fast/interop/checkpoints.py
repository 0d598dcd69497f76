"""load, save and convert: an SAE from any format to any other that can hold it, exactly, or not at all."""

from __future__ import annotations

import copy
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from sae_fast import arguments
from sae_fast.interop import _norms, hub
from sae_fast.interop.formats import FORMATS, READERS, Loaded, config_of, format_of
from sae_fast.nn import KINDS, GatedSAE, SparseAutoencoder
from sae_fast.nn.scale import scale_input_, unscale_


def load(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    activation_scale: float | None = None,
    fold_decoder_norm: bool = False,
    k: int | None = None,
    recipe: str | None = None,
) -> SparseAutoencoder:
    """The SAE in a folder or file of a format (see ``sae_fast.interop.formats.READERS``), found by its files' names and the
    names in them; or in the folder of a run of `sae-fast demo` or `train`.

    ``path`` that is not there is taken as a place on the Hugging Face Hub: "user/repo", "user/repo/folder",
    "user/repo/folder@revision", or a file's there.  ``dtype``: of the weights, by default as they are in the file.
    ``activation_scale`` s: the SAE was trained on s · x, and is made one of x: W_enc·s, W_dec/s, b_dec/s (SAELens'
    normalize_activations "expected_average_only_in", whose s is in the files of training checkpoints only).
    ``fold_decoder_norm``: decoder rows are made unit and features count their norms: exact in the reals, f_i times n_i.
    ``k``: of formats that keep it in a repository's name (Qwen-Scope) or nowhere.  ``recipe``: of Llama Scope, see
    docs/formats.md.

    ``sae.metadata`` has where it came from: format, model_name, layer, hook_name, and the config as it was.  A warning says
    what the numbers alone do not.  ``FileNotFoundError`` when there is nothing; ``ValueError`` that names the file, and the
    tensor or key, when it is damaged or of a kind that no layer here holds.  No pickle is executed.
    """
    options = {"k": k, "recipe": recipe}
    return _read(path, dtype, activation_scale, fold_decoder_norm, options, stacklevel=3).sae.to(device)


def save(
    sae: SparseAutoencoder,
    path: str | os.PathLike,
    format: str = "sae_fast",
    *,
    overwrite: bool = False,
    fold_decoder_norm: bool | None = None,
    model_name: str | None = None,
    layer: int | None = None,
    hook_name: str | None = None,
) -> None:
    """Writes ``sae`` into the folder ``path`` in a format, a name of ``sae_fast.interop.formats.FORMATS``.

    ``ValueError`` names the key or tensor that a format cannot hold; ``FileExistsError`` when the folder has such files
    already and ``overwrite`` is not given.  ``fold_decoder_norm``: whether decoder rows are made unit (see :func:`load`).
    By default that is done for formats whose own SAEs are so, dictionary_learning's and SAEBench's, where this SAE's rows
    are not; what came from dictionary_learning goes back as it was, and TopK and BatchTopK, which would choose other
    features, stay as they are.  Such a folder also gets what it takes to undo the folding bit for bit.
    """
    _write(sae, path, format, overwrite, fold_decoder_norm, dict(model_name=model_name, layer=layer, hook_name=hook_name))


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str,
    *,
    as_jumprelu: bool = False,
    dtype: torch.dtype | None = None,
    activation_scale: float | None = None,
    k: int | None = None,
    recipe: str | None = None,
    overwrite: bool = False,
    fold_decoder_norm: bool | None = None,
    model_name: str | None = None,
    layer: int | None = None,
    hook_name: str | None = None,
) -> SparseAutoencoder:
    """Reads ``source`` as :func:`load` does, writes it as :func:`save` does, and returns what was written.

    Decoder norms that an earlier conversion folded are unfolded first, to the same bits.  ``as_jumprelu``: a Gated SAE is
    written as the JumpReLU SAE of the same function (exact up to ties, see ``GatedSAE.to_jumprelu``).  ``ValueError``, with
    both, for a ``model_name``, ``layer`` or ``hook_name`` that contradicts what the source says.
    """
    if to not in FORMATS:
        raise ValueError(f"to: got {to!r}, want one of {sorted(FORMATS)}")
    loaded = _read(source, dtype, activation_scale, False, {"k": k, "recipe": recipe}, stacklevel=3)
    sae = loaded.sae
    if loaded.unfold is not None:
        _norms.unfold(sae, loaded.unfold)
    if as_jumprelu:
        if not isinstance(sae, GatedSAE):
            raise ValueError(f"as_jumprelu: got a {type(sae).__name__}, want a GatedSAE")
        sae = sae.to_jumprelu(apply_b_dec_to_input=False if to == "dictionary_learning" else None)
    about = dict(model_name=model_name, layer=layer, hook_name=hook_name)
    for name, got in about.items():
        said = sae.metadata.get(name)
        if None not in (got, said) and got != said:
            raise ValueError(f"{name}: got {got!r}, but the SAE's metadata says {said!r}")
    return _write(sae, destination, to, overwrite, fold_decoder_norm, about)


def _read(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    scale: float | None,
    fold: bool,
    options: dict[str, Any],
    stacklevel: int,
) -> Loaded:
    place = Path(path)
    if not place.exists():
        place = hub.fetch(os.fspath(path))
    if FORMATS["sae_fast"].finds(place / "checkpoint") and not any(format.finds(place) for format in READERS.values()):
        place = place / "checkpoint"  # of a run
    format = format_of(place)
    given = {name: value for name, value in options.items() if value is not None}
    for name in set(given) - set(format.OPTIONS):
        raise ValueError(f"{name}: got {given[name]!r}, but the files of {format.NAME} say what it is, or have none")
    loaded = format.read(place, **given)
    loaded.sae.metadata["format"] = format.NAME
    if dtype is not None and loaded.sae.W_enc.dtype != arguments.floating("dtype", dtype):
        loaded.sae.to(dtype)
        loaded.unfold = None
    if loaded.unfold is not None and _norms.digest(loaded.sae) != loaded.unfold.digest:
        loaded.unfold = None  # it was trained on since
    bad = [f"{name}: {n} of its numbers are NaN or infinite" for name, n in loaded.sae.not_finite().items()]
    if scale is None and loaded.unscaled is not None:
        scale = loaded.scale
        if scale is None:
            raise ValueError(f"{loaded.unscaled}: the scale is not in the files; want activation_scale")
    if scale is not None:
        if (
            loaded.scale is not None
            and not loaded.free_scale
            and not math.isclose(_checked(scale), loaded.scale, rel_tol=1e-3)
        ):
            raise ValueError(f"activation_scale: got {scale}, but the files say {loaded.scale}")
        scale_input_(loaded.sae, _checked(scale), loaded.scale_out)
        loaded.unfold = None
    if fold:
        _norms.fold(loaded.sae)
        loaded.unfold = None
    for note in bad + [n for n in loaded.notes if not (fold and "fold_decoder_norm" in n)]:
        warnings.warn(f"{place}: {note}", stacklevel=stacklevel)
    return loaded


def _write(
    sae: SparseAutoencoder,
    path: str | os.PathLike,
    format: str,
    overwrite: bool,
    fold: bool | None,
    about: dict[str, Any],
) -> SparseAutoencoder:
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}, want one of {sorted(FORMATS)}")
    files = FORMATS[FORMATS[format].FILES_OF]
    if others := {name for name, f in READERS.items() if f.finds(Path(path))} - {files.NAME}:
        raise FileExistsError(f"path: {path} holds an SAE of {', '.join(sorted(others))}; want a folder of its own")
    if overwrite and (Path(path) / files.CONFIG).exists() and not files.finds(Path(path)):
        raise FileExistsError(f"path: the {files.CONFIG} in {path} is not of such an SAE; want a folder of its own")
    if type(sae) not in KINDS.values():  # a subclass may compute anything
        raise ValueError(f"sae: got {type(sae).__name__}, want one of {sorted(KINDS)} itself")
    sae.check_dtypes()
    sae = copy.deepcopy(sae)
    unscale_(sae)
    sae.metadata |= {name: value for name, value in about.items() if value is not None}
    if about["layer"] is not None:
        sae.metadata["layer"] = arguments.whole("layer", about["layer"], 0, wanted="an int from 0")
    if fold is None:
        came_so = format == "dictionary_learning" and bool(config_of(sae, "dictionary_learning"))
        fold = FORMATS[format].UNIT_ROWS and not came_so and not _norms.is_unit(sae) and not _norms.chooses(sae)
    FORMATS[format].write(sae, Path(path), overwrite, _norms.fold(sae) if fold else None)
    return sae


def _checked(scale: Any) -> float:
    return float(arguments.average("activation_scale", scale, sys.float_info.max, "a positive number"))
