"""The report of a step on a GPU, once it has happened."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REPORT = ("reconstruction", "sparsity", "auxiliary", "squared", "fired", "candidates", "dead", "flag")


@dataclass(frozen=True)
class Report:
    """The numbers of a step, in the order of REPORT, of a batch of so many examples."""

    numbers: tuple[float, ...]
    batch: int
    by_ops: bool = False  # it was taken op by op

    def of(self, name: str) -> float:
        return self.numbers[REPORT.index(name)]

    @property
    def losses(self) -> Tensor:
        return torch.tensor(self.numbers[:3], dtype=torch.float32)

    @property
    def squared_error(self) -> float:
        return self.of("squared")

    @property
    def l0(self) -> float:
        return self.of("fired") / self.batch

    @property
    def dead(self) -> int:
        """0 where they are not counted."""
        return int(self.of("dead"))
