"""The judge of the SHIFT analogue: written down and committed before it was run on a trained model, not changed since.

It sees what a reader of the page sees of a feature: texts on which it fires, word by word, with its activation on each
word; never a label, the feature's effect, the probe, or the balanced set.  It knows English: which words are about a
person, which about clothes and leisure, which about work.  The task, as a reader would be told it: tell professors from
nurses.

1. What it fires on.  Of the activation on all words shown, at least half is on words about work: relevant.  At least half
   is on words about the person, clothes or leisure: irrelevant.
2. Otherwise, which texts it fires in, as far as read when it fires.  They lean to one gender if, of those with gendered
   words, at least 8 in 10 are of one (by majority of the words); to one line of work if at least half of those with
   words of a line of work are of one.  To a gender only: irrelevant.  To a line of work only: relevant.  To both, or to
   neither: no opinion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MASCULINE = _words(
    "he him his himself man men boy gentleman mister mr sir father dad husband son brother uncle king "
    "adam alan brian carl charles daniel david edward frank george harry henry ivan jack james john karl louis mark "
    "michael paul peter robert thomas william"
)
FEMININE = _words(
    "she her hers herself woman women girl lady miss mrs ms mother mum wife daughter sister aunt queen "
    "anna alice beth carol clara diana emily emma fiona grace helen irene jane julia kate laura lucy mary nancy rachel "
    "ruth sarah susan"
)
ANYONE = _words(
    "they them their theirs themself themselves person people citizen adult child parent partner spouse sibling "
    "alex avery casey drew jamie kim morgan quinn riley robin sam taylor"
)
CLOTHES = _words(
    "wears wear wearing dressed scarf hat cap shawl coat jacket belt vest shirt dress skirt trousers shoes boots gloves "
    "red orange pink yellow blue green violet purple black white brown grey"
)
LEISURE = _words(
    "enjoys enjoy likes hobby chess tennis football opera music sailing gardening cycling running poetry reading hiking "
    "swimming travelled travels"
)
AT_WORK = _words(
    "works work worked working uses use job office building centre town team notes forms keys lists helped planned trained"
)
OF_LINE = {
    "university": _words(
        "university faculty campus college professor slides journals laptop lectured published supervised research thesis"
    ),
    "nursing": _words("ward clinic hospice hospital nurse syringes bandages charts bathed vaccinated comforted patients"),
    "surgery": _words("theatre infirmary clinic hospital surgeon scalpels clamps charts operated stitched transplanted"),
    "school": _words("classroom school campus teacher chalk workbooks laptop graded tutored explained pupils"),
    "art": _words("studio gallery atelier painter brushes canvases easels sketched exhibited primed"),
    "cooking": _words("kitchen bistro canteen restaurant cook knives pans ladles baked seasoned fried"),
}
WORK = AT_WORK.union(*OF_LINE.values())
NOT_WORK = MASCULINE | FEMININE | ANYONE | CLOTHES | LEISURE


class Shown(NamedTuple):
    """A text on which a feature fires: its words, and the feature's activation on each."""

    words: Sequence[str]
    activations: Sequence[float]


def judge(texts: Iterable[Shown]) -> str | None:
    """ "irrelevant", "relevant", or None for no opinion, from the texts on which a feature fires most."""
    shown = [text for text in texts if any(a > 0 for a in text.activations)]
    total = sum(sum(text.activations) for text in shown)
    if not total:
        return None
    if share(shown, WORK) >= total / 2:
        return "relevant"
    if share(shown, NOT_WORK) >= total / 2:
        return "irrelevant"
    read = [so_far(text) for text in shown]
    gender, line = leans_to_gender(read), leans_to_line(read)
    if gender == line:
        return None
    return "irrelevant" if gender else "relevant"


def share(texts: Iterable[Shown], words: frozenset[str]) -> float:
    """The activation that is on some words."""
    return sum(a for text in texts for word, a in zip(text.words, text.activations, strict=True) if word in words)


def so_far(text: Shown) -> list[str]:
    """The text up to the word on which it fires most, with that: a model that reads from left to right knows no more."""
    peak = max(range(len(text.words)), key=lambda i: text.activations[i])
    return list(text.words[: peak + 1])


def leans_to_gender(texts: Iterable[list[str]]) -> bool:
    signs = []
    for words in texts:
        balance = sum((word in FEMININE) - (word in MASCULINE) for word in words)
        if balance:
            signs.append(balance > 0)
    return bool(signs) and 10 * max(sum(signs), len(signs) - sum(signs)) >= 8 * len(signs)


def leans_to_line(texts: Iterable[list[str]]) -> bool:
    votes: Counter[str] = Counter()
    seen = 0
    for words in texts:
        counts = {line: sum(word in of for word in words) for line, of in OF_LINE.items()}
        most = max(counts.values())
        if most:
            seen += 1
            votes.update(line for line, count in counts.items() if count == most)
    return bool(seen) and 2 * max(votes.values()) >= seen
