"""A list of features: for a few of them, the contexts with the highest activations, as Markdown to read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae_fast.analysis.store.contexts import Distinct, in_order
from sae_fast.code import SparseCode
from sae_fast.data.activations import ActivationStore

CHUNK = 4096  # tokens encoded at a time


@dataclass(frozen=True)
class Example:
    """A token on which a feature fires: its activation, and the text before it, its own, and after it."""

    token: int
    activation: float
    text: tuple[str, str, str]


@dataclass(frozen=True)
class Feature:
    """A feature, the fraction of tokens it fires on, its largest activation, and its top contexts, best first."""

    index: int
    density: float
    maximum: float
    examples: list[Example]


class Tally:
    """Counts in codes the tokens on which each feature fires [F] int64, and keeps its largest activation [F] float32."""

    def __init__(self, d_sae: int):
        self.fires, self.maximum = torch.zeros(d_sae, dtype=torch.int64), torch.zeros(d_sae)

    def update(self, code: SparseCode) -> None:
        fires = code.magnitudes > 0
        indices, values = code.indices[fires].long().cpu(), code.magnitudes[fires].float().cpu()
        self.fires += torch.bincount(indices, minlength=len(self.fires))
        self.maximum.scatter_reduce_(0, indices, values, "amax")


def spread(tally: Tally, count: int = 10, least: int = 10) -> list[int]:
    """Up to `count` features that show the range of densities, from rare to common; none that is dead. Deterministic.

    Of the features that fire on at least `least` tokens (of all alive ones, if those are too few), ordered by
    density and cut into `count` equal groups, each group gives the one with the highest activation.
    """
    alive = (tally.fires >= least).nonzero().flatten()
    if len(alive) < count:
        alive = tally.fires.nonzero().flatten()
    by_density = alive[tally.fires[alive].argsort(stable=True)]
    groups = [group for group in by_density.tensor_split(count) if len(group)]
    return [int(group[tally.maximum[group].argmax()]) for group in groups]


def describe(
    sae: Any, store: ActivationStore, features: Sequence[int], examples: int = 6, progress: bool = False
) -> list[Feature]:
    """The `examples` top contexts of each of some features, over a whole store.

    No two examples of a feature are from one context or read the same. `sae`: anything with `encode_sparse`, `d_sae`
    and `W_enc`. Raises ValueError for a feature that does not exist.
    """
    for feature in features:
        if not 0 <= feature < sae.d_sae:
            raise ValueError(f"features: got {feature}, want 0 to {sae.d_sae - 1}")
    return [
        Feature(
            index=feature,
            density=len(tokens) / store.n_tokens,
            maximum=float(activations.max()) if len(tokens) else 0.0,
            examples=_top(store, tokens, activations, examples),
        )
        for feature, (tokens, activations) in zip(features, _firings(sae, store, features, progress), strict=True)
    ]


def markdown(features: Sequence[Feature], title: str, n_tokens: int) -> str:
    """A page that shows each feature's top contexts with the token that fires marked [[**so**]].  n_tokens: how many their
    densities are of."""
    lines = [
        f"# {title}",
        "",
        f"Features from rare to common. *Density* is the fraction of all {n_tokens:,} tokens a feature fires on. Each line",
        "is the part of a context around one of its highest activations, with the token that fires marked [[**so**]].",
    ]
    for feature in sorted(features, key=lambda feature: feature.density):
        rarity = f"density {feature.density:.3%} · max {feature.maximum:.2f}"
        lines += ["", f"## Feature {feature.index}", "", rarity, "", "| activation | context |", "|---:|:---|"]
        lines += [f"| {example.activation:.2f} | {_marked(*example.text)} |" for example in feature.examples]
    return "\n".join(lines) + "\n"


def _firings(sae: Any, store: ActivationStore, features: Sequence[int], progress: bool) -> list[tuple[Tensor, Tensor]]:
    """For each feature, (tokens, activations) where it fires, on the CPU."""
    place = torch.full((sae.d_sae,), -1)
    place[list(features)] = torch.arange(len(features))
    found, begin = [], 0
    with torch.inference_mode():
        for x in tqdm(store.chunks(CHUNK), "features", -(-store.n_tokens // CHUNK), disable=not progress):
            code = sae.encode_sparse(x.to(sae.W_enc.device))
            fires = code.magnitudes > 0
            rows, indices = code.row_ids()[fires].cpu() + begin, code.indices[fires].long().cpu()
            kept = place[indices] >= 0
            found.append((rows[kept], place[indices[kept]], code.magnitudes[fires].float().cpu()[kept]))
            begin += len(x)
    tokens, places, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return [(tokens[places == i], values[places == i]) for i in range(len(features))]


def _top(store: ActivationStore, tokens: Tensor, activations: Tensor, count: int) -> list[Example]:
    distinct = Distinct(tokens.numpy(), store.context_length, lambda token: "".join(store.around(token)))
    taken = distinct.take(in_order(activations.argsort(descending=True, stable=True).numpy()), count)
    return [Example(int(tokens[i]), float(activations[i]), store.around(int(tokens[i]))) for i in taken]


def _marked(before: str, at: str, after: str) -> str:
    return f"…{_plain(before, keep_ends=True)}[[**{_plain(at)}**]]{_plain(after, keep_ends=True)}…"


def _plain(text: str, keep_ends: bool = False) -> str:
    """One line of it, with what Markdown would take for markup escaped."""
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"([\\`*_\[<|~$])", r"\\\1", text if keep_ends else text.strip())
