"""SAELens' folder: ``sae_weights.safetensors`` and ``cfg.json``, of its version 6 and of the versions before.

W_enc is [d, F] there.  What stands between the activations and the SAE in its config is refused where a layer of ours has
none of it: normalisation of each example, whitening, fine-tuning scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import torch

from sae_fast import arguments, nn
from sae_fast.files import json_writer, key, read_json, safetensors_writer, write_files
from sae_fast.interop import _norms
from sae_fast.interop._files import Tensors, read_safetensors
from sae_fast.interop._norms import Unfold
from sae_fast.interop.formats._common import (
    HEADS,
    KEY,
    Loaded,
    build,
    config_of,
    layer_of,
    mapping,
    own,
    refuse,
    refuse_scaling_factor,
    remember,
    to_keep,
    transcoder,
)
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.grouped import GroupedSAE
from sae_fast.nn.normalize import ConstantNorm, LayerNorm, Normalize

NAME, ORDER, UNIT_ROWS = "saelens", 2, False
FILES_OF, SIGN = NAME, "sae_weights.safetensors (SAELens)"
WEIGHTS, CONFIG, VERSION = "sae_weights.safetensors", "cfg.json", "6.0.0"
FILES, OPTIONS = (WEIGHTS,), ()
SCALER = "activation_scaler.json"  # of a training checkpoint
BESIDE = (CONFIG, SCALER)
ARCHITECTURES = {
    "gated": "gated",
    "standard": "standard",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "batchtopk",  # checkpoints of a training; what it saves for inference is jumprelu
    "matryoshka_batchtopk": "batchtopk",
    "abstopk": "abstopk",
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
NORMALIZE: dict[str, type[Normalize]] = {"layer_norm": LayerNorm, "constant_norm_rescale": ConstantNorm}
ARCHITECTURES |= {f"sae_fast_{name}": kind for name, kind in ARCHITECTURES.items()}  # of sae_fast.interop.saelens
METADATA = ("model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path", "neuronpedia_id")


def finds(path: Path) -> bool:
    return (path / WEIGHTS).is_file() and ((path / CONFIG).is_file() or not (path / "config.json").is_file())


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return "W_enc" in shapes and "W_dec" in shapes and file.name == WEIGHTS


def read(path: Path) -> Loaded:
    file, tensors = path / CONFIG, read_safetensors(path / WEIGHTS, "W_enc")
    stored = read_json(file)
    config = _of_version_6(stored, file)
    said = key(config, file, str, "architecture") if "architecture" in config else "standard"
    if said not in ARCHITECTURES:
        raise ValueError(f"{file}: architecture: got {said!r}, want one of {sorted(ARCHITECTURES)}")
    _refuse_what_scales(config, file, tensors)
    sae, notes = _layer(ARCHITECTURES[said], tensors, config, file, said.endswith("transcoder"))
    tensors.finish()
    for name, want in (("d_in", sae.d_in), ("d_sae", sae.d_sae), ("d_out", sae.d_out))[: 3 if "d_out" in config else 2]:
        if key(config, file, int, name) != want:
            raise ValueError(f"{file}: {name}: got {config[name]}, but {WEIGHTS} holds {want}")
    metadata = config.get("metadata", {})
    kept = own(metadata)
    sae = _as_it_was(sae, kept)
    remember(sae, {**stored, KEY: kept}, NAME)
    for name in ("model_name", "hook_name"):
        if metadata.get(name):
            sae.metadata[name] = metadata[name]
    if sae.metadata.get("layer") is None and (layer := layer_of(metadata.get("hook_name"))) is not None:
        sae.metadata["layer"] = layer
    if config.get("reshape_activations", "none") != "none":
        notes.append(f"reshape_activations: {config['reshape_activations']!r}: {HEADS}")
    unscaled = config.get("normalize_activations")
    if said.endswith("transcoder"):
        notes.append(transcoder(sae, metadata.get("hook_name_out")))
    if unscaled in (None, "none", *NORMALIZE):
        return Loaded(sae, notes=notes)
    return Loaded(
        sae, unscaled=f"{file}: normalize_activations: {unscaled!r}", scale=_scaling_factor(path / SCALER), notes=notes
    )


def write(sae: SparseAutoencoder, folder: Path, overwrite: bool, unfold: Unfold | None) -> None:
    sae.check_plain(f"save it as {NAME}")
    architecture, more = _architecture(sae)
    state = {name: t for name, t in sae.state_dict().items() if name != "threshold" or t.dim() == 1}
    if isinstance(sae, nn.BatchTopKSAE):  # as the package itself saves one: JumpReLU with one threshold for all
        state["threshold"] = sae.threshold.to(torch.promote_types(torch.float32, sae.W_enc.dtype)).expand(sae.d_sae)
    state["W_enc"] = state["W_enc"].T
    config = config_of(sae, NAME)
    metadata = mapping(config.get("metadata"))
    if ARCHITECTURES.get(config.get("architecture", "")) != architecture or not metadata:  # another, or before version 6
        config = {}
    metadata.setdefault("sae_lens_version", VERSION)
    metadata |= {name: sae.metadata[name] for name in METADATA if sae.metadata.get(name) is not None}
    options = {k: v for k, v in sae.options().items() if k != "apply_b_dec_to_input"}
    metadata[KEY] = to_keep(sae, NAME, options=options)
    config |= {
        "architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."), "device": config.get("device", "cpu"),
        "apply_b_dec_to_input": sae.apply_b_dec_to_input, "normalize_activations": "none",
        "reshape_activations": config.get("reshape_activations", "none"), **more, "metadata": metadata,
    }  # fmt: skip
    write_files(folder, {WEIGHTS: safetensors_writer(state, {"format": "pt"}), CONFIG: json_writer(config)}, overwrite)


# ---- Reading --------------------------------------------------------------------------------------------------------


def _of_version_6(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The config with the names and the nesting of version 6; what older versions left out has the values they gave it."""
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{file}: metadata: got {metadata!r}, want an object")
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version is not None and not (isinstance(version, str) and version.split(".")[0].isdigit()):
        raise ValueError(f"{file}: sae_lens_version: got {version!r}, want a version")
    if version is not None and int(version.split(".")[0]) >= 6:
        return config
    names = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
    config = {names.get(name, name): value for name, value in config.items()}
    activation, arguments = config.get("activation_fn", "relu"), config.get("activation_fn_kwargs") or {}
    if activation == "topk" and "k" in arguments:
        config |= {"architecture": "topk", "k": arguments["k"]}
    elif activation != "relu":
        raise ValueError(
            f"{file}: activation_fn: got {activation!r}, want relu, or topk with its k in activation_fn_kwargs"
        )
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    hook_z = "hook_z" in (config.get("hook_name") or "")
    config.setdefault("reshape_activations", "hook_z" if hook_z else "none")
    return config | {"metadata": {name: config[name] for name in (*METADATA, KEY) if name in config} | metadata}


