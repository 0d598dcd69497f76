"""Files as they are published, in the real layout of each format, with small numbers; what they give, as a formula says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D = 8
Formula = Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor]]  # of the tensors and x: (f, x̂)


@dataclass
class Published:
    """``file`` with ``tensors`` and what is ``beside`` it, in the repository ``repo``; ``place`` in it is what is loaded.
    ``formula`` is of the tensors as they are in the file."""

    format: str
    repo: str
    place: str
    file: str
    tensors: dict[str, Any]
    formula: Formula
    kind: str
    metadata: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)
    note: str | None = None  # what a warning says
    options: dict[str, Any] = field(default_factory=dict)  # of sf.load
    others: dict[str, Any] = field(default_factory=dict)  # files of the repository that are not needed

    def write(self, root: Path) -> Path:
        """Writes the repository's files below ``root``/repo; returns what is to be loaded."""
        folder = root / self.repo
        for name, content in {self.file: self.tensors, **self.beside, **self.others}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write(folder / name, content)
        return folder / self.place

    def gives(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """f and x̂ by the formula in a dtype."""
        tensors = {n: t.to(dtype) for n, t in self.tensors.items() if isinstance(t, Tensor) and t.is_floating_point()}
        return self.formula(tensors, x.to(dtype))


def write(file: Path, content: Any) -> None:
    """Writes tensors or a config in the way of the file's suffix."""
    if file.suffix == ".npz":
        np.savez(file, **{name: t.numpy() for name, t in content.items()})
    elif file.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in content.items()}, file)
    elif file.suffix in (".pt", ".pth"):
        torch.save(content, file)
    else:  # JSON is YAML too
        file.write_text(json.dumps(content))


def sae(
    F: int, seed: int = 0, closed: float = 0.3, dtype: torch.dtype = torch.float32, **more: Tensor
) -> dict[str, Tensor]:
    """W_enc [F, D], W_dec [F, D], b_enc, b_dec of a trained SAE's sizes, with decoder rows of norms about 1.5; b_enc is
    about −``closed``."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(F, D, generator=g) / math.sqrt(D),
        "W_dec": torch.randn(F, D, generator=g) * 0.5,
        "b_enc": torch.randn(F, generator=g) * 0.3 - closed,
        "b_dec": torch.randn(D, generator=g) * 0.5,
    }
    return {name: t.to(dtype) for name, t in {**tensors, **more}.items()}


def thresholds(F: int, seed: int = 1) -> Tensor:
    return torch.rand(F, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.1


def inputs(B: int = 65, seed: int = 2) -> Tensor:
    return 2 * torch.randn(B, D, generator=torch.Generator().manual_seed(seed))


def named(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors under a format's names, of which one with a ᵀ is the transpose."""
    return {new.removesuffix("ᵀ"): tensors[old].T if new.endswith("ᵀ") else tensors[old] for old, new in names.items()}


def jump(pi: Tensor, threshold: Tensor) -> Tensor:
    return pi.relu() * (pi > threshold)


def topk(pi: Tensor, k: int) -> Tensor:
    values, indices = pi.topk(k, dim=-1)
    return torch.zeros_like(pi).scatter(-1, indices, values)


# ---- Google's -------------------------------------------------------------------------------------------------------

