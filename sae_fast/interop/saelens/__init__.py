"""SAELens' training classes on the engine: same names, same arguments, same answers, in SAELens' own trainer and runner.

    from sae_fast.interop.saelens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

in the place of `from sae_lens import ...`; the rest of a training script stays.  The architectures are "sae_fast_" and
SAELens' name in a training checkpoint; `save_inference_model` writes what SAELens' classes write, which SAELens loads
without this package.

One training step is one sparse pass, forward and gradients together, in fp32 also under autocast.  SAELens' own dense pass
is taken where the engine cannot stand in for it (``why_dense()`` says why): while a hook sits on one of the SAE's hook
points, with a warning; for other dtypes, layer norm, lp_norm ≠ 1, the losses that its class names, and subclasses with
formulas of their own, with a log line.
"""

from sae_fast.extras import require

require("sae_lens", extra="saelens")

from sae_fast.interop.saelens.jumprelu import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig  # noqa: E402
from sae_fast.interop.saelens.penalised import (  # noqa: E402
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_fast.interop.saelens.topk import (  # noqa: E402
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

__all__ = [
    "BatchTopKTrainingSAE",
    "BatchTopKTrainingSAEConfig",
    "GatedTrainingSAE",
    "GatedTrainingSAEConfig",
    "JumpReLUTrainingSAE",
    "JumpReLUTrainingSAEConfig",
    "MatryoshkaBatchTopKTrainingSAE",
    "MatryoshkaBatchTopKTrainingSAEConfig",
    "StandardTrainingSAE",
    "StandardTrainingSAEConfig",
    "TopKTrainingSAE",
    "TopKTrainingSAEConfig",
]
