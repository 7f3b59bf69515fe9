"""How chosen experts compute; knows nothing of routers or fairseq."""

from .bank import ExpertBank
from .parallel import ExpertParallel
from .shared import SharedExperts

__all__ = ["ExpertBank", "ExpertParallel", "SharedExperts"]
