"""How chosen experts compute; knows nothing of routers or fairseq.

In the order in which a token meets them:

bank.py      ExpertBank, the stacked weights (weights.py) of a layer's experts
dispatch.py  the chosen (token, expert) pairs in the order of the experts
parallel.py  to the worker that holds the expert, and back; state.py, what a checkpoint holds all the same
backend.py   which of these computes, all behind the same call:
             loop.py     any device and dtype, plain autograd
             runs.py     CPUs; with run_products.py (torch's products) or native_products.py (ours)
             few_rows.py CPUs, few tokens without gradients
             grouped.py  GPUs, and small experts; with grouped_products.py and block_products.py (torch's products)
                         or triton_products.py (ours)
             activation.py, derivatives.py, memory.py for those with a backward pass of their own

C code is in native/. Beside the chosen experts: shared.py, adapter.py, similarity.py.
"""

from .adapter import UnselectedAdapter
from .bank import ExpertBank
from .parallel import ExpertParallel
from .shared import SharedExperts
from .similarity import similarity_penalty

__all__ = ["ExpertBank", "ExpertParallel", "SharedExperts", "UnselectedAdapter", "similarity_penalty"]
