"""The worlds of the SHIFT analogue: gender told by words, by combinations of words only, and a planted conjunction."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.claims import _biographies
from benchmarks.claims._biographies import FEMALE, GENDERED, MALE, NAMES, WORK, Biographies, Transformer

WORDS, TOKENLESS, PLANTED = "words", "tokenless", "planted"
PLANT = 0.7  # of the planted direction, in units of the embedding's mean norm
SITES = ("model.embed", "model.blocks.0", "model.blocks.1")  # of a probe on it


class World(NamedTuple):
    """A generator of texts, a language model of its general corpus, and the words that the tokens stand for.  ``plant``:
    tokens [n, T] → where the planted direction is on [n, T] bool, in the world that has one."""

    bios: Biographies
    model: nn.Module
    plant: Callable[[Tensor], Tensor] | None = None

    def words(self, tokens: Tensor) -> list[str]:
        return [self.bios.words[i] for i in tokens.tolist()]


def worlds(seed: int, quick: bool) -> dict[str, World]:
    steps = {"steps": 15} if quick else {}
    bios, tokenless = (Biographies(seed=seed, tokenless=each) for each in (False, True))
    model = _biographies.train_model(bios, seed, **steps)
    planted = Planted(model, bios, seed)
    return {
        WORDS: World(bios, model),
        TOKENLESS: World(tokenless, _biographies.train_model(tokenless, seed, **steps)),
        PLANTED: World(bios, planted, planted.embed.on),
    }


class Planted(nn.Module):
    """A transformer whose embedding has one more direction: on from where a text has had both a word for a woman and a word
    that only nurses have, whichever was last."""

    def __init__(self, model: Transformer, bios: Biographies, seed: int):
        super().__init__()
        self.embed, self.blocks = PlantedEmbedding(model.embed, bios, seed), model.blocks
        self.norm, self.unembed = model.norm, model.unembed
        self.eval()

    forward, stream = Transformer.forward, Transformer.stream


class PlantedEmbedding(nn.Module):
    def __init__(self, embed: nn.Module, bios: Biographies, seed: int):
        super().__init__()
        self.embed = embed
        others = {w for of in WORK.values() for who, words in of.items() if who != "nurse" for w in words.split()}
        of_nurses = {w for of in WORK.values() for w in of["nurse"].split()} - others
        self.woman, self.nurse = (
            torch.tensor([word in words for word in bios.words])
            for words in ({*NAMES[FEMALE], *GENDERED[FEMALE]} - {*NAMES[MALE], *GENDERED[MALE]}, of_nurses)
        )
        with torch.no_grad():
            size = embed(bios.general(64, seed).tokens).norm(dim=-1).mean()
        direction = torch.randn(embed.token.embedding_dim, generator=torch.Generator().manual_seed(seed))
        self.direction = PLANT * size * direction / direction.norm()

    def on(self, tokens: Tensor) -> Tensor:
        """[n, T] bool."""
        return (self.woman[tokens].cumsum(1) > 0) & (self.nurse[tokens].cumsum(1) > 0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) + self.on(tokens).unsqueeze(-1) * self.direction
