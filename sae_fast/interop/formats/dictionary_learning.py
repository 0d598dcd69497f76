"""dictionary_learning's folder: ``ae.pt``, a state_dict, and ``config.json``, whose trainer.dict_class names the class.

Also a single file of weights (``checkpoints/ae_1000.pt``), and the dict that ``backup_steps`` leaves, whose weights are
those for normalised activations.  Classes and keys: those of the package at 0.1.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast import arguments, nn
from sae_fast.files import json_writer, key, read_json, safetensors_writer, write_files
from sae_fast.interop import _norms
from sae_fast.interop._files import Tensors, pt_writer, read_safetensors, read_state_dict
from sae_fast.interop._norms import Unfold
from sae_fast.interop.formats._common import (
    KEY,
    Loaded,
    build,
    config_of,
    layer_of,
    mapping,
    named_after_model,
    own,
    refuse,
    remember,
    to_keep,
    weights_in,
)
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.scale import scale_

NAME, ORDER, UNIT_ROWS = "dictionary_learning", 1, True
FILES_OF, SIGN = NAME, "ae.pt (dictionary_learning)"
WEIGHTS, CONFIG, UNFOLD = "ae.pt", "config.json", "sae_fast_unfold.safetensors"
FILES, BESIDE, OPTIONS = (WEIGHTS, "ae_*.pt"), (CONFIG, f"../{CONFIG}", UNFOLD), ()
OLDEST = "active_features_encoder.weight"  # of the first Gated class, whose two encoders were not tied


def finds(path: Path) -> bool:
    return (path / WEIGHTS).is_file() or (path.is_file() and bool(weights_in(path, FILES)))


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    names = set(shapes)
    return file.suffix == ".pt" and ("ae" in names or OLDEST in names or any(_fits(names, keys) for keys in KEYS.values()))


def read(path: Path) -> Loaded:
    file = path if path.is_file() else path / WEIGHTS
    config, config_file = _config(file)
    trainer = key(config, config_file, dict, "trainer") if "trainer" in config else {}
    state, factor = _state(file)
    tensors = Tensors(file, state)
    if OLDEST in tensors:
        raise ValueError(
            f"{file}: {OLDEST}, feature_magnitudes_encoder.weight: the first Gated class had two encoders that were not "
            "tied; GatedSAE holds one, so there is no exact form"
        )
    name = _class(config, config_file, tensors)
    sae = READERS[name](tensors, config, config_file)
    tensors.finish()
    remember(sae, config, NAME)
    for ours, theirs in (("model_name", "lm_name"), ("layer", "layer")):
        if trainer.get(theirs) not in (None, ""):
            sae.metadata[ours] = trainer[theirs]
    named_after_model(sae, file, "deepseek-ai")
    if factor is not None:  # a backup of a run on normalised activations: as its trainer scales at the end
        scale_(sae, factor)
        if isinstance(sae, nn.TopKSAE) and sae.metadata["threshold"] >= 0:
            sae.metadata["threshold"] *= factor
        sae.metadata["norm_factor"] = factor
    return Loaded(sae, _unfold(file.parent, sae, config), notes=_notes(sae, name))


def write(sae: SparseAutoencoder, folder: Path, overwrite: bool, unfold: Unfold | None) -> None:
    sae.check_plain(f"save it as {NAME}")
    name, tensors = _tensors(sae)
    config = config_of(sae, NAME)
    if name == "AutoEncoder" and not config and (zero := (_norms.norms(sae) == 0).nonzero()[:, 0].tolist()):
        said = f"W_dec: rows {zero[:5]} are zero, with which the package loads no such file; want fold_decoder_norm"
        raise refuse(NAME, sae, said)
    trainer = mapping(config.get("trainer"))
    if trainer.get("dict_class") != name:
        trainer = {"dict_class": name, "trainer_class": TRAINERS[name]}
    trainer.setdefault("trainer_class", TRAINERS[name])
    trainer |= {"activation_dim": sae.d_in, "dict_size": sae.d_sae}
    layer = sae.metadata.get("layer", layer_of(sae.metadata.get("hook_name")))
    about = {"layer": layer, "lm_name": sae.metadata.get("model_name"), "k": getattr(sae, "k", None)}
    trainer |= {name: value for name, value in about.items() if value is not None}
    config["trainer"] = trainer
    config[KEY] = to_keep(sae, NAME, **({"unfold": unfold.digest} if unfold else {}))
    files: dict[str, Callable[[Path], None]] = {WEIGHTS: pt_writer(tensors)}
    if unfold:
        files[UNFOLD] = safetensors_writer(unfold.tensors(), {"format": "pt"})
    write_files(folder, {**files, CONFIG: json_writer(config)}, overwrite)


# ---- Reading --------------------------------------------------------------------------------------------------------


def _config(file: Path) -> tuple[dict[str, Any], Path]:
    """config.json beside the weights, or above the folder ``checkpoints``; empty where there is none."""
    for folder in (file.parent, file.parent.parent) if file.parent.name == "checkpoints" else (file.parent,):
        if (folder / CONFIG).is_file():
            return read_json(folder / CONFIG), folder / CONFIG
    return {}, file.parent / CONFIG


def _state(file: Path) -> tuple[dict[str, Tensor], float | None]:
    """The weights, and the factor of a backup's activations that its biases do not have yet."""
    value = read_state_dict(file)
    if not isinstance(value.get("ae"), dict):
        return value, None
    factor = value.get("norm_factor")
    factor = factor.item() if isinstance(factor, Tensor) and factor.numel() == 1 else factor
    if factor is not None and (
        isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf
    ):
        raise ValueError(f"{file}: norm_factor: got {factor!r}, want a positive number or None")
    return value["ae"], factor


