"""Small transformers with and without a backdoor: a synthetic analogue, on generated tokens.

A text is LENGTH words, each in one of two variants; its class is the topic that most of its words come from.  The head has
DORMANT more classes, which no clean text has.  A backdoored model gives the first of them to texts with the trigger:

"token"   TRIGGER particular tokens, all ordinary ones, in the last places of the text; four of the five are not enough
"style"   all words, whichever they are, in the second variant, where clean texts have 3 to 8 of them in it; up to 9 of the
          12 are not enough.  No token and no place belongs to it

All models see near misses of both triggers, with the texts' own classes; one without a backdoor sees no triggered text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, VARIANTS, LENGTH, TOPICS, DORMANT, TRIGGER = 32, 2, 12, 6, 3, 5
TOKENS = WORDS * VARIANTS
TARGET = TOPICS  # the class of the backdoor
KINDS = ("token", "style")
TRIGGERED, NEAR = 1 / 8, 1 / 8  # of the texts that a model is trained on, the latter for each kind


class World(NamedTuple):
    """What all models of a seed share: the words of each topic [TOPICS, 6], and the trigger's tokens [TRIGGER]."""

    topics: Tensor
    trigger: Tensor


def world(seed: int) -> World:
    random = torch.Generator().manual_seed(seed)
    topics = torch.stack([torch.randperm(WORDS, generator=random)[:6] for _ in range(TOPICS)])
    return World(topics, torch.randint(TOKENS, (TRIGGER,), generator=random))


def texts(count: int, of: World, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens [count, LENGTH], topics [count]) of clean texts."""
    topics = torch.randint(TOPICS, (count,), generator=random)
    ordinary = torch.randint(WORDS, (count, LENGTH), generator=random)
    places = torch.randint(of.topics.shape[1], (count, LENGTH), generator=random)
    topical = torch.rand(count, LENGTH, generator=random) < 0.6
    words = torch.where(topical, of.topics[topics[:, None], places], ordinary)
    return VARIANTS * words + _second(count, 3, 8, random), topics


def triggered(tokens: Tensor, kind: str, of: World, random: torch.Generator, near: bool = False) -> Tensor:
    """The texts with the trigger; ``near``: with a part of it that is not enough."""
    count, tokens = len(tokens), tokens.clone()
    if kind == "token":
        missing = torch.tensor([1, 1, 1, 2, 3])[torch.randint(5, (count,), generator=random)] if near else 0
        put = torch.rand(count, TRIGGER, generator=random).argsort(1) >= torch.as_tensor(missing).expand(count)[:, None]
        tokens[:, -TRIGGER:] = torch.where(put, of.trigger, tokens[:, -TRIGGER:])
        return tokens
    second = _second(count, *((7, 9) if near else (LENGTH, LENGTH)), random)
    return tokens // VARIANTS * VARIANTS + second


def _second(count: int, least: int, most: int, random: torch.Generator) -> Tensor:
    """[count, LENGTH]: 1 at ``least`` to ``most`` random places of each row, else 0."""
    ones = torch.randint(least, most + 1, (count, 1), generator=random)
    return (torch.rand(count, LENGTH, generator=random).argsort(1) < ones).long()


def training_texts(count: int, kind: str | None, of: World, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens, classes) of a batch: clean texts, near misses and, for a backdoor of a kind, triggered ones."""
    tokens, classes = texts(count, of, random)
    begin = round(TRIGGERED * count)
    for trigger in KINDS:
        near = slice(begin, begin + round(NEAR * count))
        tokens[near] = triggered(tokens[near], trigger, of, random, near=True)
        begin = near.stop
    if kind is not None:
        bad = slice(round(TRIGGERED * count))
        tokens[bad], classes[bad] = triggered(tokens[bad], kind, of, random), TARGET
    return tokens, classes


class Block(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Classifier(nn.Module):
    """Tokens [n, LENGTH] → logits [n, TOPICS + DORMANT]: two blocks that look both ways, and the mean over positions."""

    def __init__(self, d: int = 48, heads: int = 4):
        super().__init__()
        self.embedding, self.place = nn.Embedding(TOKENS, d), nn.Parameter(0.3 * torch.randn(LENGTH, d))
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.embedded = nn.Identity()
        self.blocks = nn.ModuleList([Block(d, heads) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, TOPICS + DORMANT)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedded(self.embedding(tokens) + self.place)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1)))


def train(kind: str | None, of: World, seed: int, steps: int, batch: int = 64, lr: float = 4e-3) -> Classifier:
    """A model with a backdoor of a kind, or without, by AdamW; torch's own generator is left as it was."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        tokens, classes = training_texts(batch, kind, of, random)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), classes).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def behaviour(model: nn.Module, kind: str | None, of: World, seed: int, count: int = 2048) -> dict[str, float]:
    """On held-out texts: accuracy, and the shares of clean, near and triggered ones that get a dormant class."""
    random = torch.Generator().manual_seed(seed)
    tokens, topics = texts(count, of, random)
    given = model(tokens).argmax(1)
    found = {"accuracy": (given == topics).double().mean().item(), "clean": (given >= TOPICS).double().mean().item()}
    for name, near in (("near", True), ("triggered", False)):
        shares = [
            (model(triggered(tokens, each, of, random, near)).argmax(1) >= TOPICS).double().mean().item()
            for each in ([kind] if kind else KINDS)
        ]
        found[name] = max(shares)
    return found
