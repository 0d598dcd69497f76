"""What the SHIFT analogue compares: a probe on a world, SAEs on its sites, SHIFT with the blind rule, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

import sae_fast as sf
from benchmarks.claims import _blind_rule, _tasks
from benchmarks.claims._biographies import Texts
from benchmarks.claims._sealed import Method
from benchmarks.claims._shift_worlds import SITES, World
from sae_fast.analysis.shift import Candidate, Probe, Shift, fit_head
from sae_fast.data import sites
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.scale import scale_

KINDS = {"Gated": (sf.GatedSAE, 2.0), "ReLU": (sf.ReluSAE, 1.0)}  # and λ
FEATURES, BATCH, LR, INIT_L0 = 384, 512, 4e-3, 24
STEPS, QUICK_STEPS = 300, 15
CORPUS, QUICK_CORPUS = 1000, 100  # texts that SAEs are trained on, and contexts are from
PROBED, ATTRIBUTED = 1000, 180  # ambiguous texts that heads are fitted on, and effects are of
THRESHOLD, QUICK_THRESHOLD = 0.02, 0.1  # T, in units of the mean |difference of logits|
CONTEXTS = 20  # texts shown of a feature
Off = Mapping[str, list[int]]


def margin(logits: Tensor) -> Tensor:
    """[n]: how far the probe is for nurse."""
    return logits[:, 1] - logits[:, 0]


class Lab:
    """A world, and a probe fitted on its ambiguous set, for which methods are made: each with a head of its own."""

    def __init__(self, world: World, seed: int, quick: bool):
        self.world, self.seed, self.quick = world, seed, quick
        self.train: Texts = world.bios.ambiguous(PROBED // 4 if quick else PROBED, seed)
        self.corpus = world.bios.general(QUICK_CORPUS if quick else CORPUS, seed + 1000).tokens
        self.where = torch.arange(self.corpus.shape[1]) > 0  # <begin> is the same in every text
        self.probe = self.fitted(self.train.tokens)

    def fresh(self) -> Probe:
        return Probe(
            self.world.model, SITES[-1].removeprefix("model."), self.world.model.norm.normalized_shape[0], pool=words_mean
        )

    def fitted(self, tokens: Tensor, labels: Tensor | None = None) -> Probe:
        probe = self.fresh()
        fit_head(probe, "head", [tokens], self.train.profession if labels is None else labels)
        return probe

    def original(self) -> Method:
        return lambda tokens: logits(self.probe, tokens)

    def ablated(self, saes: Mapping[str, SparseAutoencoder], off: Off, retrain: bool) -> Method:
        """The probe with features set to 0; ``retrain``: its head fitted anew, as they are 0, on the ambiguous set."""
        probe, off = self.fresh(), {site: list(features) for site, features in off.items()}
        probe.head.load_state_dict(self.probe.head.state_dict())
        work = Shift(probe, saes, self.where)
        if retrain:
            with work.ablated(off):
                fit_head(probe, "head", [self.train.tokens], self.train.profession)

        def method(tokens: Tensor) -> Tensor:
            with work.ablated(off):
                return logits(probe, tokens)

        return method

    # ---- SHIFT --------------------------------------------------------------------------------------------------------

    def saes(self, kind: str) -> tuple[dict[str, SparseAutoencoder], dict[str, dict[str, float]]]:
        """An SAE of each site, and its L0 and FVU on texts held out."""
        out, quality = {}, {}
        for site in SITES:
            x, held = (self.rows(site, tokens) for tokens in self.corpus.tensor_split([len(self.corpus) * 9 // 10]))
            mean, scale = x.mean(0), float((x - x.mean(0)).square().mean().sqrt())
            make, l1 = KINDS[kind]
            sae = make(x.shape[1], FEATURES, seed=self.seed)
            task = _tasks.Task(mean / scale, lambda x=x, scale=scale: _batches(x / scale, self.seed), held, None)
            steps = QUICK_STEPS if self.quick else STEPS
            _tasks.train(sae, task, steps, lr=LR, l1_coefficient=l1, init_l0=INIT_L0)
            scale_(sae, scale)
            with torch.no_grad():
                code = sae.encode_sparse(held)
                error = (held - sae.decode(code)).square().sum() / (held - held.mean(0)).square().sum()
            out[site], quality[site] = sae, {"l0": float(code.l0().double().mean()), "fvu": float(error)}
        return out, quality

    def rows(self, site: str, tokens: Tensor) -> Tensor:
        """[n (T − 1), d]: what comes through a site, of every word but <begin>."""
        return sites.read(self.probe, sites.find(self.probe, site), tokens)[0][:, 1:].flatten(0, 1)

    def candidates(self, saes: Mapping[str, SparseAutoencoder]) -> list[Candidate]:
        tokens = self.train.tokens[: ATTRIBUTED // 6 if self.quick else ATTRIBUTED]
        threshold = (QUICK_THRESHOLD if self.quick else THRESHOLD) * float(margin(logits(self.probe, tokens)).abs().mean())
        return Shift(self.probe, saes, self.where).candidates([tokens], margin, threshold=threshold)

    def judged(
        self, saes: Mapping[str, SparseAutoencoder], found: list[Candidate], texts: Tensor
    ) -> tuple[dict[str, list[int]], dict[tuple[str, int], str | None]]:
        """(features to ablate, the blind rule's mark of each candidate) with contexts from some texts."""
        marks: dict[tuple[str, int], str | None] = {}

        def rule(candidate: Candidate) -> str | None:
            mark = _blind_rule.judge(candidate.contexts)
            marks[candidate.site, candidate.feature] = mark
            return mark

        contexts = {site: self.contexts(site, sae, texts) for site, sae in saes.items()}
        return Shift(self.probe, saes, self.where).judge(found, rule, contexts), marks

    def contexts(self, site: str, sae: SparseAutoencoder, texts: Tensor) -> Callable[[int], list[_blind_rule.Shown]]:
        """feature → the texts on which it fires most, word by word."""
        with torch.no_grad():
            dense = sae.encode(self.rows(site, texts)).unflatten(0, (len(texts), -1))  # [n, T − 1, F]
        peaks, words = dense.amax(1), [self.world.words(text[1:]) for text in texts]

        def shown(feature: int) -> list[_blind_rule.Shown]:
            order = peaks[:, feature].argsort(descending=True, stable=True)[:CONTEXTS]
            order = order[peaks[order, feature] > 0]
            return [_blind_rule.Shown(words[i], dense[i, :, feature].tolist()) for i in order.tolist()]

        return shown

    # ---- Baselines ----------------------------------------------------------------------------------------------------

    def random(self, saes: Mapping[str, SparseAutoencoder], off: Off, draw: int) -> dict[str, list[int]]:
        """As many features of each site, of those that fire on the ambiguous set."""
        random, out = torch.Generator().manual_seed(100 * self.seed + draw), {}
        for site, features in off.items():
            with torch.no_grad():
                alive = (saes[site].encode(self.rows(site, self.train.tokens[:200])) > 0).any(0).nonzero().flatten()
            out[site] = alive[torch.randperm(len(alive), generator=random)[: len(features)]].tolist()
        return out

    def concept_bottleneck(self) -> Method:
        """Concept bottleneck probing: the head sees only how near a text is to words of the two lines of work."""
        words = sorted(_blind_rule.OF_LINE["university"] | _blind_rule.OF_LINE["nursing"])
        index = self.world.bios.index
        concepts = torch.tensor([[0, index[word]] for word in words if word in index])
        bottleneck = Concepts(self.fresh(), concepts, self.train.tokens)
        fit_head(bottleneck, "head", [self.train.tokens], self.train.profession)
        return lambda tokens: logits(bottleneck, tokens)

    def deletion(self, words: frozenset[str]) -> Method:
        """Some words taken out of every text; a probe fitted on such texts."""
        deleted = torch.tensor([word in words for word in self.world.bios.words])

        def without(tokens: Tensor) -> Tensor:
            kept = ~deleted[tokens]
            order = (~kept).long().argsort(dim=1, stable=True)  # what is taken out goes to the end, as <begin>: not pooled
            return torch.where(kept, tokens, 0).gather(1, order)

        probe = self.fitted(without(self.train.tokens))
        return lambda tokens: logits(probe, without(tokens))

    # ---- What may know balanced data ------------------------------------------------------------------------------------

    def oracle(self, split: Texts) -> Method:
        probe = self.fitted(split.tokens, split.profession)
        return lambda tokens: logits(probe, tokens)

    def skyline(self, saes: Mapping[str, SparseAutoencoder], split: Texts, count: int) -> dict[str, list[int]]:
        """The ``count`` features that do most for saying the gender, on a balanced split."""
        return _lowest(self.for_gender(saes, split), count)

    def neuron_skyline(self, split: Texts, count: int) -> Method:
        """The same of neurons of the MLPs: of an SAE that splits each into its two signs, which go together."""
        width = self.world.model.blocks[0].mlp[0].out_features
        saes = {f"{site}.mlp.1": signs(width) for site in SITES[1:]}
        effects = {site: each.unflatten(0, (2, -1)).sum(0) for site, each in self.for_gender(saes, split).items()}
        off = {site: [*chosen, *(i + width for i in chosen)] for site, chosen in _lowest(effects, count).items()}
        return self.ablated(saes, off, retrain=False)

    def for_gender(self, saes: Mapping[str, SparseAutoencoder], split: Texts) -> dict[str, Tensor]:
        """{site: [F]}: the effect of setting each feature to 0 on how far the probe is for the gender."""
        split = Texts(*(part[: ATTRIBUTED // 6 if self.quick else ATTRIBUTED] for part in split))
        sign = 2.0 * split.gender - 1
        work = Shift(self.probe, saes, self.where)
        return work.effects([split.tokens], lambda out, examples: margin(out) * sign[examples])


def _lowest(effects: Mapping[str, Tensor], count: int) -> dict[str, list[int]]:
    order = sorted((float(e), site, i) for site, of in effects.items() for i, e in enumerate(of) if e < 0)[:count]
    return {site: sorted(i for _, s, i in order if s == site) for site in effects}


class Concepts(nn.Module):
    """A head on the cosines of a probe's pooled activation with those of single words, both less their means."""

    def __init__(self, probe: Probe, concepts: Tensor, tokens: Tensor):
        super().__init__()
        self.probe = probe
        at_head = sites.Site("head", probe.head, at_input=True)
        directions, texts = (sites.read(probe, at_head, ids)[0] for ids in (concepts, tokens))
        self.directions = nn.functional.normalize(directions - directions.mean(0), dim=1)
        self.mean, self.at_head = texts.mean(0), at_head
        self.head = nn.Linear(len(concepts), 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = sites.read(self.probe, self.at_head, tokens)[0]
        return self.head(nn.functional.normalize(x - self.mean, dim=1) @ self.directions.T)


def signs(width: int) -> sf.ReluSAE:
    """x ↦ (ReLU x, ReLU −x), and exactly back."""
    sae = sf.ReluSAE(width, 2 * width, seed=0)
    with torch.no_grad():
        both = torch.cat([torch.eye(width), -torch.eye(width)])
        for name, p in sae.named_parameters():
            p.copy_(both) if name.startswith("W_") else p.zero_()
    return sae


def words_mean(x: Tensor, tokens: Tensor) -> Tensor:
    """[n, T, d] → [n, d]: the mean over words, all but <begin>, with which texts are filled up too."""
    real = (tokens != 0).unsqueeze(-1)
    return (x * real).sum(1) / real.sum(1)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in tokens.split(500)])


def _batches(x: Tensor, seed: int) -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(seed)
    while True:
        yield x[torch.randint(len(x), (BATCH,), generator=random)]
