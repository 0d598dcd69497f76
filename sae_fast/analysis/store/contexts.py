"""Which of the tokens that a feature fires on are shown, and what is around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sae_fast.analysis.store import FeatureStore


@dataclass(frozen=True)
class Context:
    """A token on which a feature fires, in the window of tokens around it.

    pieces: the text of each token of the window, with what stands before it, as it is in the source; empty strings in a
    store without text.  activations: the feature's, one a token of the window, 0 where it does not fire.  at: which of them
    is the token itself.  stratum: 0 of a top context, else which quantile of the activations it is from, 1 the highest.
    """

    feature: int
    token: int
    activation: float
    stratum: int
    at: int
    pieces: list[str]
    activations: list[float]

    @property
    def text(self) -> tuple[str, str, str]:
        """(before, at, after), the token itself without the white space before it."""
        at, before = self.pieces[self.at], "".join(self.pieces[: self.at])
        own = at.lstrip() or at
        return before + at.removesuffix(own), own, "".join(self.pieces[self.at + 1 :])


@dataclass(frozen=True)
class Contexts(Sequence):
    """Contexts of many features as arrays, M of them, in the order of the features asked for; of one feature, the top
    contexts first, best first, and then the strata, highest first.  ``contexts[i]`` is one :class:`Context`.

    feature [M] int32, stratum [M] int8, token [M] int64, activation [M] float32; the window of context i is tokens
    ``first[i]`` to ``first[i] + length[i] − 1`` (int64, int32), and ``activations`` [M, W] float32 are the feature's there,
    with 0 beyond ``length[i]``.
    """

    store: FeatureStore
    feature: np.ndarray
    stratum: np.ndarray
    token: np.ndarray
    activation: np.ndarray
    first: np.ndarray
    length: np.ndarray
    activations: np.ndarray

    def __len__(self) -> int:
        return len(self.feature)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        first, length = int(self.first[i]), int(self.length[i])
        return Context(
            feature=int(self.feature[i]),
            token=int(self.token[i]),
            activation=float(self.activation[i]),
            stratum=int(self.stratum[i]),
            at=int(self.token[i]) - first,
            pieces=self.store.pieces_of(first, first + length),
            activations=self.activations[i, :length].tolist(),
        )


def choose(
    store: FeatureStore, tokens: np.ndarray, values: np.ndarray, top: int, bins: int, per_bin: int, before: int, after: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of a feature's tokens [n], ascending, and its activations [n] there: (which are shown [M] int64, of which stratum
    each is [M] int8).  Stratum 0 has up to ``top``, the highest first; 1 to ``bins`` are quantiles, up to ``per_bin`` of
    each.  No two are from one context or read the same."""
    shown: list[int] = []
    strata: list[int] = []
    seen: set[object] = set()
    size = store.context_length or 1

    def take(candidates: Iterator[np.ndarray], count: int, stratum: int) -> None:
        wanted = len(shown) + count
        for block in candidates:
            for i, token in zip(block.tolist(), tokens[block].tolist(), strict=True):
                if len(shown) == wanted:
                    return
                context = token // size
                if context in seen:
                    continue
                if store.has_text:
                    first, last = max(context * size, token - before), min((context + 1) * size, token + 1 + after)
                    # As a reader sees it: white space is not looked at.
                    reading = " ".join("".join(store.pieces_of(first, last)).split())
                    if reading in seen:
                        continue
                    seen.add(reading)
                seen.add(context)
                shown.append(i)
                strata.append(stratum)

    if top and len(tokens):
        best = _best_of_each_context(tokens // size, values)
        take(_in_order(best[np.argsort(-values[best], kind="stable")]), top, 0)
    if bins and per_bin and len(tokens):
        ranked = np.argsort(-values, kind="stable")
        for i in range(bins):
            stratum = ranked[i * len(ranked) // bins : (i + 1) * len(ranked) // bins]
            take(_scattered(stratum), per_bin, i + 1)
    return np.array(shown, dtype=np.int64), np.array(strata, dtype=np.int8)


def windows(
    store: FeatureStore, tokens: np.ndarray, values: np.ndarray, at: np.ndarray, before: int, after: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Around the chosen of a feature's tokens: (first [M] int64, length [M] int32, its activations [M, W] float32)."""
    first, length = _around(store, tokens[at], before, after)
    place = np.arange(before + 1 + after)
    wanted = first[:, None] + place
    if len(at) == 0:
        return first, length, np.zeros(wanted.shape, dtype=np.float32)
    found = np.searchsorted(tokens, wanted).clip(max=len(tokens) - 1)
    fires = (tokens[found] == wanted) & (place < length[:, None])
    return first, length, np.where(fires, values[found], np.float32(0))


def _around(store: FeatureStore, tokens: np.ndarray, before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """(first [n] int64, length [n] int32) of the window around each token, within its context."""
    size = store.context_length or 1
    begin = tokens // size * size
    first = np.maximum(begin, tokens - before)
    last = np.minimum(np.minimum(begin + size, store.n_tokens) - 1, tokens + after)
    return first, (last - first + 1).astype(np.int32)


def _best_of_each_context(contexts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which entries are the highest of their context, the first of equal ones; contexts ascend."""
    starts = _starts(contexts)
    lengths = np.diff(starts, append=len(contexts))
    highest = np.flatnonzero(values == np.repeat(np.maximum.reduceat(values, starts), lengths))
    return highest[_starts(contexts[highest])]


def _starts(ascending: np.ndarray) -> np.ndarray:
    """Where each run of equal numbers begins; there is at least one number."""
    return np.concatenate(([0], np.flatnonzero(ascending[1:] != ascending[:-1]) + 1))


def _in_order(entries: np.ndarray) -> Iterator[np.ndarray]:
    """All, in blocks that grow: few are needed, as a rule."""
    begin, size = 0, 64
    while begin < len(entries):
        yield entries[begin : begin + size]
        begin, size = begin + size, 2 * size


def _scattered(entries: np.ndarray) -> Iterator[np.ndarray]:
    """All, from the middle in steps of about the golden section, which spread over them however few are taken."""
    n = len(entries)
    step = max(1, round(0.6180339887 * n))
    while gcd(step, n) > 1:
        step += 1
    begin, size = 0, 16
    while begin < n:
        yield entries[(n // 2 + np.arange(begin, min(begin + size, n)) * step) % n]
        begin, size = begin + size, 2 * size