def _class(config: dict[str, Any], file: Path, tensors: Tensors) -> str:
    if "dict_class" in config.get("trainer", {}):
        name = key(config, file, str, "trainer", "dict_class")
        if name not in READERS:
            raise ValueError(f"{file}: trainer.dict_class: got {name!r}, want one of {sorted(READERS)}")
        return name
    fitting = [name for name, keys in KEYS.items() if _fits(tensors.names(), keys)]
    if len(fitting) != 1:
        said = f"its tensors {sorted(tensors.names())} fit {' and '.join(fitting) or 'no class'}"
        raise ValueError(f"{file}: trainer.dict_class: missing, and {said}")
    return fitting[0]


def _fits(names: set[str], keys: set[str]) -> bool:
    return keys - (ADDED if "k" in keys else set()) <= names <= keys


def _gated(tensors: Tensors, config: dict, file: Path) -> SparseAutoencoder:
    W_enc = tensors.take("encoder.weight", None, None)
    F, d = W_enc.shape
    b_dec, W_dec = tensors.take("decoder_bias", d), tensors.take("decoder.weight", d, F).T
    b_gate, b_mag, r_mag = (tensors.take(name, F) for name in ("gate_bias", "mag_bias", "r_mag"))
    values = dict(W_enc=W_enc, b_gate=b_gate, b_mag=b_mag, r_mag=r_mag, W_dec=W_dec, b_dec=b_dec)
    return build(nn.GatedSAE, tensors.file, values)


def _relu(tensors: Tensors, config: dict, file: Path) -> SparseAutoencoder:
    W_enc = tensors.take("encoder.weight", None, None)
    F, d = W_enc.shape
    b_enc, W_dec, b_dec = tensors.take("encoder.bias", F), tensors.take("decoder.weight", d, F).T, tensors.take("bias", d)
    return build(nn.ReluSAE, tensors.file, dict(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec))


def _relu_new(tensors: Tensors, config: dict, file: Path) -> SparseAutoencoder:
    W_enc = tensors.take("encoder.weight", None, None)
    F, d = W_enc.shape
    b_enc, W_dec = tensors.take("encoder.bias", F), tensors.take("decoder.weight", d, F).T
    values = dict(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=tensors.take("decoder.bias", d))
    return build(nn.ReluSAE, tensors.file, values, apply_b_dec_to_input=False)


