"""SHIFT: change what a classifier goes by, by judging its features rather than by labelling more data.

Marks et al. 2024 (arXiv 2403.19647), section 4; MATH.md §6: effects of every feature on a probe → those that matter → a
judge says which of them have nothing to do with the task → these are set to 0, the SAE's error kept → the head may be
retrained.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sae_fast.analysis import attribution
from sae_fast.analysis.marks import IRRELEVANT, RELEVANT, Marks
from sae_fast.analysis.splicing import ablate, check_features, check_sae, splice
from sae_fast.analysis.store import FeatureStore
from sae_fast.data import sites
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.identity import fingerprint

Judge = Callable[["Candidate"], "str | None"]
File = str | PathLike[str]


@dataclass(frozen=True)
class Candidate:
    """A feature for the judge.

    site, feature    which it is
    effect           mean over examples of the metric's change when it goes to 0: negative if the feature raises the metric
    contexts         what the judge may look at: as the caller's ``contexts`` gave it; None without any
    """

    site: str
    feature: int
    effect: float
    contexts: Any = None


class Shift:
    """SHIFT on a model, with an SAE at one or several of its sites.

    model    any module, in eval(): what it gives is what the classifier says, such as logits [N, C]
    saes     site → SAE; a site is the name of a module, with ":input" after it for what it is given
    where    positions that go through the SAEs, as in `splice`; the others stay as they are

    >>> work = Shift(model, {"model.blocks.0": early, "model.blocks.1": late})
    >>> found = work.candidates([ids], metric=lambda logits: logits[:, 1] - logits[:, 0], threshold=0.01)
    >>> off = work.judge(found, judge)
    >>> with work.ablated(off):
    ...     fit_head(model, "head", [ids], labels)
    ...     logits = model(ids)

    ValueError for a site that does not exist (it lists the near names), and for what is no SAE.
    """

    def __init__(self, model: nn.Module, saes: Mapping[str, SparseAutoencoder], where: Tensor | None = None):
        if not isinstance(saes, Mapping) or not saes:
            raise ValueError(f"saes: got {saes!r}, want at least one site and its SAE, as {{site: sae}}")
        for site, sae in saes.items():
            sites.find(model, site)
            check_sae(sae)
        self.model, self.saes, self.where = model, dict(saes), where

    def effects(
        self, batches: Iterable[Any], metric: Callable[..., Tensor], steps: int = 10, progress: bool = False
    ) -> dict[str, Tensor]:
        """{site: [F] float64}: mean over examples of the effect on the metric of setting each feature to 0.

        By integrated gradients on the way from the features' activations to 0 (`attribution.patch` with patch=None), one
        site at a time, all else as it is.  batches: inputs of the model, as `patch` takes them; metric(output): [n], a
        number an example, such as a difference of logits.
        """
        sums = {site: torch.zeros(sae.d_sae, dtype=torch.float64) for site, sae in self.saes.items()}
        seen = 0
        for inputs in tqdm(_batches(batches), "effects", disable=not progress):
            for site, sae in self.saes.items():
                found = attribution.patch(self.model, site, sae, inputs, metric=metric, steps=steps, where=self.where)
                if found.clean.dim() != 1:
                    raise ValueError("metric: got one number of all examples, want [n], a number for each")
                sums[site] += found.by_feature().cpu()
            seen += found.n_examples
        return {site: total / seen for site, total in sums.items()}

    def candidates(
        self,
        batches: Iterable[Any],
        metric: Callable[..., Tensor],
        *,
        threshold: float | None = None,
        top: int | None = None,
        steps: int = 10,
        progress: bool = False,
    ) -> list[Candidate]:
        """The features with |effect| > ``threshold``, or the ``top`` of all sites: those that the judge is to look at, the
        strongest first.  One of the two is to be given; the rest as for `effects`."""
        if (threshold is None) == (top is None):
            raise ValueError(f"threshold: got {threshold!r} and top {top!r}, want one of the two")
        if threshold is not None and not (_is_number(threshold) and 0 <= threshold < math.inf):
            raise ValueError(f"threshold: got {threshold!r}, want a number ≥ 0: features with |effect| above it are kept")
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
            raise ValueError(f"top: got {top!r}, want an int ≥ 1, the number of features to keep")
        return strongest(self.effects(batches, metric, steps, progress), threshold, top)

    def judge(
        self,
        candidates: Sequence[Candidate],
        judge: Judge | Marks | File | Mapping[str, Marks | File],
        contexts: Mapping[str, Any] | None = None,
        k: int = 20,
    ) -> dict[str, list[int]]:
        """{site: features to set to 0}: those that a judge finds irrelevant to the task.

        judge      a function of a `Candidate` that gives "irrelevant", "relevant" or None (no opinion), asked about each;
                   or marks: a `Marks`, or the path of a file of them such as the page exports, or with several sites
                   {site: one of these}.  What a reader has marked irrelevant goes, be it among the candidates or not
        contexts   {site: FeatureStore, or a function of the feature}: where a candidate's ``contexts`` come from, ``k`` of
                   them from a store

        ValueError when nothing was judged (no candidate, or no opinion on any of them), for marks or a store of another
        SAE, for marks of features it has not.
        """
        if callable(judge):
            return self._asked(candidates, judge, contexts or {}, k)
        if not isinstance(judge, Mapping):
            if len(self.saes) > 1:
                names = ", ".join(map(repr, self.saes))
                raise ValueError(f"judge: got marks of one SAE, want {{site: marks}}, one for each of the sites {names}")
            judge = {next(iter(self.saes)): judge}
        self._check_sites("judge", judge)
        marks = {site: _marks(given, self.saes[site]) for site, given in judge.items()}
        if not any(each.marks for each in marks.values()):
            raise ValueError("judge: nothing is judged: got marks without a single feature, want at least one")
        return {site: marks[site].irrelevant if site in marks else [] for site in self.saes}

    @contextmanager
    def ablated(self, features: Mapping[str, Iterable[int]]) -> Iterator[None]:
        """In the block these features of each site are 0 when the model runs; the SAEs' errors are kept.  ValueError for a
        site without an SAE, or a feature that it has not."""
        self._check_sites("features", features)
        with ExitStack() as stack:
            for site, chosen in features.items():
                chosen = check_features(chosen, self.saes[site].d_sae)
                if chosen:  # without any, x̂ + ε is x
                    edit = ablate(chosen)
                    stack.enter_context(splice(self.model, site, self.saes[site], "keep", edit=edit, where=self.where))
            yield

    def _asked(
        self, candidates: Sequence[Candidate], judge: Judge, contexts: Mapping[str, Any], k: int
    ) -> dict[str, list[int]]:
        self._check_sites("contexts", contexts)
        for site, source in contexts.items():
            if isinstance(source, FeatureStore) and source.info["sae"] != (want := fingerprint(self.saes[site])):
                got = f"{source.path}, a store of SAE {source.info['sae']}, for site {site!r}"
                raise ValueError(f"contexts: got {got}, want one of the SAE there, {want}")
        off: dict[str, list[int]] = {site: [] for site in self.saes}
        opinions = 0
        for each in candidates:
            self._check_sites("candidates", [each.site])
            if each.site in contexts:
                source = contexts[each.site]
                shown = source.top(each.feature, k) if hasattr(source, "top") else source(each.feature)
                each = replace(each, contexts=shown)
            mark = judge(each)
            if mark not in (IRRELEVANT, RELEVANT, None):
                got = f"{mark!r} for feature {each.feature} of {each.site!r}"
                raise ValueError(f"judge: it says {got}, want {IRRELEVANT!r}, {RELEVANT!r} or None")
            opinions += mark is not None
            if mark == IRRELEVANT:
                off[each.site].append(each.feature)
        if not opinions:
            raise ValueError(f"judge: nothing is judged: got an opinion on none of {len(candidates)} candidates")
        return {site: sorted(chosen) for site, chosen in off.items()}

    def _check_sites(self, name: str, found: Iterable[str]) -> None:
        for site in found:
            if site not in self.saes:
                raise ValueError(f"{name}: got site {site!r}, want one of {', '.join(map(repr, self.saes))}")


def strongest(effects: Mapping[str, Tensor], threshold: float | None = None, top: int | None = None) -> list[Candidate]:
    """Candidates from effects {site: [F]}: with |effect| > ``threshold`` (of any that is not 0, by default), the strongest
    first, and of these the ``top``."""
    found = [
        Candidate(site, feature, float(values[feature]))
        for site, values in effects.items()
        for feature in (values.abs() > (threshold or 0.0)).nonzero().flatten().tolist()
    ]
    return sorted(found, key=lambda each: -abs(each.effect))[:top]


class Probe(nn.Module):
    """A linear probe as a module: runs ``model`` up to ``site``, pools positions, and applies ``head``, an nn.Linear.

    site    as in `splice`; what comes through is [N, T, d] (or [N, d])
    pool    [N, T, d] and the model's inputs → [N, d]: by default the mean over positions; with padding, that of the others

    Sites for SAEs are those of the model with "model." before them.  The model's own weights get no gradient.
    """

    def __init__(self, model: nn.Module, site: str, d: int, classes: int = 2, pool: Callable[..., Tensor] | None = None):
        super().__init__()
        sites.find(model, site)
        self.model, self.site, self.pool = model, site, pool
        self.head = nn.Linear(d, classes)
        model.requires_grad_(False).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = kwargs or args
        x = sites.run_until(self.model, sites.find(self.model, self.site), inputs)
        if self.pool is not None:
            x = self.pool(x, *args, **kwargs)
        elif x.dim() == 3:
            x = x.mean(1)
        return self.head(x)


def fit_head(
    model: nn.Module, head: str | nn.Linear, batches: Iterable[Any], labels: Tensor, weight_decay: float = 1e-4
) -> nn.Linear:
    """Fits a linear head of a model to labels [n] int64, everything before it as it is; inside `Shift.ablated` that is the
    last step of SHIFT.  Returns the head.

    Logistic regression by L-BFGS, cross-entropy + weight_decay ‖W‖²/2, on the head's inputs in units of their spread, from
    zero: the answer depends on the data alone.  ValueError for labels of one class, for labels that the head has not, for a
    head without a bias, or one that is not given one finite row [d] an example; FloatingPointError when the fit is not
    finite.  After an error the head is as it was.
    """
    place = sites.find(model, head)
    linear = place.module
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"head: got a {type(linear).__name__}, want an nn.Linear")
    if linear.bias is None:
        raise ValueError("head: got an nn.Linear without bias, want one with a bias")
    entry = sites.Site(place.name, linear, at_input=True)
    x = torch.cat([sites.read(model, entry, inputs)[0] for inputs in _batches(batches)])
    check_labels(labels, linear.out_features)
    if x.shape != (len(labels), linear.in_features):
        want = f"{(len(labels), linear.in_features)}, a row for each of the labels"
        raise ValueError(f"head: it is given {tuple(x.shape)}, want {want}")
    if len(bad := (~x.isfinite().all(1)).nonzero()):
        row = int(bad[0])
        raise ValueError(
            f"head: it is given NaN or infinity in {len(bad)} rows, the first is row {row}, want finite numbers"
        )
    if not (_is_number(weight_decay) and 0 <= weight_decay < math.inf):
        raise ValueError(f"weight_decay: got {weight_decay!r}, want a number ≥ 0")
    # In units of the inputs' own spread L-BFGS is done in a few dozen steps; weights are brought back to the head's.
    mean, scale = x.double().mean(0), x.double().std().clamp(min=1e-12)
    x, labels = (x.double() - mean) / scale, labels.to(x.device)
    W = torch.zeros(linear.out_features, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    b = torch.zeros(linear.out_features, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([W, b], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ W.T + b, labels) + weight_decay * W.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    with torch.no_grad():
        weight, bias = (W / scale).to(linear.weight), (b - W @ (mean / scale)).to(linear.bias)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise FloatingPointError(f"head: the fit is not finite in {weight.dtype}; the head is left as it was")
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear


@dataclass(frozen=True)
class Accuracies:
    """The fractions of predictions that are the task's label, the spurious attribute, and the label in the
    group (label, attribute) that fares worst."""

    task: float
    spurious: float
    worst_group: float


def accuracies(logits: Tensor, labels: Tensor, attribute: Tensor) -> Accuracies:
    """logits [n, C]; labels, attribute [n] int64.  Class c is taken to be what value c of the attribute suggests."""
    for name, value in (("labels", labels), ("attribute", attribute)):
        if value.shape != logits.shape[:1] or value.is_floating_point():
            raise ValueError(f"{name}: got {value.dtype} {tuple(value.shape)}, want integers [{len(logits)}]")
    if not len(logits):
        raise ValueError("logits: got no example, want at least one")
    predicted = logits.argmax(1)
    right = (predicted == labels).double()
    _, group = torch.unique(torch.stack([labels, attribute], 1), dim=0, return_inverse=True)
    by_group = [float(right[group == each].mean()) for each in group.unique()]
    return Accuracies(float(right.mean()), float((predicted == attribute).double().mean()), min(by_group))


def check_labels(labels: Tensor, classes: int) -> None:
    """ValueError unless labels are [n] int64 of at least two of the classes."""
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: got {got}, want integers [n], a class for each example")
    found = labels.unique().tolist()
    if len(found) < 2:
        raise ValueError(
            f"labels: got only class {found}, want examples of at least two: a probe on one class learns nothing"
        )
    if found[0] < 0 or found[-1] >= classes:
        raise ValueError(f"labels: got classes {found[0]} to {found[-1]}, want 0 to {classes - 1}, those of the head")


def _marks(given: Any, sae: SparseAutoencoder) -> Marks:
    return given.check(sae, "judge") if isinstance(given, Marks) else Marks.read(given, sae)


def _batches(batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ValueError(f"batches: got a {type(batches).__name__}, want a list of inputs of the model")
    found = list(batches)
    if not found:
        raise ValueError("batches: got none, want at least one")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
