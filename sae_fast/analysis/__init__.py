"""Looking into models with SAEs: splicing them in, attribution, edges between SAEs, what features fire on."""

from sae_fast.analysis import attribution
from sae_fast.analysis.edges import Edges, edges
from sae_fast.analysis.fidelity import Fidelity, fidelity
from sae_fast.analysis.splicing import Spliced, ablate, splice

__all__ = ["Edges", "Fidelity", "Spliced", "ablate", "attribution", "edges", "fidelity", "splice"]
