"""The gate: a case has no speed before all of its providers have been found correct.

The rule of the whole project: ‖kernel − truth‖ ≤ 2 · ‖torch − truth‖ + 2⁻²⁴ · max|truth|, where the truth is the
reference in float64 and torch is the same reference in float32.  Nothing is compared with a tolerance picked by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Case, Provider, Start, World


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
        self.torch_own = self._outcome(case.reference)

    def faults(self, provider: Provider) -> list[str]:
        """What is wrong with a provider; nothing, if it may be timed."""
        if provider.floor:
            return []
        got = self._outcome(provider.start)
        if got.keys() != self.truth.keys():
            return [f"got {sorted(got)}, want {sorted(self.truth)}"]
        found = (fault(what, got[what], self.torch_own[what], self.truth[what]) for what in self.truth)
        return [f for f in found if f]

    def _outcome(self, start: Start, double: bool = False) -> dict[str, Tensor]:
        sae = self.world.new_sae()
        inputs = self.inputs
        if double:
            sae, inputs = sae.double(), [x.double() for x in inputs]
        run = start(sae)
        results = [run(x) for x in inputs]
        with torch.no_grad():
            return {k: v.detach() for k, v in self.case.outcome(sae, results).items()}


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
