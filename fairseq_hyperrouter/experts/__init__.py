"""How chosen experts compute; knows nothing of routers or fairseq."""

from .adapter import UnselectedAdapter
from .bank import ExpertBank
from .parallel import ExpertParallel
from .shared import SharedExperts
from .similarity import similarity_penalty

__all__ = ["ExpertBank", "ExpertParallel", "SharedExperts", "UnselectedAdapter", "similarity_penalty"]
