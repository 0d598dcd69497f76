"""Memory of tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor


def of_their_own(state: Mapping[str, Tensor], copy: bool) -> dict[str, Tensor]:
    """Contiguous tensors that share memory with no other: copies, or, without ``copy``, those themselves that are so."""
    places = Counter(t.untyped_storage().data_ptr() for t in state.values())

    def own(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        alone = places[storage.data_ptr()] == 1 and storage.nbytes() == t.nbytes and t.is_contiguous()
        return t.detach() if alone and not copy else t.detach().clone(memory_format=torch.contiguous_format)

    return {name: own(t) for name, t in state.items()}