def _jumprelu(tensors: Tensors, config: dict, file: Path) -> SparseAutoencoder:
    W_enc = tensors.take("W_enc", None, None).T
    F, d = W_enc.shape
    values = dict(
        W_enc=W_enc, b_enc=tensors.take("b_enc", F), threshold=tensors.take("threshold", F),
        W_dec=tensors.take("W_dec", F, d), b_dec=tensors.take("b_dec", d),
    )  # fmt: skip
    return build(nn.JumpReluSAE, tensors.file, values, apply_b_dec_to_input=False)


def _topk(tensors: Tensors, config: dict, file: Path) -> SparseAutoencoder:
    values, k, threshold = _linear_topk(tensors, config, file)
    sae = build(nn.TopKSAE, tensors.file, values, k=k)
    sae.metadata["threshold"] = float(threshold)  # which its encode takes when it is asked to, instead of the k largest
    return sae


def _batchtopk(tensors: Tensors, config: dict, file: Path) -> SparseAutoencoder:
    values, k, threshold = _linear_topk(tensors, config, file)
    return build(nn.BatchTopKSAE, tensors.file, {**values, "threshold": threshold}, k=k)


def _matryoshka(tensors: Tensors, config: dict, file: Path) -> SparseAutoencoder:
    W_enc = tensors.take("W_enc", None, None).T
    F, d = W_enc.shape
    values = dict(
        W_enc=W_enc, b_enc=tensors.take("b_enc", F), W_dec=tensors.take("W_dec", F, d), b_dec=tensors.take("b_dec", d)
    )
    values["threshold"] = _threshold(tensors)
    k, groups = _k(tensors, config, file), tensors.take("group_sizes", None).tolist()
    return build(nn.BatchTopKSAE, tensors.file, values, k=k, group_sizes=groups)


def _linear_topk(tensors: Tensors, config: dict, file: Path) -> tuple[dict[str, Tensor], int | float, Tensor]:
    W_enc = tensors.take("encoder.weight", None, None)
    F, d = W_enc.shape
    values = dict(
        W_enc=W_enc, b_enc=tensors.take("encoder.bias", F), W_dec=tensors.take("decoder.weight", d, F).T,
        b_dec=tensors.take("b_dec", d),
    )  # fmt: skip
    return values, _k(tensors, config, file), _threshold(tensors)


def _threshold(tensors: Tensors) -> Tensor:
    """A scalar; −1, unset, in files from before 2024-12-22, which have none."""
    return tensors.take("threshold").float() if "threshold" in tensors else torch.tensor(-1.0)


def _k(tensors: Tensors, config: dict, file: Path) -> int | float:
    """k of the tensors, with which the config's must agree; in files from before 2024-12-22 it is the config's."""
    said = mapping(config.get("trainer")).get("k")
    if "k" not in tensors:
        return arguments.whole(f"{file}: trainer.k", said, wanted=f"a positive int, as {tensors.file} holds no k")
    held = tensors.take("k").item()
    k = arguments.average(f"{tensors.file}: k", held, 2**31, "a positive whole number")
    if said is not None and said != k:
        raise ValueError(f"{file}: trainer.k: got {said!r}, but {tensors.file} holds k = {k}")
    return k


def _notes(sae: SparseAutoencoder, name: str) -> list[str]:
    if isinstance(sae, nn.BatchTopKSAE) and not sae.has_threshold():
        return [
            "threshold: it was never set; here the k largest a row of the batch are taken, the package takes all of ReLU"
        ]
    if name not in ("GatedAutoEncoder", "AutoEncoder") or _norms.is_unit(sae):
        return []
    when = (
        "files from before 2025-01-07, and what was trained then, count features times these norms"
        if name == "GatedAutoEncoder"
        else "the package itself folds them in when it loads such a file"
    )
    return [
        f"the decoder's norms are not 1; {when}: fold_decoder_norm=True does so.  Reconstructions are the same either way"
    ]


def _unfold(folder: Path, sae: SparseAutoencoder, config: dict[str, Any]) -> Unfold | None:
    digest = own(config).get("unfold")
    if not isinstance(digest, str) or not (folder / UNFOLD).is_file():
        return None
    tensors = read_safetensors(folder / UNFOLD)
    matrices = ("ulps.W_enc", "ulps.W_dec")
    taken = {name: tensors.take(name, sae.d_sae, *[sae.d_in] * (name in matrices)) for name in sorted(tensors.names())}
    return Unfold.of_tensors(taken, digest)


