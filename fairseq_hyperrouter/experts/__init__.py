"""How chosen experts compute; knows nothing of routers or fairseq."""

from .bank import ExpertBank
from .shared import SharedExperts

__all__ = ["ExpertBank", "SharedExperts"]
