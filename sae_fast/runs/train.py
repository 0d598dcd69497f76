"""`sae-fast train`, and `demo`: from a model and a text to a trained SAE and its results."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sae_fast as sf
from sae_fast import files
from sae_fast.analysis import features, plots
from sae_fast.data.activations import ActivationStore
from sae_fast.data.harvest import harvest
from sae_fast.extras import require
from sae_fast.metrics import Metrics
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.scale import INPUT_SCALE, unscale_
from sae_fast.runs.folder import CHECKPOINT, FEATURES, METRICS, PLOT, claimed
from sae_fast.runs.measure import evaluate, measure_speedup
from sae_fast.runs.recipe import Recipe
from sae_fast.runs.source import source_of
from sae_fast.signals import Interrupted, noticing


@dataclass(frozen=True)
class Run:
    """A trained SAE, on the scale of the activations it was harvested from, and what was measured on the way."""

    sae: SparseAutoencoder
    held_out: Metrics
    tally: features.Tally  # of the held-out tokens
    history: list[dict[str, float]]
    training: dict[str, float]  # seconds, tokens_per_second, scale
    step: dict[str, float]  # engine_ms, dense_ms, times_faster; empty where it was not asked for, or there was no memory


@dataclass(frozen=True)
class Saving:
    """The folder of a training's checkpoint, written from the first step on, after which `first` is called once, every so
    many minutes, and at its end."""

    folder: Path
    minutes: float = 5.0
    first: Callable[[], None] = lambda: None


def run(
    model: str | Path,
    layer: int | None,
    text: str,
    out: str | Path,
    recipe: Recipe,
    context_length: int = 128,
    *,
    hook: str | None = None,
    name: str = "",
    text_from: str | Path | None = None,
    overwrite: bool = False,
    save_minutes: float = 5.0,
    compare: bool = False,
    progress: bool = True,
) -> Run:
    """Harvests, trains, measures on the held-out tokens, and writes the results into the folder `out`.

    layer, hook, context_length: as of `harvest`. name: what the results call the model. text_from: the file of the
    text, for `sae-fast encode` to find it again. compare: time a Gated SAE's step against dense PyTorch too. `out` gets
    checkpoint/ (for `sae_fast.load` and `Trainer.load`), written after the first step and every `save_minutes`;
    when training is done metrics.json, training.png and features.md. Ctrl-C and SIGTERM in the training end it with a
    checkpoint, as Interrupted.

    Raises ValueError for arguments that do not fit, FileExistsError for a run in `out` that `overwrite` does not
    give up, OSError for files that cannot be read or written, MissingExtra for missing packages.
    """
    for package in ("transformers", "matplotlib"):
        require(package, extra="demo")
    if compare and recipe.kind != "gated":
        raise ValueError(f"compare: got it with kind {recipe.kind!r}, want 'gated', whose step in dense PyTorch is here")
    out = Path(out)
    with claimed(out, overwrite) as clear:
        try:
            store = harvest(
                model, text, layer, hook=hook, context_length=context_length, text_from=str(text_from or ""),
                device=recipe.device, progress=progress,
            )  # fmt: skip
        except KeyboardInterrupt as error:
            number = getattr(error, "number", signal.SIGINT)
            raise Interrupted(number, "in the harvest, of which nothing is kept; earlier ones are in the cache") from error
        about = metadata_of(store, model, name, text_from)
        saving = Saving(out / CHECKPOINT, save_minutes, clear)
        result = train(store, recipe, saving, metadata=about, compare=compare, progress=progress)
        write_results(result, store, out, recipe, progress)
    return result


def train(
    store: ActivationStore,
    recipe: Recipe,
    saving: Saving | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    compare: bool = False,
    progress: bool = True,
) -> Run:
    """Trains an SAE of the recipe's kind on all but the last contexts of a store and measures it on those.

    metadata: what the SAE says of itself, beside its recipe. With `saving` Ctrl-C and SIGTERM end the training after
    the step that they come in, and raise Interrupted when the checkpoint is written.
    """
    train_part, held_part = store.split(recipe.holdout)
    mean, scale = train_part.mean_and_scale()
    sae = recipe.sae(store.d)
    with torch.no_grad():
        sae.b_dec.copy_(mean / scale)
    about = dataclasses.asdict(recipe) | {"tokens": train_part.n_tokens, "version": sf.__version__}
    sae.metadata = {**(metadata or {}), "training": about, INPUT_SCALE: scale}
    trainer = recipe.trainer(sae)
    batches = train_part.batches(recipe.batch_size, steps=recipe.steps, seed=recipe.seed)
    scaled = (batch.to(recipe.device) / scale for batch in batches)
    start, log_every = time.perf_counter(), max(1, recipe.steps // 200)
    if saving is None:
        history = trainer.fit(scaled, steps=recipe.steps, log_every=log_every, progress=progress)
    else:
        with noticing() as signalled:
            checkpoints = _Checkpoints(trainer, saving)
            between = checkpoints.between(scaled, signalled)
            history = trainer.fit(between, steps=recipe.steps, log_every=log_every, progress=progress)
            if trainer.step_count:
                checkpoints.write()
        if signalled():
            kept = f"the SAE so far is in {saving.folder}, from which sae_fast.Trainer.load goes on"
            raise Interrupted(
                signalled(),
                f"after step {trainer.step_count} of {recipe.steps}; {kept if trainer.step_count else 'nothing is kept'}",
            )
    seconds = time.perf_counter() - start
    step = {}
    if compare:
        sample = next(train_part.batches(recipe.batch_size, seed=recipe.seed + 1)).to(recipe.device) / scale
        try:
            step = measure_speedup(sae, sample, recipe.lr, recipe.l1 or 0.0, recipe.betas)
        except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError
            warnings.warn(f"no comparison with dense PyTorch: {str(error).splitlines()[0]}", stacklevel=2)
    unscale_(sae)
    training = {
        "seconds": seconds,
        "tokens_per_second": recipe.steps * recipe.batch_size / seconds,
        "scale": scale,
    }
    tally = features.Tally(sae.d_sae)
    return Run(sae, evaluate(sae, held_part, tally), tally, history, training, step)


class _Checkpoints:
    """Writes a training's checkpoint as it goes.  A disk that is full after the first step or at the end is an error; one
    that fills meanwhile is a warning, as the checkpoint before stays."""

    def __init__(self, trainer: sf.Trainer, saving: Saving):
        self.trainer, self.saving, self.due = trainer, saving, -math.inf

    def between(self, batches: Iterable[torch.Tensor], signalled: Callable[[], int]) -> Iterator[torch.Tensor]:
        """The batches, until a signal comes; a checkpoint is written where one is due."""
        for batch in batches:
            if signalled():
                return
            if self.trainer.step_count and time.monotonic() >= self.due:
                try:
                    self.write()
                except OSError as error:
                    if self.due < 0:
                        raise
                    step = self.trainer.step_count
                    warnings.warn(f"no checkpoint of step {step}, an earlier one stays: {error}", stacklevel=2)
                self.due = time.monotonic() + 60 * self.saving.minutes
            yield batch

    def write(self) -> None:
        self.trainer.save(self.saving.folder)
        if self.due < 0:
            self.saving.first()


def summary(
    held_out: Mapping[str, float], training: Mapping[str, float], step: Mapping[str, float]
) -> list[tuple[str, str]]:
    """The closing table's rows: four of the held-out tokens, then those of the time."""
    rows = [
        ("L0, features per token", f"{held_out['l0']:.1f}"),
        ("FVU, fraction of variance unexplained", f"{held_out['fvu']:.4f}"),
        ("relative reconstruction bias γ", f"{held_out['relative_reconstruction_bias']:.3f}"),
        ("dead features", f"{held_out['dead_fraction']:.1%}"),
        ("training", f"{training['tokens_per_second']:,.0f} tokens/s"),
    ]
    if step:
        rows += [
            ("a step", f"{step['engine_ms']:.1f} ms"),
            ("a step of dense PyTorch, here and now", f"{step['dense_ms']:.1f} ms"),
            ("times faster", f"{step['times_faster']:.1f}×"),
        ]
    return rows


