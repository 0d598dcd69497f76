"""The gate: a case has no speed before all of its providers have been found correct.

The rule of the whole project: ‖kernel − truth‖ ≤ 2 · ‖torch − truth‖ + 2⁻²⁴ · max|truth|, where the truth is the
reference in float64 and torch is the same reference in float32.  Nothing is compared with a tolerance picked by hand.
Where one rounding can grow (Adam at β₁ = 0), torch's error is the largest over several orders of the sums.  They are run
only as far as needed, since each can only widen the bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Case, Provider, Start, World
from sae_fast import GatedSAE


def fault(what: str, got: Tensor, torch_own: Tensor, truth: Tensor) -> str | None:
    """What is wrong with ``got``, by the rule, or None."""
    if got.shape != truth.shape:
        return f"{what}: got shape {tuple(got.shape)}, want {tuple(truth.shape)}"
    if truth.numel() == 0:
        return None
    truth = truth.double()
    error = float((got.double() - truth).norm())
    bound = 2 * float((torch_own.double() - truth).norm()) + 2**-24 * float(truth.abs().max())
    return None if error <= bound else f"{what}: is {error:.3g} from the truth, want at most {bound:.3g}"


class Gate:
    """The check of one case: the truth is computed once, then each provider is held against it."""

    def __init__(self, case: Case, world: World):
        self.case, self.world = case, world
        self.inputs = case.inputs(world)
        self.truth = self._outcome(case.reference, double=True)
        self.torch_own = [self._outcome(case.reference)]  # in one order, and in more where they are needed

    def faults(self, provider: Provider) -> list[str]:
        """What is wrong with a provider; nothing, if it may be timed."""
        if provider.floor:
            return []
        got = self._outcome(provider.start)
        if got.keys() != self.truth.keys():
            return [f"got {sorted(got)}, want {sorted(self.truth)}"]
        found = self._compare(got)
        while found and len(self.torch_own) < self.case.orders:
            self.torch_own.append(self._reordered(seed=len(self.torch_own)))
            found = self._compare(got)
        return found

    def _compare(self, got: dict[str, Tensor]) -> list[str]:
        """The faults that remain under every one of torch's own runs."""
        found = []
        for what, truth in self.truth.items():
            faults = [fault(what, got[what], own[what], truth) for own in self.torch_own]
            if all(faults):
                found.append(faults[-1] or "")
        return found

    def _reordered(self, seed: int) -> dict[str, Tensor]:
        """The outcome of the reference with examples and dimensions in another order: other roundings."""
        random = torch.Generator().manual_seed(seed)
        sae = self.world.new_sae()
        order = torch.randperm(sae.d_in, generator=random)
        inputs = [x[torch.randperm(x.shape[0], generator=random)][:, order] for x in self.inputs]
        self._permute(sae, order)
        run = self.case.reference(sae)
        results = [run(x) for x in inputs]
        self._permute(sae, order.argsort())
        return self._read(sae, results)

    @staticmethod
    @torch.no_grad()
    def _permute(sae: GatedSAE, order: Tensor) -> None:
        for p in (sae.W_enc, sae.W_dec, sae.b_dec):
            p.copy_(p[..., order])

    def _outcome(self, start: Start, double: bool = False) -> dict[str, Tensor]:
        sae = self.world.new_sae()
        inputs = self.inputs
        if double:
            sae, inputs = sae.double(), [x.double() for x in inputs]
        run = start(sae)
        return self._read(sae, [run(x) for x in inputs])

    @torch.no_grad()
    def _read(self, sae: GatedSAE, results: list[Any]) -> dict[str, Tensor]:
        return {what: value.detach() for what, value in self.case.outcome(sae, results).items()}


def sift(case: Case, world: World, providers: dict[str, Provider]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(faults, skipped) by provider's name.  An optional provider that raises is skipped; any other is at fault."""
    gate = Gate(case, world)
    faults: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for name, provider in providers.items():
        try:
            found = gate.faults(provider)
        except Exception as error:
            if provider.optional:
                skipped[name] = reason(error)
                continue
            found = [reason(error)]
        if found:
            faults[name] = found
    return faults, skipped


def reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
