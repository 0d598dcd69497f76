"""dictionary_learning's trainers on this engine: the same constructors, run by the package's own ``trainSAE``.

    from sae_fast.interop.dictionary_learning import BatchTopKTrainer   # was: from dictionary_learning.trainers import ...

``trainer.ae`` is the package's own dictionary; its parameters are the memory that is trained, so state_dict, scale_biases,
encode and decode are the package's.  Same seed, same weights to start from.  ``loss`` is differentiable with respect to the
dictionary's parameters; for an x that asks for a gradient itself it is the package's own, dense.
"""

from sae_fast.extras import require

require("dictionary_learning", extra="dictionary-learning")

from sae_fast.interop.dictionary_learning.annealed import GatedAnnealTrainer, PAnnealTrainer  # noqa: E402
from sae_fast.interop.dictionary_learning.gated import GatedSAETrainer  # noqa: E402
from sae_fast.interop.dictionary_learning.jumprelu import JumpReluTrainer  # noqa: E402
from sae_fast.interop.dictionary_learning.standard import StandardTrainer, StandardTrainerAprilUpdate  # noqa: E402
from sae_fast.interop.dictionary_learning.topk import BatchTopKTrainer, MatryoshkaBatchTopKTrainer, TopKTrainer  # noqa: E402

__all__ = [
    "BatchTopKTrainer",
    "GatedAnnealTrainer",
    "GatedSAETrainer",
    "JumpReluTrainer",
    "MatryoshkaBatchTopKTrainer",
    "PAnnealTrainer",
    "StandardTrainer",
    "StandardTrainerAprilUpdate",
    "TopKTrainer",
]
