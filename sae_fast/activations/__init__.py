"""The activations: pointwise functions of u on the entries of a code, one file each.

Each is written three times, and its number says which is which: here in PyTorch, for the reference, for gradients and for
analysis; in csrc/include/sae_fast/activation.hpp for C++ and CUDA; in kernels/_activation.py for Triton.
"""

from sae_fast.activations.activation import Activation, Vectors
from sae_fast.activations.gated import Gated
from sae_fast.activations.jumprelu import JumpReLU
from sae_fast.activations.relu import ReLU

BY_NAME: dict[str, Activation] = {a.name: a for a in (Gated(), ReLU(), JumpReLU())}
NAMES = tuple(BY_NAME)


def named(name: str) -> Activation:
    """The activation of a name; ``ValueError`` for an unknown one."""
    if name not in BY_NAME:
        raise ValueError(f"activation: got {name!r}, want one of {NAMES}")
    return BY_NAME[name]


__all__ = ["BY_NAME", "NAMES", "Activation", "Vectors", "named"]
