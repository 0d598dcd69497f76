"""ckkissane's attention SAEs: ``X.pt`` and ``X_cfg.json``.  ReLU, b_dec subtracted, on the heads' z side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sae_fast import nn
from sae_fast.files import key, read_json
from sae_fast.interop._files import Tensors, read_state_dict
from sae_fast.interop.formats._common import HEADS, Loaded, biases, build, layer_of, remember

NAME, ORDER, SIGN = "hook_z", 14, "X.pt with X_cfg.json (hook_z)"
FILES, BESIDE, OPTIONS = (), ("{stem}_cfg.json",), ()  # its weights may have any name
KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}


def finds(path: Path) -> bool:
    return len(_weights(path)) == 1


def holds(shapes: Mapping[str, tuple[int, ...]], file: Path) -> bool:
    return _config(file).is_file() and file.suffix == ".pt" and len(set(shapes) & KEYS) > 1


def read(path: Path) -> Loaded:
    (file,) = _weights(path)
    tensors, config = Tensors(file, read_state_dict(file)), read_json(_config(file))
    b_enc, b_dec = biases(tensors, "b_enc", "b_dec")
    F, d = len(b_enc), len(b_dec)
    values = dict(W_enc=tensors.take("W_enc", d, F).T, b_enc=b_enc, W_dec=tensors.take("W_dec", F, d), b_dec=b_dec)
    tensors.finish()
    for name, got in (("act_size", d), ("dict_size", F)):
        if key(config, _config(file), int, name) != got:
            raise ValueError(f"{_config(file)}: {name}: got {config[name]}, but {file.name} holds {got}")
    sae = build(nn.ReluSAE, file, values)
    remember(sae, config, NAME)
    hook = key(config, _config(file), str, "act_name")
    sae.metadata |= {"model_name": config.get("model_name", "gpt2-small"), "hook_name": hook, "layer": layer_of(hook)}
    return Loaded(sae, notes=[HEADS])


def _weights(path: Path) -> list[Path]:
    """The weights in a folder that have a config beside them, or a file itself."""
    return [file for file in ([path] if path.is_file() else path.glob("*.pt")) if _config(file).is_file()]


def _config(file: Path) -> Path:
    return file.with_name(f"{file.stem}_cfg.json")