READERS: dict[str, Callable[[Tensors, dict, Path], SparseAutoencoder]] = {
    "GatedAutoEncoder": _gated,
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_new,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}
TRAINERS = {  # the trainer that makes each class
    "GatedAutoEncoder": "GatedSAETrainer",
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}
_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
ADDED = {"k", "threshold"}  # on 2024-12-22: files from before have neither
KEYS = {
    "GatedAutoEncoder": {"encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"},
    "AutoEncoder": {*_LINEAR, "bias"},
    "AutoEncoderNew": {*_LINEAR, "decoder.bias"},
    "JumpReluAutoEncoder": {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"},
    "AutoEncoderTopK": {*_LINEAR, "b_dec", "k", "threshold"},
    "BatchTopKSAE": {*_LINEAR, "b_dec", "k", "threshold"},
    "MatryoshkaBatchTopKSAE": {"W_enc", "b_enc", "W_dec", "b_dec", "k", "threshold", "group_sizes"},
}


# ---- Writing --------------------------------------------------------------------------------------------------------


def _tensors(sae: SparseAutoencoder) -> tuple[str, dict[str, Tensor]]:
    """The class that holds this SAE and its state_dict."""
    state, centred = sae.state_dict(), sae.apply_b_dec_to_input
    linear = {"encoder.weight": state["W_enc"], "decoder.weight": state["W_dec"].T}
    if isinstance(sae, nn.GatedSAE):
        _want(sae, centred, True)
        gate = {"gate_bias": state["b_gate"], "mag_bias": state["b_mag"], "r_mag": state["r_mag"]}
        return "GatedAutoEncoder", {"decoder_bias": state["b_dec"], **gate, **linear}
    if isinstance(sae, nn.JumpReluSAE):
        _want(sae, centred, False)
        names = ("b_enc", "W_dec", "b_dec", "threshold")
        return "JumpReluAutoEncoder", {"W_enc": state["W_enc"].T, **{name: state[name] for name in names}}
    linear["encoder.bias"] = state["b_enc"]
    if isinstance(sae, nn.ReluSAE):
        return ("AutoEncoder", {"bias": state["b_dec"], **linear}) if centred else (
            "AutoEncoderNew", {"decoder.bias": state["b_dec"], **linear}
        )  # fmt: skip
    if not isinstance(sae, (nn.TopKSAE, nn.BatchTopKSAE)):
        raise refuse(NAME, sae, "it has no such class")
    _want(sae, centred, True)
    if not isinstance(sae.k, int):
        raise refuse(NAME, sae, f"k: got {sae.k}, and its k is whole")
    if not sae.all_active:
        raise refuse(NAME, sae, f"active_groups: got {sae.active_groups}, and its files say nothing of groups that are off")
    k = torch.tensor(sae.k, dtype=torch.int32)
    if isinstance(sae, nn.TopKSAE):
        if sae.group_sizes is not None:
            raise refuse(NAME, sae, "group_sizes: its TopK class has no groups")
        threshold = sae.metadata.get("threshold", -1.0)
        if not isinstance(threshold, (int, float)):
            raise refuse(NAME, sae, f"metadata['threshold']: got {threshold!r}, want a number")
        both = {"k": k, "threshold": torch.tensor(threshold, dtype=torch.float32)}
        return "AutoEncoderTopK", {**linear, "b_dec": state["b_dec"], **both}
    both = {"b_dec": state["b_dec"], "k": k, "threshold": state["threshold"].float()}
    if sae.group_sizes is None:
        return "BatchTopKSAE", {**linear, **both}
    groups = torch.tensor(sae.group_sizes)
    weights = {"W_enc": state["W_enc"].T, "b_enc": state["b_enc"], "W_dec": state["W_dec"], "group_sizes": groups}
    return "MatryoshkaBatchTopKSAE", {**weights, **both}


def _want(sae: SparseAutoencoder, centred: bool, wanted: bool) -> None:
    if centred != wanted:
        raise refuse(
            NAME,
            sae,
            f"apply_b_dec_to_input: got {centred}, and its class {'always' if wanted else 'never'} subtracts b_dec",
        )
