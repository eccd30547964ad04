"""GuiLoMo's search: selection vectors learned by bilevel optimisation decide expert counts and ranks."""

from guilomo.search.carry import carry_weights
from guilomo.search.config import SearchConfig
from guilomo.search.data import SearchData
from guilomo.search.distributed import process_group
from guilomo.search.hypergradient import HYPERGRADIENTS
from guilomo.search.loop import Search, search
from guilomo.search.mixture import search_sized
from guilomo.search.result import SearchResult
from guilomo.search.vectors import SelectionVectors

__all__ = [
    "HYPERGRADIENTS",
    "Search",
    "SearchConfig",
    "SearchData",
    "SearchResult",
    "SelectionVectors",
    "carry_weights",
    "process_group",
    "search",
    "search_sized",
]
