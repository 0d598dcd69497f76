"""The cases: importing this package fills the registry."""

from benchmarks.cases import kinds, layers, ops, step
from benchmarks.registry import CASES

__all__ = ["CASES", "kinds", "layers", "ops", "step"]