def _refuse_what_scales(config: dict[str, Any], file: Path, tensors: Tensors) -> None:
    refuse_scaling_factor(tensors)
    if config.get("finetuning_scaling_factor") not in (None, False):
        raise ValueError(f"{file}: finetuning_scaling_factor: got {config['finetuning_scaling_factor']!r}, want false")
    known = ("none", None, "expected_average_only_in", *NORMALIZE)
    if config.get("normalize_activations") not in known:
        raise ValueError(
            f"{file}: normalize_activations: got {config['normalize_activations']!r}, which no layer here does; "
            f"want one of {', '.join(filter(None, known))}"
        )


def _layer(
    architecture: str, tensors: Tensors, config: dict, file: Path, is_transcoder: bool
) -> tuple[SparseAutoencoder, list[str]]:
    W_enc = tensors.take("W_enc", None, None).T
    F, d = W_enc.shape
    b_dec = tensors.take("b_dec", None if is_transcoder else d)
    values = {"W_enc": W_enc, "W_dec": tensors.take("W_dec", F, len(b_dec)), "b_dec": b_dec}
    if "skip" in config.get("architecture", ""):
        values["W_skip"] = tensors.take("W_skip", len(b_dec), d)
    centred = config.get("apply_b_dec_to_input", not is_transcoder)
    if not isinstance(centred, bool):
        raise ValueError(f"{file}: apply_b_dec_to_input: got {centred!r}, want true or false")
    if centred and is_transcoder:
        raise ValueError(
            f"{file}: apply_b_dec_to_input: got true, want false of a transcoder, whose b_dec is what it gives"
        )
    options: dict[str, Any] = {"apply_b_dec_to_input": centred}
    if normalize := NORMALIZE.get(config.get("normalize_activations") or ""):
        options["normalize"] = normalize(undo=not is_transcoder)  # a transcoder's output stays as it is
    cls: type[SparseAutoencoder]
    cls, vectors = {
        "gated": (nn.GatedSAE, ("b_gate", "b_mag", "r_mag")),
        "standard": (nn.ReluSAE, ("b_enc",)),
        "jumprelu": (nn.JumpReluSAE, ("b_enc", "threshold")),
        "topk": (nn.TopKSAE, ("b_enc",)),
        "abstopk": (nn.TopKSAE, ("b_enc",)),
        "batchtopk": (nn.BatchTopKSAE, ("b_enc",)),
    }[architecture]
    if architecture == "jumprelu" and "log_threshold" in tensors:  # of a training before 6.48
        values["threshold"] = tensors.take("log_threshold", F).exp()
        vectors = ("b_enc",)
    values |= {name: tensors.take(name, F) for name in vectors}
    if architecture == "abstopk":
        options["largest"] = "abs"
    if architecture in ("topk", "abstopk", "batchtopk"):
        k = arguments.average(f"{file}: k", config.get("k"), F, f"a number with 0 < k ≤ d_sae = {F}")
        options["k"] = k if architecture == "batchtopk" else arguments.whole(f"{file}: k", k, wanted="a whole number")
    if architecture == "batchtopk":
        values["threshold"] = tensors.take("topk_threshold").float() if "topk_threshold" in tensors else torch.tensor(-1.0)
        if "matryoshka_widths" in config:
            options["group_sizes"] = _groups(config["matryoshka_widths"], file, F)
    sae = build(cls, tensors.file, values, **options)
    if not config.get("rescale_acts_by_decoder_norm", False):
        return sae, []
    unit = _norms.is_unit(sae)
    _norms.fold(sae, chosen_with_norms=True)  # it chooses and counts features times these norms: that is what folding does
    said = "rescale_acts_by_decoder_norm: the decoder's norms were folded into the encoder, to rounding"
    return sae, [] if unit else [said]


