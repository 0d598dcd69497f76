"""Synthetic biographies, and a small transformer that learns to write them: the world of the SHIFT analogue.

A biography is a few clauses of words: who; where and with what someone works; what things of which colours they have.  It
has three properties, which the transformer learns from the general corpus, because they make later words predictable:

profession   told by words that each are rare, never named
gender       told by many words: names, pronouns, nouns
taste        told by no word: warm colours for some things and cool ones for others, or the reverse.  Every biography has
             two warm and two cool ones, so that as a bag of words it says nothing of taste

In the general corpus they are independent.  In the variant ``tokenless`` names, pronouns and nouns are neutral, and taste
is what is called gender.  An analogue of Bias in Bios (De-Arteaga et al. 2019) as Marks et al. 2024 (arXiv 2403.19647) use
it, not a replication: no word of it is from there.
"""

from __future__ import annotations

import random
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

T = TypeVar("T")


def _words(text: str) -> list[str]:
    return text.split()


LENGTH = 31  # tokens of a biography, every one
BEGIN = "<begin>"
PROFESSIONS = ("professor", "nurse", "surgeon", "teacher", "painter", "cook")  # which the texts never name
MALE, FEMALE = 0, 1
NAMES = (
    _words("adam brian carl david edward frank george henry ivan john karl louis"),
    _words("anna beth clara diana emma fiona grace helen irene jane kate laura"),
)
NEUTRAL_NAMES = _words("alex robin sam taylor morgan casey jamie riley quinn avery drew kim")
# pronoun, possessive, reflexive, and two nouns
GENDERED = (_words("he his himself man gentleman father husband"), _words("she her herself woman lady mother wife"))
NEUTRAL = _words("they their themselves person citizen parent partner")
# Where, with what, and what is done: three words each, of which some belong to two professions.
WORK = {
    "place": {
        "professor": "university faculty campus", "nurse": "ward clinic hospice", "surgeon": "theatre infirmary clinic",
        "teacher": "classroom school campus", "painter": "studio gallery atelier", "cook": "kitchen bistro canteen",
    },
    "tool": {
        "professor": "slides journals laptop", "nurse": "syringes bandages charts", "surgeon": "scalpels clamps charts",
        "teacher": "chalk workbooks laptop", "painter": "brushes canvases easels", "cook": "knives pans ladles",
    },
    "task": {
        "professor": "lectured published supervised", "nurse": "bathed vaccinated comforted",
        "surgeon": "operated stitched transplanted", "teacher": "graded tutored explained",
        "painter": "sketched exhibited primed", "cook": "baked seasoned fried",
    },
}  # fmt: skip
ANYWHERE = {
    "place": _words("office building centre town team"),
    "tool": _words("notes forms gloves keys lists"),
    "task": _words("helped planned travelled trained worked"),
}
ADJECTIVES = _words("kind quiet tall busy cheerful patient")
WARM_COOL = (_words("red orange pink"), _words("blue green violet"))
# The first two are done in warm colours and the last two in cool ones, or the reverse.
WAYS = _words("wears paints keeps drives")
FRAME = _words(". , a and at called has is often uses with works")
# Less where taste is to be learned in the profession's place: it is harder to read than names.
CUE = {False: 0.8, True: 0.5}


class Texts(NamedTuple):
    """tokens [n, T], profession [n] (index into PROFESSIONS) and gender [n] (MALE, FEMALE), all int64."""

    tokens: Tensor
    profession: Tensor
    gender: Tensor


