"""The cases: importing this package fills the registry."""

from benchmarks.cases import layers, ops, step
from benchmarks.registry import CASES

__all__ = ["CASES", "layers", "ops", "step"]
