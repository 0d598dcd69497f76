"""The cases: importing this package fills the registry."""

from benchmarks.cases import ops, step
from benchmarks.registry import CASES

__all__ = ["CASES", "ops", "step"]
