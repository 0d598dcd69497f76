"""Training: Trainer, Steps, schedules, checkpoints."""

from sae_fast.train.checkpoint import load, save
from sae_fast.train.trainer import StepLog, Trainer

__all__ = ["StepLog", "Trainer", "load", "save"]
