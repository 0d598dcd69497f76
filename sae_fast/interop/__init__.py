"""Other packages' checkpoints: load, save, convert, push.  Their trainers, to be used in place of theirs, are modules of
their own that import the package: ``dictionary_learning``, ``saelens`` and ``sparsify`` of ``sae_fast.interop``."""

from sae_fast.interop.checkpoints import convert, load, save
from sae_fast.interop.published import published
from sae_fast.interop.push import push_to_hub

__all__ = ["convert", "load", "published", "push_to_hub", "save"]