class Biographies:
    """The generator.  What it draws depends on its seed, on the set that is asked for and on that call's seed.

    words, index      the vocabulary, and the number of each word; 0 is <begin>, with which each begins
    cue, told         the probability that a clause on work has a word of the profession, not one of anywhere; and that a
                      name, pronoun or noun is one of the gender, not a neutral one
    """

    def __init__(self, seed: int = 0, tokenless: bool = False, cue: float | None = None, told: float = 0.6):
        self.seed, self.tokenless, self.told = seed, tokenless, 0.0 if tokenless else told
        self.cue = CUE[tokenless] if cue is None else cue
        work = [word for of in WORK.values() for words in of.values() for word in words.split()]
        parts = [FRAME, *NAMES, NEUTRAL_NAMES, *GENDERED, NEUTRAL, work, *ANYWHERE.values(), ADJECTIVES]
        parts += [*WARM_COOL, WAYS]
        self.words = list(dict.fromkeys([BEGIN, *(word for part in parts for word in part)]))
        self.index = {word: i for i, word in enumerate(self.words)}

    def general(self, n: int, seed: int) -> Texts:
        """Any profession with any gender, independently: what a language model is trained on."""
        draw = self._random("general", seed)
        return self._texts([(draw.randrange(len(PROFESSIONS)), draw.randrange(2)) for _ in range(n)], draw)

    def ambiguous(self, n: int, seed: int) -> Texts:
        """Male professors and female nurses only, half of each: profession 0 or 1, always that of the gender."""
        draw = self._random("ambiguous", seed)
        return self._texts(_shuffled([(i % 2, i % 2) for i in range(n)], draw), draw)

    def balanced(self, n: int, seed: int) -> Texts:
        """Professors and nurses of both genders, a quarter of each."""
        draw = self._random("balanced", seed)
        return self._texts(_shuffled([(i % 2, i // 2 % 2) for i in range(n)], draw), draw)

    def text(self, tokens: Tensor) -> str:
        """A biography [T] as words."""
        return " ".join(self.words[int(i)] for i in tokens[1:])

    def _random(self, which: str, seed: int) -> random.Random:
        return random.Random(f"{which} {self.seed} {seed} {self.tokenless}")

    def _texts(self, people: list[tuple[int, int]], draw: random.Random) -> Texts:
        rows = []
        for profession, gender in people:
            row = [self.index[word] for word in [BEGIN, *self._biography(PROFESSIONS[profession], gender, draw)]]
            assert len(row) == LENGTH
            rows.append(row)
        profession, gender = torch.tensor(people, dtype=torch.int64).reshape(-1, 2).unbind(1)
        return Texts(torch.tensor(rows, dtype=torch.int64).reshape(-1, LENGTH), profession, gender)

    def _biography(self, profession: str, gender: int, draw: random.Random) -> list[str]:
        def told(neutral: T, gendered: T) -> T:
            return gendered if draw.random() < self.told else neutral

        name = draw.choice(told(NEUTRAL_NAMES, NAMES[gender]))
        noun = draw.choice(told(NEUTRAL[3:], GENDERED[gender][3:]))
        possessive, reflexive = (told(NEUTRAL[i], GENDERED[gender][i]) for i in (1, 2))
        taste = gender if self.tokenless else draw.randrange(2)

        def work(kind: str) -> str:
            return draw.choice(WORK[kind][profession].split() if draw.random() < self.cue else ANYWHERE[kind])

        def coloured(way: str) -> str:
            return f"{way} {draw.choice(WARM_COOL[(WAYS.index(way) // 2) ^ taste])}"

        opening = [f"{name} is a {noun}", f"a {noun} called {name}", f"{name} , {draw.choice(ADJECTIVES)} {noun}"]
        place = [f"works at {work('place')}", f"{work('place')} has {name}"]
        tool = [f"uses {possessive} {work('tool')}", f"with {possessive} {work('tool')}"]
        task = [f"often {work('task')}", f"{work('task')} {reflexive}"]
        ways = draw.sample(WAYS, len(WAYS))
        has = [f"{told(NEUTRAL[0], GENDERED[gender][0])} {coloured(ways[i])} and {coloured(ways[i + 1])}" for i in (0, 2)]
        clauses = [draw.choice(opening), has[0], draw.choice(place), draw.choice(tool), has[1], draw.choice(task), ""]
        return " . ".join(clauses).split()


def _shuffled(people: list[tuple[int, int]], draw: random.Random) -> list[tuple[int, int]]:
    draw.shuffle(people)
    return people


# ---- The model ------------------------------------------------------------------------------------------------------


class Embedding(nn.Module):
    """tokens [B, T] → [B, T, d]: of the word and of the position."""

    def __init__(self, words: int, length: int, d: int):
        super().__init__()
        self.token, self.position = nn.Embedding(words, d), nn.Parameter(torch.empty(length, d))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position[: tokens.shape[1]]


class Block(nn.Module):
    """Causal attention and an MLP, each from a norm and added to the stream."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    """tokens [B, T] → logits of the next word [B, T, V].  Sites: embed, blocks.0, blocks.1, ... each [B, T, d]."""

    def __init__(self, words: int, d: int = 48, blocks: int = 2, heads: int = 4, length: int = LENGTH, seed: int = 0):
        super().__init__()
        self.embed = Embedding(words, length, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(blocks))
        self.norm, self.unembed = nn.LayerNorm(d), nn.Linear(d, words)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "norm" in name:
                    continue
                std = 0.3 if name.startswith("embed") else 0.02 if name.startswith("unembed") else p.shape[-1] ** -0.5
                p.zero_() if name.endswith("bias") else p.normal_(std=std, generator=draw)

    def stream(self, tokens: Tensor) -> Tensor:
        """[B, T, d]: what the last block gives."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.norm(self.stream(tokens)))


def train_model(
    bios: Biographies, seed: int, steps: int = 500, batch_size: int = 64, d: int = 48, blocks: int = 2, lr: float = 5e-3
) -> Transformer:
    """A language model of the general corpus, every batch of it new; AdamW, the rate rising and falling once."""
    model = Transformer(len(bios.words), d, blocks, seed=seed)
    corpus = bios.general(steps * batch_size, seed=seed).tokens.split(batch_size)
    adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, lr, steps, pct_start=0.1)
    for tokens in tqdm(corpus, f"language model {seed}", leave=False):
        adam.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        adam.step()
        schedule.step()
    return model.eval()
