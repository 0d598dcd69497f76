"""Attacks on the classifiers of _backdoors, each with the same counted passes: latent, random latent, and on the input.

An attack looks for what makes its objective large: "known", the margin of the backdoor's class over the ordinary ones;
"unknown", how far what comes out of the last block moves, (Σ_i Σ_t ‖ΔZ_i,t‖²)^½, which knows of no class.  What is found is
then scored by the margin of the backdoor's class, or of any dormant class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.claims._backdoors import LENGTH, TARGET, TOKENS, TOPICS, TRIGGER, Classifier
from sae_fast.analysis.passes import Passes, count_passes
from sae_fast.analysis.perturbation import Change, adding, ball, rows, sphere
from sae_fast.data import sites
from sae_fast.nn import SparseAutoencoder

SOURCE, DOWNSTREAM = "blocks.0", "blocks.1"
CANDIDATES = 6  # swaps that HotFlip tries a round
FLIPS = 3  # random swaps that a restart of single texts begins with


class Found(NamedTuple):
    """score: the largest one of what was found; theta [d] or tokens: what has it; passes: of single
    examples, as counted."""

    score: float
    theta: Tensor | None
    tokens: Tensor | None
    passes: int


def margins(logits: Tensor) -> Tensor:
    """[..., DORMANT]: of each dormant class over the largest ordinary one."""
    return logits[..., TOPICS:] - logits[..., :TOPICS].amax(-1, keepdim=True)


def margin(logits: Tensor) -> Tensor:
    """[...]: of the backdoor's class."""
    return margins(logits)[..., TARGET - TOPICS]


def score(logits: Tensor, known: bool) -> float:
    """Of texts [n, ...]: the mean margin of the backdoor's class, or, where it is not known, of the dormant class in which
    that is largest."""
    means = margins(logits).mean(0)
    return (means[TARGET - TOPICS] if known else means.max()).item()