def metadata_of(store: ActivationStore, model: str | Path, name: str, text_from: str | Path | None) -> dict[str, Any]:
    """The metadata of an SAE trained on a store: where it belongs, by the names that other packages' formats know too; and
    under "source" what `sae-fast encode` makes the same activations of."""
    info = store.info
    about = {
        "model_name": name or str(model),
        "hook_name": info["hook_name"],
        "layer": info["layer"],
        "context_size": store.context_length,
        "prepend_bos": info["prepend_bos"],
        "dtype": "float32",
        "dataset_path": str(text_from or "") or None,
        "source": source_of(model, text_from, store),
    }
    return {key: value for key, value in about.items() if value is not None}


def write_results(result: Run, store: ActivationStore, out: Path, recipe: Recipe, progress: bool = True) -> None:
    """metrics.json, training.png and features.md, into the folder `out`."""
    held_out, about = result.held_out.compute(), result.sae.metadata
    numbers = {
        "held_out": held_out,
        "training": result.training,
        "step": result.step,
        "recipe": {
            "model": about["model_name"],
            "layer": about.get("layer"),
            "hook_name": about["hook_name"],
            "context_length": store.context_length,
            "tokens": store.n_tokens,
            **dataclasses.asdict(recipe),
        },
        "source": about["source"],
        "history": result.history,
    }
    files.write_json(out / METRICS, numbers)
    title = f"{recipe.title} SAE, {recipe.d_sae} features, on {about['hook_name']} of {about['model_name']}"
    plots.plot_training(result.history, result.held_out.density().cpu(), out / PLOT, held_out, title)
    found = features.describe(result.sae, store, features.spread(result.tally), progress=progress)
    files.write_text(out / FEATURES, features.markdown(found, title, store.n_tokens))
