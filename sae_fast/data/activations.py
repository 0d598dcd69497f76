"""Activations on disk: what one layer says on every token of a text, served in shuffled batches.

A store is a folder, made by `sae_fast.data.harvest.harvest`:

    activations.npy   [n_tokens, d] float32
    tokens.npy        [n_tokens] int32
    spans.npy         [n_tokens, 2] int64, where each token begins and ends in the text, in characters
    text.txt          the text, UTF-8
    store.json        d, n_tokens, context_length, site, hook_name, layer, model, text, when it was harvested, and
                      the key under which it is cached

Only whole contexts are kept. Special tokens around a context ([CLS], [SEP], BOS) and in the text went through
the model, but are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_fast import files

VERSION = 2  # of the format, and of how a text becomes contexts: raise it when either changes


class ActivationStore:
    """The activations of one layer on every token of a text, memory-mapped; read-only.

    A store is a run of whole contexts in a folder: `split` gives two stores over the same files. All
    positions that its methods take and give count from its own first token.
    """

    def __init__(self, folder: Path, info: dict[str, Any], contexts: range):
        self.folder, self.info, self.contexts = folder, info, contexts

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """The store in a folder that `harvest` made. Raises FileNotFoundError if there is none, and ValueError
        if it is damaged or of another version.
        """
        folder = Path(folder)
        if not (folder / "store.json").is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no activation store: there is no store.json in it")
        try:
            info = files.read_json(folder / "store.json")
            version = files.key(info, folder / "store.json", int, "version")
            if version != VERSION:
                raise ValueError(f"got version {version}, want {VERSION}")
            d, n_tokens, length = (
                files.key(info, folder / "store.json", int, name) for name in ("d", "n_tokens", "context_length")
            )
            shapes = {"activations.npy": (n_tokens, d), "tokens.npy": (n_tokens,), "spans.npy": (n_tokens, 2)}
            for name, shape in shapes.items():
                if (got := np.load(folder / name, mmap_mode="r").shape) != shape:
                    raise ValueError(f"{name}: got shape {got}, want {shape}")
            if not 0 < length <= n_tokens:
                raise ValueError(f"context_length: got {length}, want 1 to {n_tokens}")
        except (ValueError, EOFError, FileNotFoundError) as error:
            reason = f"the activation store in {str(folder)!r} cannot be used: {error}"
            raise ValueError(f"{reason}; delete that folder and harvest again") from error
        return cls(folder, info, range(n_tokens // length))

    @property
    def d(self) -> int:
        """The width of an activation."""
        return self.info["d"]

    @property
    def context_length(self) -> int:
        """Tokens per context."""
        return self.info["context_length"]

    @property
    def n_tokens(self) -> int:
        return len(self.contexts) * self.context_length

    @cached_property
    def activations(self) -> np.ndarray:
        """[n_tokens, d] float32, a memory map."""
        return self._map("activations.npy")

    @cached_property
    def tokens(self) -> np.ndarray:
        """[n_tokens] int32, a memory map: the token ids."""
        return self._map("tokens.npy")

    @cached_property
    def text(self) -> str:
        """The whole text that was run, of which this store may hold a part."""
        return (self.folder / "text.txt").read_bytes().decode()

    def split(self, holdout: float = 0.1) -> tuple[ActivationStore, ActivationStore]:
        """(the first contexts, the last `holdout` of them). Raises ValueError if either would be empty."""
        held = round(len(self.contexts) * holdout)
        if not 0 < held < len(self.contexts):
            raise ValueError(
                f"holdout: got {holdout}, which holds out {held} of {len(self.contexts)} contexts of "
                f"{self.context_length} tokens, want at least one on either side"
            )
        first, last = self.contexts[:-held], self.contexts[-held:]
        return ActivationStore(self.folder, self.info, first), ActivationStore(self.folder, self.info, last)

    def batches(
        self,
        batch_size: int,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        seed: int = 0,
        start_step: int = 0,
    ) -> Iterator[Tensor]:
        """Shuffled fp32 batches [batch_size, d]: `steps` in all, or `epochs` passes, or without end.

        Every pass is a fresh permutation that depends on (seed, pass) alone, so batch number `start_step`
        is the same whether the batches before it were drawn or not: training resumes exactly. What does not
        fill a batch at the end of a pass is left out of it.
        """
        per_epoch = self.n_tokens // batch_size if batch_size > 0 else 0
        if per_epoch == 0:
            raise ValueError(f"batch_size: got {batch_size}, want 1 to {self.n_tokens}, the tokens there are")
        if steps is not None and epochs is not None:
            raise ValueError(f"steps, epochs: got {steps} and {epochs}, want one of them")
        end = steps if epochs is None else epochs * per_epoch
        return self._batches(batch_size, per_epoch, range(start_step, 1 << 62 if end is None else end), seed)

    def chunks(self, size: int = 4096) -> Iterator[Tensor]:
        """All activations in order, as fp32 tensors [at most `size`, d]."""
        for begin in range(0, self.n_tokens, size):
            yield torch.from_numpy(np.array(self.activations[begin : begin + size]))

    def mean_and_scale(self) -> tuple[Tensor, float]:
        """(the mean activation [d], the root mean variance of a dimension)."""
        total = torch.zeros(self.d, dtype=torch.float64)
        for x in self.chunks():
            total += x.double().sum(0)
        mean = total / self.n_tokens
        variance = sum(float((x - mean).square().sum()) for x in self.chunks()) / (self.n_tokens * self.d)
        if variance == 0:
            raise ValueError("activations: all tokens have the same activation; there is nothing to learn")
        return mean, variance**0.5

    def around(self, token: int, before: int = 12, after: int = 8) -> tuple[str, str, str]:
        """The text (before, at, after) a token, as written: up to that many tokens either side, in its
        context.
        """
        begin = token // self.context_length * self.context_length
        first, last = max(begin, token - before), min(begin + self.context_length - 1, token + after)
        spans = self.spans[[first, token, last]]
        (start, _), (left, right), (_, end) = spans.tolist()
        return self.text[start:left], self.text[left:right], self.text[right:end]

    @cached_property
    def spans(self) -> np.ndarray:
        """[n_tokens, 2] int64, a memory map: where each token begins and ends in the text, in characters."""
        return self._map("spans.npy")

    def _map(self, name: str) -> np.ndarray:
        whole = np.load(self.folder / name, mmap_mode="r")
        return whole[self.contexts.start * self.context_length : self.contexts.stop * self.context_length]

    def _batches(self, batch_size: int, per_epoch: int, steps: range, seed: int) -> Iterator[Tensor]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng([seed, epoch]).permutation(self.n_tokens)
            begin = step % per_epoch * batch_size
            yield torch.from_numpy(self.activations[order[begin : begin + batch_size]])
