"""SAEs that are published on the Hugging Face Hub: from SAELens' own list where that package is installed (it is not
imported), else a short one of repositories."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sae_fast.extras import require
from sae_fast.files import key
from sae_fast.interop import _refused

LIST = "pretrained_saes.yaml"
FORMATS = {  # of SAELens' names of its loaders
    None: "saelens",
    "sae_lens": "saelens",
    "connor_rob_hook_z": "hook_z",
    "deepseek_r1": "dictionary_learning",
    "dictionary_learning_1": "dictionary_learning",
    "gemma_2": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "goodfire": "goodfire",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope",
    "mwhanna_transcoder": "circuit_tracer",
    "qwen_scope": "qwen_scope",
    "sparsify": "sparsify",
}
REFUSED = {"mntss_clt_layer_transcoder": "W_enc_0.safetensors", "temporal": "latest_ckpt.safetensors"}  # a file of each


@dataclass(frozen=True)
class Published:
    """``place`` is what :func:`sae_fast.load` takes, or in the short list a pattern of such; ``format`` None where it is
    refused.  ``l0`` and ``activation_scale`` as SAELens has them."""

    release: str
    place: str
    model: str
    format: str | None
    l0: float | None = None
    activation_scale: float | None = None


_GEMMA = "layer_{layer}/width_{width}/average_l0_{l0}"
SHORT = [
    *(
        Published(
            f"gemma-scope-{size}-{site}",
            f"google/gemma-scope-{size}-{site}/{_GEMMA}",
            f"google/gemma-2-{model}",
            "gemma_scope",
        )
        for size, model in (("2b-pt", "2b"), ("9b-pt", "9b"), ("9b-it", "9b-it"), ("27b-pt", "27b"))
        for site in ("res", "mlp", "att")
        if (size, site) not in {("27b-pt", "mlp"), ("27b-pt", "att")}
    ),
    Published(
        "gemma-scope-2b-pt-transcoders",
        f"google/gemma-scope-2b-pt-transcoders/{_GEMMA}",
        "google/gemma-2-2b",
        "gemma_scope",
    ),
    *(
        Published(
            f"gemma-scope-2-{size}-{tuned}",
            f"google/gemma-scope-2-{size}-{tuned}/resid_post/layer_{{layer}}_width_{{width}}_l0_{{small,medium,big}}",
            f"google/gemma-3-{size}-{tuned}",
            "gemma_scope_2",
        )
        for size in ("270m", "1b", "4b", "12b", "27b")
        for tuned in ("pt", "it")
    ),
    *(
        Published(
            f"llama_scope_lx{site.lower()}_{times}x",
            f"fnlp/Llama3_1-8B-Base-LX{site}-{times}x/Llama3_1-8B-Base-L{{layer}}{site}-{times}x",
            "meta-llama/Llama-3.1-8B",
            "llama_scope",
        )
        for site in "RAM"
        for times in (8, 32)
    ),
    Published(
        "qwen-scope", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer{layer}.sae.pt", "Qwen/Qwen3-1.7B-Base", "qwen_scope"
    ),
    Published(
        "mwhanna-qwen3-4b", "mwhanna/qwen3-4b-transcoders/layer_{layer}.safetensors", "Qwen/Qwen3-4B", "circuit_tracer"
    ),
    Published(
        "goodfire-llama-3.1-8b-instruct",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19/Llama-3.1-8B-Instruct-SAE-l19.pth",
        "meta-llama/Llama-3.1-8B-Instruct",
        "goodfire",
    ),
]


def published(name: str = "") -> list[Published]:
    """The SAEs whose release or place has ``name`` in it, in any case; all by default."""
    if not isinstance(name, str):
        raise ValueError(f"name: got {name!r}, want a str")
    file = _list_of_saelens()
    known = SHORT if file is None else _read(file)
    wanted = name.lower()
    return [sae for sae in known if wanted in sae.release.lower() or wanted in sae.place.lower()]


def _list_of_saelens() -> Path | None:
    """SAELens' list, where the package is installed."""
    spec = find_spec("sae_lens")
    files = [Path(folder) / LIST for folder in (spec.submodule_search_locations or [] if spec else [])]
    return next((file for file in files if file.is_file()), None)


@cache
def _read(file: Path) -> tuple[Published, ...]:
    yaml = require("yaml", extra="hub")
    with file.open(encoding="utf-8") as stream:
        releases = yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    found = []
    for release, about in releases.items():
        repo, loader = key(about, file, str, "repo_id"), about.get("conversion_func")
        for sae in key(about, file, list, "saes"):
            path = str(sae["path"])
            found.append(Published(
                release, f"{repo}/{path}".removesuffix("/."), about.get("model", ""), _format(loader, path), sae.get("l0"),
                sae.get("norm_scaling_factor"),
            ))  # fmt: skip
    return tuple(found)


def _format(loader: Any, path: str) -> str | None:
    """The format of a loader's files; None of those that are refused, and of a loader that is not known."""
    try:
        _refused.check(path, f"{path}/{REFUSED[loader]}" if loader in REFUSED else f"{path}/params.safetensors")
    except ValueError:
        return None
    return FORMATS.get(loader)
