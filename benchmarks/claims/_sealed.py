"""The balanced set of the SHIFT analogue, behind a seal: no text of it exists before the final evaluation is declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from benchmarks.claims._biographies import Biographies, Texts
from sae_fast.analysis.shift import Accuracies, accuracies

Method = Callable[[Tensor], Tensor]  # tokens [n, T] → logits [n, 2]


class Sealed:
    """Holds where the balanced set comes from.  In this order: `declare`, once, with every method that must not know it;
    then `skyline_split`, for what is allowed to know such data, other texts than those of the test; then `evaluate`.
    RuntimeError in any other order."""

    def __init__(self, bios: Biographies, n: int, seed: int):
        self._bios, self._n, self._seed = bios, n, seed
        self._declared: dict[str, Method] | None = None

    @property
    def declared(self) -> bool:
        return self._declared is not None

    def declare(self, methods: Mapping[str, Method]) -> None:
        """The methods as they will be evaluated: from here on none is added and none is changed."""
        if self._declared is not None:
            raise RuntimeError("declare: the final evaluation was declared already: no method can be added")
        if not methods:
            raise RuntimeError("declare: got no method to evaluate")
        self._declared = dict(methods)

    def skyline_split(self, n: int) -> Texts:
        """Texts like the balanced set's, for the skylines and the oracle."""
        self._check("the skyline split")
        return self._bios.balanced(n, seed=2 * self._seed + 1)

    def evaluate(self, skylines: Mapping[str, Method]) -> dict[str, Accuracies]:
        """Every declared method, and the skylines, on the balanced set."""
        self._check("the balanced set")
        assert self._declared is not None
        if both := self._declared.keys() & skylines.keys():
            raise RuntimeError(f"evaluate: got {sorted(both)} as skylines, which were declared as methods")
        texts = self._bios.balanced(self._n, seed=2 * self._seed)
        methods = self._declared | dict(skylines)
        return {name: accuracies(m(texts.tokens), texts.profession, texts.gender) for name, m in methods.items()}

    def _check(self, what: str) -> None:
        if self._declared is None:
            raise RuntimeError(f"sealed: {what} is out of reach before the final evaluation is declared")