WIDE = 4096  # width_4k, the smallest that there is
SCOPE = {"W_enc": "W_encᵀ", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
SCOPE_2 = {"W_enc": "w_encᵀ", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}


def gemma(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    t = {name.replace("w_", "W_"): tensor for name, tensor in t.items()}
    f = jump(x @ t["W_enc"] + t["b_enc"], t["threshold"])
    x_hat = f @ t["W_dec"] + t["b_dec"]
    return f, x_hat + x @ t["affine_skip_connection"] if "affine_skip_connection" in t else x_hat


def embedding(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    f = jump(x @ (t["W_enc"] / math.sqrt(D)) + t["b_enc"], t["threshold"])
    return f, f @ (t["W_dec"] * math.sqrt(D)) + t["b_dec"]


def gemma_scope(
    site: str, folder: str, hook: str, note: str | None = None, formula: Formula = gemma, F: int = WIDE, **more: Any
) -> Published:
    tensors = sae(F, closed=0.3 if formula is embedding else 4, threshold=thresholds(F))
    return Published(
        "gemma_scope",
        f"google/gemma-scope-2b-pt-{site}",
        folder,
        f"{folder}/params.npz",
        named(tensors, SCOPE),
        formula,
        "JumpReluSAE",
        {"model_name": "google/gemma-2-2b", "hook_name": hook} | more,
        note=note,
        others={f"{folder[:-1]}0/params.npz": {"W_enc": torch.zeros(1)}, "README.md": "an SAE"},
    )


def gemma_scope_2(folder: str, hook: str, config: bool, affine: bool = False, **more: Any) -> Published:
    tensors = named(sae(F := 16384, closed=4, threshold=thresholds(F)), SCOPE_2)
    if affine:
        g = torch.Generator().manual_seed(5)
        tensors["affine_skip_connection"] = torch.randn(D, D, generator=g)
    about = {"architecture": "jump_relu", "model_name": "gemma-v3-4b-pt", "hf_hook_point_in": "model.layers.12.output"}
    about |= {"affine_connection": affine} if "transcoder" in folder else {}
    return Published(
        "gemma_scope_2",
        "google/gemma-scope-2-4b-pt",
        folder,
        f"{folder}/params.safetensors",
        tensors,
        gemma,
        "JumpReluSAE",
        {"model_name": "google/gemma-3-4b-pt", "layer": 12, "hook_name": hook} | more,
        {f"{folder}/config.json": about} if config else {},
        "this is a transcoder" if "transcoder" in folder else None,
    )


# ---- OpenMOSS' ------------------------------------------------------------------------------------------------------

LLAMA = {"W_enc": "encoder.weight", "W_dec": "decoder.weightᵀ", "b_enc": "encoder.bias", "b_dec": "decoder.bias"}
MOSS = {"W_enc": "W_Eᵀ", "W_dec": "W_D", "b_enc": "b_E", "b_dec": "b_D"}
AVERAGE, THETA = 5.5, 0.53125


def openmoss(norms: bool = True, theta: float | str = THETA, scale: float = math.sqrt(D) / AVERAGE, k: int = 0) -> Formula:
    """A feature is on where π ‖d‖, or π itself, is above a threshold, or among the k largest; of scale · x."""

    def formula(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        if "encoder.weight" in t:
            t = {
                "W_E": t["encoder.weight"].T,
                "W_D": t["decoder.weight"].T,
                "b_E": t["encoder.bias"],
                "b_D": t["decoder.bias"],
                **t,
            }
        pi = scale * x @ t["W_E"] + t["b_E"]
        norm = t["W_D"].norm(dim=1) if norms else torch.ones_like(t["b_E"])
        if k:  # features count their norms here, and x̂ is the same
            f = topk((pi * norm).relu(), k)
            return f, (f / norm @ t["W_D"] + t.get("b_D", 0)) / scale
        f = pi.relu() * (pi * norm > (t[theta].exp() if isinstance(theta, str) else theta))
        return f, (f @ t["W_D"] + t.get("b_D", 0)) / scale

    return formula


def llama_scope(recipe: str | None, norms: bool, theta: float = THETA, dtype: torch.dtype = torch.float32) -> Published:
    name, F = "Llama3_1-8B-Base-L19R-8x", 64
    hyperparams = {
        "d_model": D,
        "d_sae": F,
        "hook_point_in": "blocks.19.hook_resid_post",
        "hook_point_out": "blocks.19.hook_resid_post",
        "expansion_factor": 8,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "act_fn": "jumprelu",
        "jump_relu_threshold": THETA,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 50,
        "dataset_average_activation_norm": {"in": AVERAGE, "out": AVERAGE},
    }
    return Published(
        "llama_scope",
        "fnlp/Llama3_1-8B-Base-LXR-8x",
        name,
        f"{name}/checkpoints/final.safetensors",
        named(sae(F, dtype=dtype), LLAMA),
        openmoss(norms, theta),
        "JumpReluSAE",
        {"model_name": "meta-llama/Llama-3.1-8B", "layer": 19, "hook_name": "blocks.19.hook_resid_post"},
        {f"{name}/hyperparams.json": hyperparams},
        None if recipe else "recipe 'openmoss' was taken: activations times 0.514",
        {"recipe": recipe} if recipe else {},
        {f"{name}/lm_config.json": {}},
    )


def llama_scope_r1() -> Published:
    name, F, hook = "400M-Slimpajama-400M-OpenR1-Math-220k/L15R", 64, "blocks.15.hook_resid_post"
    tensors = named(sae(F), LLAMA) | {"log_jumprelu_threshold": thresholds(F).log()}
    tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(AVERAGE)
    config = {"d_model": D, "expansion_factor": 8, "hook_point_in": hook, "hook_point_out": hook, "act_fn": "jumprelu"}
    config |= {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
    return Published(
        "llama_scope",
        "fnlp/Llama-Scope-R1-Distill",
        name,
        f"{name}/sae_weights.safetensors",
        tensors,
        openmoss(theta="log_jumprelu_threshold"),
        "JumpReluSAE",
        {"layer": 15, "hook_name": hook},
        {f"{name}/config.json": config},
        "recipe 'openmoss' was taken",
    )


def llamascopium(activation: str, suffix: str = "safetensors", **config: Any) -> Published:
    F, hook, log = 64, "blocks.3.hook_resid_post", "activation_function.log_jumprelu_threshold"
    tensors: dict[str, Any] = named(sae(F), MOSS) | ({log: thresholds(F).log()} if activation == "jumprelu" else {})
    tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(AVERAGE)
    if config.get("use_decoder_bias") is False:
        del tensors["b_D"]
    about = {"sae_type": "sae", "d_model": D, "expansion_factor": 8.0, "act_fn": activation, "top_k": 5}
    about |= {"hook_point_in": hook, "hook_point_out": hook, "norm_activation": "dataset-wise"} | config
    norms = config.get("sparsity_include_decoder_norm", True)
    scale = 1.0 if config.get("norm_activation") == "inference" else math.sqrt(D) / AVERAGE
    k = 5 if "topk" in activation else 0
    formula = openmoss(norms, log if activation == "jumprelu" else 0.0, scale, k)
    return Published(
        "llamascopium",
        "user/saes",
        "run",
        f"run/sae_weights.{suffix}",
        {"sae": tensors, "version": "1.0"} if suffix == "pt" else tensors,
        (lambda t, x: formula({n: v.to(x.dtype) for n, v in tensors.items()}, x)) if suffix == "pt" else formula,
        {"jumprelu": "JumpReluSAE", "relu": "ReluSAE", "topk": "TopKSAE"}[activation],
        {"layer": 3, "hook_name": hook},
        {"run/config.json": about},
        "the norms were folded" if k and norms else None,
    )


# ---- Others' --------------------------------------------------------------------------------------------------------


def relu(centred: bool, *names: str) -> Formula:
    """ReLU of the tensors of these names: W_enc [d, F], W_dec [F, d], b_enc, b_dec, where ᵀ means the transpose."""

    def formula(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, W_dec, b_enc, b_dec = (t[n.removesuffix("ᵀ")].T if n.endswith("ᵀ") else t[n] for n in names)
        f = ((x - b_dec * centred) @ W_enc + b_enc).relu()
        return f, f @ W_dec + b_dec

    return formula


def qwen_scope(seed: int = 0) -> Published:
    F, k = 1024, 50
    tensors = named(sae(F, seed), {"W_enc": "W_enc", "W_dec": "W_decᵀ", "b_enc": "b_enc", "b_dec": "b_dec"})

    def formula(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        f = topk((x @ t["W_enc"].T + t["b_enc"]).relu(), k)
        return f, f @ t["W_dec"].T + t["b_dec"]

    return Published(
        "qwen_scope",
        "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_50",
        "layer7.sae.pt",
        "layer7.sae.pt",
        tensors,
        formula,
        "TopKSAE",
        {"model_name": "Qwen/Qwen3-1.7B-Base", "layer": 7, "hook_name": "blocks.7.hook_resid_post"},
        others={"layer0.sae.pt": {}, "config.json": {}},
    )


def goodfire() -> Published:
    names = {"W_enc": "encoder_linear.weight", "W_dec": "decoder_linear.weightᵀ", "b_enc": "encoder_linear.bias"}
    repo = "Llama-3.1-8B-Instruct-SAE-l19"
    return Published(
        "goodfire",
        f"Goodfire/{repo}",
        f"{repo}.pth",
        f"{repo}.pth",
        named(sae(96), names | {"b_dec": "decoder_linear.bias"}),
        relu(False, "encoder_linear.weightᵀ", "decoder_linear.weightᵀ", "encoder_linear.bias", "decoder_linear.bias"),
        "ReluSAE",
        {"model_name": "meta-llama/Llama-3.1-8B-Instruct", "layer": 19, "hook_name": "blocks.19.hook_resid_post"},
    )


def deepseek() -> Published:
    repo = "DeepSeek-R1-Distill-Llama-8B-SAE-l19"
    return Published(
        "dictionary_learning",
        f"qresearch/{repo}",
        f"{repo}.pt",
        f"{repo}.pt",
        named(sae(96), LLAMA),
        relu(False, "encoder.weightᵀ", "decoder.weightᵀ", "encoder.bias", "decoder.bias"),
        "ReluSAE",
        {"model_name": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "layer": 19},
    )


def hook_z() -> Published:
    stem = "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.80e+00_ds49152_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9"
    config = {"act_size": D, "dict_size": 96, "act_name": "blocks.5.attn.hook_z", "model_name": "gpt2-small", "seed": 49}
    names = {"W_enc": "W_encᵀ", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    return Published(
        "hook_z",
        "ckkissane/attn-saes-gpt2-small-all-layers",
        f"{stem}.pt",
        f"{stem}.pt",
        named(sae(96), names),
        relu(True, "W_enc", "W_dec", "b_enc", "b_dec"),
        "ReluSAE",
        {"model_name": "gpt2-small", "layer": 5, "hook_name": "blocks.5.attn.hook_z"},
        {f"{stem}_cfg.json": config},
        "side by side",
        others={"another.pt": {}, "another_cfg.json": {}},
    )


def layer_norm(formula: Formula, undo: bool = True) -> Formula:
    """A formula of (x − μ) / (σ + 10⁻⁵), and back; σ with d − 1."""

    def normed(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        f, x_hat = formula(t, (x - mean) / (deviation + 1e-5))
        return f, x_hat * deviation + mean if undo else x_hat

    return normed


def constant_norm(formula: Formula) -> Formula:
    """A formula of x √d / ‖x‖, and back."""

    def normed(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        f, x_hat = formula(t, x / scale)
        return f, x_hat * scale

    return normed


def keeps(k: int, formula: Formula, any_sign: bool) -> Formula:
    """The formula of the k largest features, of ReLU or of any sign; x̂ from OpenAI's decoder.weight and pre_bias."""

    def kept(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        pi = (x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
        f = topk(pi if any_sign else formula(t, x)[0], k)
        return f, f @ t["decoder.weight"].T + t["pre_bias"]

    return kept


def saelens(architecture: str, d_out: int = D, threshold: bool = False, formula: Any = None, **config: Any) -> Published:
    F, skip, across = 96, "skip" in architecture, architecture.endswith("transcoder")
    g = torch.Generator().manual_seed(7)
    tensors = sae(F) | ({"threshold": thresholds(F)} if threshold else {})
    tensors |= {
        "W_enc": tensors["W_enc"].T,
        "W_dec": torch.randn(F, d_out, generator=g),
        "b_dec": torch.randn(d_out, generator=g),
    }
    if skip:
        tensors["W_skip"] = torch.randn(d_out, D, generator=g)

    def plain(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        pi = (x if across else x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        f = jump(pi, t["threshold"]) if threshold else pi.relu()
        x_hat = f @ t["W_dec"] + t["b_dec"]
        return f, x_hat + x @ t["W_skip"].T if skip else x_hat

    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_mlp_in", "model_name": "gpt2"}
    metadata |= {"hook_name_out": "blocks.3.hook_mlp_out"} if across else {}
    about = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "metadata": metadata}
    about |= {"apply_b_dec_to_input": not across, "normalize_activations": "none"} | ({"d_out": d_out} if across else {})
    return Published(
        "saelens",
        "user/saelens",
        f"{architecture}-{len(config)}",
        f"{architecture}-{len(config)}/sae_weights.safetensors",
        tensors,
        formula(plain) if formula else plain,
        "JumpReluSAE" if threshold else "TopKSAE" if "k" in config else "ReluSAE",
        {"layer": 3, "model_name": "gpt2"} | ({"hook_name_out": "blocks.3.hook_mlp_out"} if across else {}),
        {f"{architecture}-{len(config)}/cfg.json": about | config},
        "this is a transcoder" if across else None,
    )


def abs_topk(k: int) -> Formula:
    """SAELens' AbsTopK: the k largest |π|, with their signs."""

    def formula(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        pi = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        f = pi * (topk(pi.abs(), k) > 0)
        return f, f @ t["W_dec"] + t["b_dec"]

    return formula


def sparsify_skip() -> Published:
    F, k = 96, 7
    names = {"W_enc": "encoder.weight", "W_dec": "W_dec", "b_enc": "encoder.bias", "b_dec": "b_dec"}
    tensors = named(sae(F), names) | {"W_skip": torch.randn(D, D, generator=torch.Generator().manual_seed(5))}

    def formula(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        f = topk((x @ t["encoder.weight"].T + t["encoder.bias"]).relu(), k)
        return f, f @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T

    config = {"activation": "topk", "k": k, "num_latents": F, "d_in": D, "transcode": True, "skip_connection": True}
    return Published(
        "sparsify",
        "EleutherAI/skip-transcoder",
        "layers.3.mlp",
        "layers.3.mlp/sae.safetensors",
        tensors,
        formula,
        "TopKSAE",
        {"hook_name": "layers.3.mlp"},
        {"layers.3.mlp/cfg.json": config},
        "this is a transcoder",
    )


def openai(activation: Any = "ReLU", tied: bool = False, **state: Any) -> Published:
    F, folder = 96, "gpt2-small/resid_post_mlp_v5_32k/autoencoders"
    decoder = "decoder.linear.weight" if tied else "decoder.weightᵀ"
    names = {"W_enc": "encoder.weight", "W_dec": decoder, "b_enc": "latent_bias", "b_dec": "pre_bias"}
    tensors: dict[str, Any] = named(sae(F), names) | {"activation": activation, "activation_state_dict": state}
    tensors |= {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_mean_square": torch.zeros(F)}
    tensors["latents_activation_frequency"] = torch.ones(F)
    formula = relu(True, "encoder.weightᵀ", decoder, "latent_bias", "pre_bias")
    return Published(
        "openai",
        "user/openai",
        f"{folder}/6.pt",
        f"{folder}/6.pt",
        tensors,
        layer_norm(keeps(state["k"], formula, state["postact_fn"] == "Identity")) if activation == "TopK" else formula,
        "TopKSAE" if activation == "TopK" else "ReluSAE",
        {"model_name": "gpt2-small", "layer": 6, "hook_name": "blocks.6.hook_resid_post"},
    )


def circuit_tracer(repo: str, threshold: bool = False, skip: bool = False, config: Any = None, **beside: Any) -> Published:
    tensors = sae(96)
    if threshold:
        tensors["activation_function.threshold"] = thresholds(96)
    if skip:
        tensors["W_skip"] = torch.randn(D, D, generator=torch.Generator().manual_seed(5))

    def formula(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        pi = x @ t["W_enc"].T + t["b_enc"]
        f = jump(pi, t["activation_function.threshold"]) if threshold else topk(pi, k) if k else pi.relu()
        x_hat = f @ t["W_dec"] + t["b_dec"]
        return f, x_hat + x @ t["W_skip"].T if skip else x_hat

    k = (config or {}).get("k", 0)
    files = {"config.yaml": config} if config else {}
    return Published(
        "circuit_tracer",
        repo,
        "layer_4.safetensors",
        "layer_4.safetensors",
        tensors,
        formula,
        "JumpReluSAE" if threshold else "TopKSAE" if k else "ReluSAE",
        {"layer": 4, "hook_name_out": "blocks.4.hook_mlp_out"},
        files | beside,
        "this is a transcoder",
        others={"layer_5.safetensors": {"W_enc": torch.zeros(1)}, "features/layer_4.bin": ""},
    )


LAYER = "layer_20/width_4k/average_l0_71"
SET = {"model_kind": "transcoder_set", "model_name": "google/gemma-2-2b", "feature_input_hook": "ln2.hook_normalized"}
SET |= {"feature_output_hook": "hook_mlp_out"}
SIZES = {"d_model": {"value": D}, "d_feature": {"value": 96}, "batch_size": {"value": 4096}}
PUBLISHED: dict[str, Published] = {
    "gemma scope": gemma_scope("res", LAYER, "blocks.20.hook_resid_post", layer=20, l0=71),
    "gemma scope, mlp": gemma_scope("mlp", LAYER, "blocks.20.hook_mlp_out", layer=20),
    "gemma scope, attention": gemma_scope("att", LAYER, "blocks.20.attn.hook_z", "side by side", layer=20),
    "gemma scope, embedding": gemma_scope("res", "embedding/width_4k/average_l0_6", "hook_embed", None, embedding, layer=0),
    "gemma scope, transcoder": gemma_scope(
        "transcoders",
        LAYER,
        "blocks.20.ln2.hook_normalized",
        "this is a transcoder",
        hook_name_out="blocks.20.hook_mlp_out",
    ),
    "gemma scope 2": gemma_scope_2("resid_post/layer_12_width_16k_l0_small", "blocks.12.hook_resid_post", True),
    "gemma scope 2, attention": gemma_scope_2("attn_out/layer_12_width_16k_l0_small", "blocks.12.attn.hook_z", False),
    "gemma scope 2, transcoder": gemma_scope_2(
        "transcoder_all/layer_12_width_16k_l0_big", "blocks.12.hook_mlp_in", True, hook_name_out="blocks.12.hook_mlp_out"
    ),
    "gemma scope 2, affine": gemma_scope_2(
        "transcoder/layer_12_width_16k_l0_big_affine", "blocks.12.hook_mlp_in", True, affine=True
    ),
    "gemma scope 2, affine, no config": gemma_scope_2(
        "transcoder_all/layer_12_width_16k_l0_big_affine", "blocks.12.hook_mlp_in", False, affine=True
    ),
    "llama scope": llama_scope(None, True),
    "llama scope, openmoss": llama_scope("openmoss", True),
    "llama scope, plain": llama_scope("plain", False),
    "llama scope, saelens": llama_scope("saelens", False, THETA * math.sqrt(D) / AVERAGE),
    "llama scope r1": llama_scope_r1(),
    "llamascopium": llamascopium("jumprelu"),
    "llamascopium, pt": llamascopium("jumprelu", "pt"),
    "llamascopium, relu": llamascopium("relu", use_decoder_bias=False),
    "llamascopium, topk": llamascopium("topk"),
    "llamascopium, plain gates": llamascopium("jumprelu", sparsity_include_decoder_norm=False),
    "llamascopium, folded": llamascopium("jumprelu", norm_activation="inference"),
    "qwen scope": qwen_scope(),
    "goodfire": goodfire(),
    "deepseek": deepseek(),
    "hook_z": hook_z(),
    "openai, relu": openai(),
    "openai, tied": openai(tied=True),
    "openai, topk": openai("TopK", k=7, postact_fn="ReLU"),
    "openai, topk, identity": openai("TopK", k=40, postact_fn="Identity"),
    "circuit-tracer, topk": circuit_tracer("facebook/crv-8b", config=SET | {"activation": "topk", "k": 40}),
    "saelens, transcoder": saelens("transcoder", 5),
    "saelens, abstopk": saelens("abstopk", formula=lambda plain: abs_topk(7), k=7),
    "saelens, skip": saelens("skip_transcoder", 5),
    "saelens, jumprelu": saelens("jumprelu_transcoder", 5, True),
    "saelens, jumprelu skip": saelens("jumprelu_skip_transcoder", 5, True),
    "saelens, layer norm": saelens("standard", formula=layer_norm, normalize_activations="layer_norm"),
    "saelens, constant norm": saelens(
        "jumprelu", threshold=True, formula=constant_norm, normalize_activations="constant_norm_rescale"
    ),
    "saelens, transcoder of normed": saelens(
        "transcoder", 5, formula=lambda plain: layer_norm(plain, undo=False), normalize_activations="layer_norm"
    ),
    "sparsify, skip": sparsify_skip(),
    "circuit-tracer": circuit_tracer("mntss/gemma-scope-transcoders", True, config=SET),
    "circuit-tracer, skip": circuit_tracer("mntss/transcoder-Llama-3.2-1B", skip=True, config=SET),
    "mwhanna": circuit_tracer(
        "mwhanna/qwen3-4b-transcoders",
        config={"model_name": "Qwen/Qwen3-4B", "activation": "relu"},
        **{"wandb-config.yaml": SIZES},
    ),
    "mwhanna, misspelt": circuit_tracer("mwhanna/qwen3-14b-transcoders", **{"wanb-config.yaml": SIZES}),
}
