"""Pictures of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_fast.extras import require

INK, ACCENT = "#333333", "#d1495b"
TERMS = {"reconstruction": "#2e86ab", "auxiliary": "#f2a65a", "sparsity": "#6a994e"}


def empty_figure(width: float, height: float) -> Any:
    """A figure of its own, so that no backend or style of the process is touched.  MissingExtra without matplotlib."""
    require("matplotlib", extra="demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_training(
    history: Sequence[Mapping[str, float]],
    density: Tensor,
    path: str | Path,
    held_out: Mapping[str, float] | None = None,
    title: str = "",
) -> None:
    """Writes a PNG of four panels: loss terms, L0 and FVU against the step, and how often features fire.

    history: records with step, loss, reconstruction, auxiliary, sparsity, l0 and fvu, as `Trainer.fit` returns.
    density [F]: the fraction of tokens each feature fires on. held_out: l0 and fvu of the same tokens, if those were
    held out, to draw as lines. Raises
    ValueError if the history is empty and MissingExtra without matplotlib.
    """
    if not history:
        raise ValueError("history: got no records, want at least one")
    figure = empty_figure(11, 7.2)
    (loss, l0), (fvu, densities) = figure.subplots(2, 2)
    steps = [record["step"] + 1 for record in history]

    def curve(axes: Any, name: str, color: str, **style: Any) -> None:
        axes.plot(steps, [record[name] for record in history], color=color, **style)

    curve(loss, "loss", INK, label="total", linewidth=2)
    for term, color in TERMS.items():
        curve(loss, term, color, label=term)
    label_axes(loss, "Loss", "step", "mean over tokens (squared norm of x)")
    loss.set_yscale("log")
    loss.legend(frameon=False, ncols=2)
    for axes, name, what in ((l0, "l0", "features firing per token"), (fvu, "fvu", "fraction of variance unexplained")):
        curve(axes, name, TERMS["reconstruction"], label="training batch")
        if held_out:
            axes.axhline(held_out[name], color=ACCENT, linestyle="--", label=f"held out: {held_out[name]:.3g}")
        label_axes(axes, name.upper(), "step", what)
        axes.set_yscale("log")
        axes.legend(frameon=False)
    for axes in (loss, l0, fvu):
        plain_ticks(axes.yaxis)
    _density_histogram(densities, density, "held-out tokens" if held_out else "tokens")
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _density_histogram(axes: Any, density: Tensor, of: str) -> None:
    alive = density[density > 0].double().log10()
    dead = len(density) - len(alive)
    axes.hist(alive.numpy(), bins=50, color=TERMS["reconstruction"])
    if len(alive):
        median = float(alive.median())
        axes.axvline(median, color=ACCENT, linestyle="--", label=f"median {10**median:.2g}")
        axes.legend(frameon=False)
    label_axes(axes, "Feature density", f"log₁₀ of the fraction of {of} a feature fires on", "features")
    axes.set_title(f"{len(alive)} alive, {dead} dead", loc="right", fontsize="medium", color=INK)


def label_axes(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plain_ticks(axis: Any) -> None:
    """Numbers instead of powers of ten, and a few of them whatever the range."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    low, high = axis.get_view_interval()
    between = () if high / low > 100 else (2, 5) if high / low > 10 else (1.5, 2, 3, 4, 6, 8)
    axis.set_major_locator(LogLocator(subs=(1, *between)))
    formatter = ScalarFormatter()
    formatter.set_scientific(False)
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())