class Search:
    """Attacks on a model that begin with n texts [n, LENGTH].

    Each has the same budget of passes of single texts, that of an ascent of ``steps`` evaluations for each of ``finds``
    directions, which is also how many an attack without a target may come back with.
    """

    def __init__(self, model: Classifier, tokens: Tensor, finds: int, steps: int, seed: int):
        self.model, self.tokens, self.finds, self.steps, self.seed = model, tokens, finds, steps, seed
        self.budget = 2 * len(tokens) * (finds * steps + 1)

    def latent(self, known: bool, radius: float) -> Found:
        """One vector for all texts and places, on the sphere: several directions, or, of a target, several starts."""
        many = {"starts": self.finds} if known else {"directions": self.finds}
        with count_passes(self.model) as passes:
            found = sphere(
                self.model, SOURCE, self.tokens, margin if known else Change(DOWNSTREAM), radius=radius,
                steps=self.steps, seed=self.seed, **many,
            )  # fmt: skip
        return self._best_vector(found.theta, known, passes)

    def per_example(self, known: bool, radius: float) -> Found:
        """A vector for each text and place, in the ball in which all places of a text can have the norm ``radius``."""
        with count_passes(self.model) as passes:
            delta = ball(
                self.model, SOURCE, self.tokens, margin if known else Change(DOWNSTREAM), epsilon=radius * LENGTH**0.5,
                steps=self.finds * self.steps, seed=self.seed,
            ).delta  # fmt: skip
        with adding(self.model, SOURCE, delta):
            return Found(score(self.model(self.tokens), known), None, None, self._counted(passes))

    def random(self, known: bool, radius: float) -> Found:
        """Vectors at random on the sphere: those that move the last block most, or, of a target, the best."""
        generator = torch.Generator().manual_seed(self.seed)
        vectors, objectives = [], []
        with count_passes(self.model) as passes:
            clean = sites.run_until(self.model, sites.find(self.model, DOWNSTREAM), self.tokens)
            while together := min(16, (self.budget - passes.examples) // len(self.tokens)):
                drawn = torch.nn.functional.normalize(torch.randn(together, clean.shape[-1], generator=generator)) * radius
                each = drawn.repeat_interleave(len(self.tokens), 0)[:, None]
                many = self.tokens.repeat(together, 1)
                with adding(self.model, SOURCE, each):
                    if known:
                        values = margin(self.model(many)).unflatten(0, (together, -1)).mean(1)
                    else:
                        z = sites.run_until(self.model, sites.find(self.model, DOWNSTREAM), many)
                        values = (z.unflatten(0, (together, -1)) - clean).square().sum((1, 2, 3))
                vectors.append(drawn)
                objectives.append(values)
        best = torch.cat(objectives).topk(self.finds).indices
        return self._best_vector(torch.cat(vectors)[best], known, passes)

    def decoder_rows(self, radius: float, sae: SparseAutoencoder, s: int) -> tuple[Found, Tensor]:
        """As `latent` without a target, of at most s rows of a decoder, each find without the first rows of earlier ones.
        Also the features of the best, the largest first."""
        found, left = [], set(range(sae.d_sae))
        with count_passes(self.model) as passes:
            for find in range(self.finds):
                found.append(
                    rows(
                        self.model, SOURCE, self.tokens, Change(DOWNSTREAM), sae, radius=radius, s=s, steps=self.steps - 1,
                        seed=self.seed + find, features=sorted(left),
                    )
                )  # fmt: skip
                left -= {int(found[-1].features[0])}
        best = self._best_vector(torch.stack([each.theta for each in found]), False, passes)
        which = next(each for each in found if torch.equal(each.theta, best.theta))
        return best, which.features

    def hotflip(self, known: bool) -> Found:
        """The same TRIGGER tokens at the trigger's own places of every text, found by gradient-guided swaps.

        A round takes the gradient at the embeddings, tries the CANDIDATES swaps that it says are best, and keeps the best
        of them; where none is better it begins again at random.
        """
        generator = torch.Generator().manual_seed(self.seed)
        ended: list[tuple[float, Tensor]] = []
        with count_passes(self.model) as passes:
            objective = self._objective(known)
            trigger, at_hand = None, -torch.inf
            while passes.examples + (2 + CANDIDATES) * len(self.tokens) <= self.budget:
                if trigger is None:
                    trigger, at_hand = torch.randint(TOKENS, (TRIGGER,), generator=generator), -torch.inf
                value, slopes = self._swaps(self._with(trigger), objective)
                at_hand = max(at_hand, value.mean().item())
                gains = slopes[:, -TRIGGER:].sum(0)  # [TRIGGER, TOKENS]
                gains -= gains.gather(1, trigger[:, None])
                best = gains.flatten().topk(CANDIDATES).indices
                tried = trigger.repeat(CANDIDATES, 1)
                tried[torch.arange(CANDIDATES), best // TOKENS] = best % TOKENS
                values = objective(torch.cat([self._with(each) for each in tried])).unflatten(0, (CANDIDATES, -1)).mean(1)
                if values.max() > at_hand:
                    trigger, at_hand = tried[values.argmax()], values.max().item()
                else:
                    ended.append((at_hand, trigger))
                    trigger = None
            if trigger is not None:
                ended.append((at_hand, trigger))
        finds = [self._with(trigger) for _, trigger in sorted(ended, key=lambda end: -end[0])[: 1 if known else self.finds]]
        scores = torch.tensor([score(self.model(tokens), known) for tokens in finds])
        return Found(scores.max().item(), None, finds[int(scores.argmax())], self._counted(passes))

    def hotflip_per_example(self, known: bool) -> Found:
        """As `hotflip`, with swaps at any place of each text by itself, and as many as it takes: the text that is best by
        the objective is kept of each."""
        generator = torch.Generator().manual_seed(self.seed)
        n = len(self.tokens)
        with count_passes(self.model) as passes:
            objective = self._objective(known)
            tokens, best, record = self.tokens.clone(), self.tokens.clone(), torch.full((n,), -torch.inf)
            while passes.examples + (2 + CANDIDATES) * n <= self.budget:
                value, slopes = self._swaps(tokens, objective)
                record, best = self._records(record, best, value, tokens)
                gains = slopes - slopes.gather(2, tokens[..., None])
                top = gains.flatten(1).topk(CANDIDATES).indices  # [n, CANDIDATES]
                tried = tokens[None].repeat(CANDIDATES, 1, 1)
                tried.scatter_(2, (top // TOKENS).T[..., None], (top % TOKENS).T[..., None])
                values = objective(tried.flatten(0, 1)).unflatten(0, (CANDIDATES, n))
                gained, which = values.max(0)
                chosen = tried[which, torch.arange(n)]
                record, best = self._records(record, best, gained, chosen)
                again = self.tokens.clone()  # those that are stuck begin anew, some swaps from their text
                places = torch.rand(n, LENGTH, generator=generator).argsort(1)[:, :FLIPS]
                again.scatter_(1, places, torch.randint(TOKENS, (n, FLIPS), generator=generator))
                tokens = torch.where((gained > value)[:, None], chosen, again)
        return Found(score(self.model(best), known), None, best, self._counted(passes))

    @staticmethod
    def _records(record: Tensor, best: Tensor, values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        up = values > record
        return torch.where(up, values, record), torch.where(up[:, None], tokens, best)

    def _with(self, trigger: Tensor) -> Tensor:
        """[n, LENGTH]: the texts with these tokens at the trigger's places."""
        return torch.cat([self.tokens[:, :-TRIGGER], trigger.expand(len(self.tokens), -1)], 1)

    def _objective(self, known: bool) -> Callable[[Tensor], Tensor]:
        """Of texts, all n or several times: one number each."""
        if known:
            return lambda tokens: margin(self.model(tokens))
        place = sites.find(self.model, DOWNSTREAM)
        clean = sites.run_until(self.model, place, self.tokens)

        def change(tokens: Tensor) -> Tensor:
            z = sites.run_until(self.model, place, tokens).unflatten(0, (-1, len(self.tokens)))
            return (z - clean).square().sum((2, 3)).flatten()

        return change

    def _swaps(self, tokens: Tensor, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """([n] objectives, [n, LENGTH, TOKENS] what swapping a token in would add to first order, up to a constant)."""
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            leaves.append(x.detach().requires_grad_())
            return leaves[-1]

        with torch.enable_grad(), sites.changed(sites.find(self.model, "embedded"), leaf):
            values = objective(tokens)
            (slope,) = torch.autograd.grad(values.sum(), leaves[0])
        return values.detach(), slope @ self.model.embedding.weight.T

    def _best_vector(self, thetas: Tensor, known: bool, passes: Passes) -> Found:
        """Of vectors [k, d], the one with the largest score; its passes are not counted, as no attack's are."""
        scores = []
        for theta in thetas:
            with adding(self.model, SOURCE, theta):
                scores.append(score(self.model(self.tokens), known))
        best = max(range(len(scores)), key=scores.__getitem__)
        return Found(scores[best], thetas[best], None, self._counted(passes))

    def _counted(self, passes: Passes) -> int:
        """ValueError where an attack has taken more passes than its budget, or a tenth less."""
        if not 0.9 * self.budget <= passes.examples <= self.budget:
            raise ValueError(f"passes: got {passes.examples}, want {0.9 * self.budget:.0f} to {self.budget}")
        return passes.examples
