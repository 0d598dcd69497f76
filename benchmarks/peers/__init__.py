"""The peers' own packages, as providers: importing this package adds them to the registry.

They live in an environment of their own, which `make bench-peers` builds: they are heavy, and nnsight, which
dictionary_learning imports, patches torch for the whole process (`torch.compile` is never measured beside it).
"""

from benchmarks.peers import dictionary_learning, kinds, sae_lens, sparsify

PACKAGES = {"dictionary_learning": "dictionary-learning", "sae_lens": "sae-lens", "sparsify": "eai-sparsify"}

__all__ = ["PACKAGES", "dictionary_learning", "kinds", "sae_lens", "sparsify"]
