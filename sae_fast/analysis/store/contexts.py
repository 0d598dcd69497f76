"""The tokens that are shown of those that a feature fires on, and what is around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import numpy as np


class Tokens(Protocol):
    """The tokens of a :class:`sae_fast.analysis.store.FeatureStore`: in contexts of one length, with their text or not."""

    n_tokens: int
    context_length: int | None
    has_text: bool

    def pieces_of(self, first: int, end: int) -> list[str]:
        """The text of tokens first to end − 1."""


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

    store: Tokens
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


class Distinct:
    """Takes of a feature's entries some of which no two are from one context or read the same.  tokens [n]: of the entries;
    size: tokens per context; read: the text around a token, in which white space is not looked at, as no reader would."""

    def __init__(self, tokens: np.ndarray, size: int, read: Callable[[int], str] | None):
        self.tokens, self.size, self.read = tokens, size, read
        self.seen: set[object] = set()

    def take(self, candidates: Iterator[np.ndarray], count: int) -> list[int]:
        """The first ``count`` entries, or as many as there are, of blocks of candidates; they differ from those taken
        before, too."""
        taken: list[int] = []
        for block in candidates:
            for i, token in zip(block.tolist(), self.tokens[block].tolist(), strict=True):
                if len(taken) == count:
                    return taken
                context = token // self.size
                if context in self.seen:
                    continue
                if self.read is not None:
                    reading = " ".join(self.read(token).split())
                    if reading in self.seen:
                        continue
                    self.seen.add(reading)
                self.seen.add(context)
                taken.append(i)
        return taken


def in_order(entries: np.ndarray) -> Iterator[np.ndarray]:
    """All, in blocks that grow: few are needed, as a rule."""
    begin, size = 0, 64
    while begin < len(entries):
        yield entries[begin : begin + size]
        begin, size = begin + size, 2 * size


def shown(
    store: Tokens, tokens: np.ndarray, values: np.ndarray, top: int, bins: int, per_bin: int, before: int, after: int
) -> tuple[np.ndarray, np.ndarray]:
    """(the entries that are shown [M] int64, the stratum of each [M] int8) of a feature's tokens [n], ascending, and its
    activations [n] there.  Stratum 0 has up to ``top``, the highest first; 1 to ``bins`` are quantiles, up to ``per_bin``
    of each.  No two are from one context or read the same."""
    size = store.context_length or 1

    def read(token: int) -> str:
        begin = token // size * size
        return "".join(store.pieces_of(max(begin, token - before), min(begin + size, token + 1 + after)))

    distinct = Distinct(tokens, size, read if store.has_text else None)
    taken: list[list[int]] = [[] for _ in range(bins + 1)]
    if top and len(tokens):
        best = _best_of_each_context(tokens // size, values)
        taken[0] = distinct.take(in_order(best[np.argsort(-values[best], kind="stable")]), top)
    if bins and per_bin and len(tokens):
        ranked = np.argsort(-values, kind="stable")
        for i in range(bins):
            stratum = ranked[i * len(ranked) // bins : (i + 1) * len(ranked) // bins]
            taken[i + 1] = distinct.take(_scattered(stratum), per_bin)
    strata = [stratum for stratum, of in enumerate(taken) for _ in of]
    return np.array([i for of in taken for i in of], dtype=np.int64), np.array(strata, dtype=np.int8)


def windows(
    store: Tokens, tokens: np.ndarray, values: np.ndarray, at: np.ndarray, before: int, after: int
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


def _around(store: Tokens, tokens: np.ndarray, before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """(first [n] int64, length [n] int32) of the window around each token, within its context."""
    size = store.context_length or 1
    begin = tokens // size * size
    first = np.maximum(begin, tokens - before)
    last = np.minimum(np.minimum(begin + size, store.n_tokens) - 1, tokens + after)
    return first, (last - first + 1).astype(np.int32)


def _best_of_each_context(contexts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The entries that are the highest of their context, the first of equal ones; contexts ascend."""
    starts = _starts(contexts)
    lengths = np.diff(starts, append=len(contexts))
    highest = np.flatnonzero(values == np.repeat(np.maximum.reduceat(values, starts), lengths))
    return highest[_starts(contexts[highest])]


def _starts(ascending: np.ndarray) -> np.ndarray:
    """The places at which runs of equal numbers begin; there is at least one number."""
    return np.concatenate(([0], np.flatnonzero(ascending[1:] != ascending[:-1]) + 1))


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
