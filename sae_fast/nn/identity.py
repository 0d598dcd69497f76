"""An SAE's identity: a name for its weights, by which a store or a file of marks is told from another SAE's."""

from __future__ import annotations

import hashlib
import json

import torch

from sae_fast.nn import SparseAutoencoder


def fingerprint(sae: SparseAutoencoder) -> str:
    """16 hex digits of the SHA-256 over the class's name, every tensor of the state (name, dtype, shape and bytes), and
    ``normalize`` and ``largest`` where they are not the defaults.

    Depends on nothing else: not on k, the device, on whether it is frozen or in training, or on a file's name.
    """
    digest = hashlib.sha256(type(sae).__name__.encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    said = {name: value for name, value in sae.options().items() if name in ("normalize", "largest")}
    if said:
        digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()[:16]
