"""Which of the tokens kept a query reads: one index a file, and how rungs are read through them."""

from kvcomp_jax.retrieval.base import Index, Selection
from kvcomp_jax.retrieval.bounds import Bounds
from kvcomp_jax.retrieval.centroids import Centroids
from kvcomp_jax.retrieval.lookup import Lookup, LookupState

__all__ = ["Bounds", "Centroids", "Index", "Lookup", "LookupState", "Selection"]