def _groups(widths: Any, file: Path, d_sae: int) -> list[int]:
    """The sizes of groups that end at these features."""
    name, wanted = f"{file}: matryoshka_widths", f"ints ascending to d_sae = {d_sae}"
    if not isinstance(widths, list) or not widths:
        raise ValueError(f"{name}: got {widths!r}, want {wanted}")
    ends = [0, *(arguments.whole(name, n, 1, d_sae, wanted) for n in widths)]
    found = [b - a for a, b in pairwise(ends)]
    if ends[-1] != d_sae or min(found) < 1:
        raise ValueError(f"{name}: got {widths!r}, want {wanted}")
    return found


def _scaling_factor(file: Path) -> float | None:
    """The factor by which a training multiplied the activations, where a checkpoint of it says so."""
    factor = read_json(file).get("scaling_factor") if file.is_file() else None
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < inf):
        raise ValueError(f"{file}: scaling_factor: got {factor!r}, want a positive number or null")
    return factor


def _as_it_was(sae: SparseAutoencoder, kept: dict[str, Any]) -> SparseAutoencoder:
    """A BatchTopKSAE that was written as JumpReLU with one threshold for all features."""
    state = sae.state_dict()
    threshold = state.get("threshold")
    if kept.get("class") != "BatchTopKSAE" or not isinstance(sae, nn.JumpReluSAE) or threshold is None:
        return sae
    if not bool((threshold == threshold[0]).all()):
        return sae
    state["threshold"] = threshold[0].float()
    options = {"apply_b_dec_to_input": sae.apply_b_dec_to_input, **mapping(kept.get("options"))}
    try:
        return nn.BatchTopKSAE.of_state("sae", sae.d_in, sae.d_sae, sae.W_enc.dtype, state, **options)
    except (TypeError, ValueError):  # what was kept may be anything
        return sae


# ---- Writing --------------------------------------------------------------------------------------------------------


def _architecture(sae: SparseAutoencoder) -> tuple[str, dict[str, Any]]:
    """SAELens' architecture for this SAE, and the config that it alone has."""
    if isinstance(sae, GroupedSAE) and not sae.all_active:
        raise refuse(NAME, sae, f"active_groups: got {sae.active_groups}, and none of its groups is ever off")
    if isinstance(sae, nn.TopKSAE):
        if sae.group_sizes is not None:
            raise refuse(NAME, sae, "group_sizes: its TopK class has no groups")
        return "topk", {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(sae, nn.BatchTopKSAE) and not float(sae.threshold) >= 0:
        raise refuse(
            NAME, sae, "threshold: it is not set (sae.threshold.fill_(value)), and for inference its BatchTopK is JumpReLU"
        )
    names: list[tuple[Callable, str]] = [
        (nn.GatedSAE, "gated"), (nn.ReluSAE, "standard"), (nn.JumpReluSAE, "jumprelu"), (nn.BatchTopKSAE, "jumprelu"),
    ]  # fmt: skip
    for cls, name in names:
        if isinstance(sae, cls):  # type: ignore[arg-type]
            return name, {}
    raise refuse(NAME, sae, "it has no such architecture")
