"""Looking into models with SAEs: splicing them in, attribution, edges between SAEs, what features fire on."""

from sae_fast.analysis import attribution, perturbation, shift
from sae_fast.analysis.attribution.edges import Edges, edges
from sae_fast.analysis.fidelity import Fidelity, fidelity
from sae_fast.analysis.marks import Marks
from sae_fast.analysis.passes import Passes, count_passes
from sae_fast.analysis.splicing import Spliced, ablate, splice
from sae_fast.analysis.store import FeatureStore, write_store
from sae_fast.data import sites

__all__ = [
    "Edges",
    "FeatureStore",
    "Fidelity",
    "Marks",
    "Passes",
    "Spliced",
    "ablate",
    "attribution",
    "count_passes",
    "edges",
    "fidelity",
    "perturbation",
    "shift",
    "sites",
    "splice",
    "write_store",
]
