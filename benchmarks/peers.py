"""Mixture-of-Experts layers of other libraries, and simple ways to write one, behind one interface.

Each builder takes width D, hidden width F, experts E, experts per token K and returns a module that maps (T, D) to
(T, D), router included, that does the same work per token: K feed-forwards D -> F -> D. An ImportError says that the
library is not there; None that it has no such K.
"""

import logging
import warnings
from functools import cache, partial
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hyperrouter import LinearRouter, MoELayer
from fairseq_hyperrouter.experts import ExpertBank
from fairseq_hyperrouter.native.usable import has_native

Builder = Callable[[int, int, int, int], Optional[nn.Module]]


class Ours(nn.Module):
    """Our layer with the router of the peers."""

    def __init__(self, D: int, hidden: int, E: int, K: int, **options: Any) -> None:
        super().__init__()
        self.layer = MoELayer(LinearRouter(D, E), hidden, top_k=K, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Dense(nn.Sequential):
    """One feed-forward with the FLOPs of K experts: the limit."""

    def __init__(self, D: int, hidden: int, E: int, K: int) -> None:
        super().__init__(nn.Linear(D, K * hidden), nn.ReLU(), nn.Linear(K * hidden, D))


class DenseNative(nn.Module):
    """The same with the products of our backend, as one expert that takes all: no peer, but what ours starts from."""

    def __init__(self, D: int, hidden: int, E: int, K: int) -> None:
        super().__init__()
        self.expert = ExpertBank(1, D, K * hidden, backend="native")

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(x, torch.zeros(len(x), 1, dtype=torch.long), torch.ones(len(x), 1))


class _Routed(nn.Module):
    def __init__(self, D: int, hidden: int, E: int, K: int, biases: bool = False) -> None:
        super().__init__()
        self.E, self.K = E, K
        self.bias1 = nn.Parameter(torch.zeros(E, hidden)) if biases else None
        self.bias2 = nn.Parameter(torch.zeros(E, D)) if biases else None
        self.gate = nn.Linear(D, E)
        self.weight1 = nn.Parameter(torch.randn(E, D, hidden) * D**-0.5)
        self.weight2 = nn.Parameter(torch.randn(E, hidden, D) * hidden**-0.5)

    def route(self, x: Tensor) -> Any:
        logits, index = self.gate(x).topk(self.K)
        return logits.softmax(-1), index


class RawGroupedMM(_Routed):
    """Sorted tokens, two ``grouped_mm``, ``index_add``: what the documentation of torch suggests."""

    def forward(self, x: Tensor) -> Tensor:
        gate, index = self.route(x)
        expert, order = index.flatten().sort(stable=True)
        token = order // self.K
        offs = torch.searchsorted(expert, torch.arange(self.E, device=x.device), right=True).int()
        hidden = F.grouped_mm(x[token], self.weight1, offs=offs)
        hidden = F.relu(hidden if self.bias1 is None else hidden + self.bias1[expert])
        output = F.grouped_mm(hidden, self.weight2, offs=offs)
        output = output if self.bias2 is None else output + self.bias2[expert]
        return torch.zeros_like(x).index_add(0, token, output * gate.flatten()[order, None])


class PaddedBMM(_Routed):
    """Every expert's tokens padded to the fullest expert's, two batched products."""

    def forward(self, x: Tensor) -> Tensor:
        gate, index = self.route(x)
        expert, order = index.flatten().sort(stable=True)
        token = order // self.K
        counts = torch.bincount(expert, minlength=self.E)
        place = torch.arange(len(order), device=x.device) - (counts.cumsum(0) - counts)[expert]
        longest = int(counts.max())
        rows = x.new_zeros(self.E, longest, x.size(1)).index_put((expert, place), x[token])
        output = torch.bmm(F.relu(torch.bmm(rows, self.weight1)), self.weight2)[expert, place]
        return torch.zeros_like(x).index_add(0, token, output * gate.flatten()[order, None])


class ModuleListLoop(_Routed):
    """A loop over a list of experts, each on its own tokens: what most papers' code does."""

    def __init__(self, D: int, hidden: int, E: int, K: int) -> None:
        super().__init__(D, hidden, E, K)
        del self.weight1, self.weight2
        self.experts = nn.ModuleList(Dense(D, hidden, E, 1) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        gate, index = self.route(x)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(index == number)
            y = y.index_add(0, token, expert(x[token]) * gate[token, place, None])
        return y


def hugging_face(implementation: str) -> Builder:
    """Mixtral's block. Its experts have three products, so two thirds of F make the same FLOPs."""

    def build(D: int, hidden: int, E: int, K: int) -> nn.Module:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=D,
            intermediate_size=round(2 * hidden / 3 / 4) * 4,
            num_local_experts=E,
            num_experts_per_tok=K,
            experts_implementation=implementation,
        )
        block = MixtralSparseMoeBlock(config)
        for parameter in block.parameters():  # some are left as they were in memory
            nn.init.normal_(parameter, std=0.02)
        return _Batch(block)

    return build


def st_moe(D: int, hidden: int, E: int, K: int) -> Optional[nn.Module]:
    """ST-MoE (lucidrains); two experts or more."""
    if K not in (2, 4):
        return None  # it routes to two or more; its dispatch is a (T, E, capacity) product, minutes at k = 8
    from st_moe_pytorch import MoE

    # Its experts are gated (GEGLU): three products again. Tokens over the capacity are dropped.
    mult = 2 * hidden / 3 / D
    capacity = {"capacity_factor_train": 1.25 * K, "capacity_factor_eval": 1.25 * K}
    moe = MoE(dim=D, num_experts=E, gating_top_n=K, expert_hidden_mult=mult, threshold_train=0.0, **capacity)
    return _Batch(moe)


def mixture_of_experts(D: int, hidden: int, E: int, K: int) -> Optional[nn.Module]:
    """GShard's two experts per token (lucidrains)."""
    if K != 2:
        return None  # it routes to two
    from mixture_of_experts import MoE

    policies = {"second_policy_train": "all", "second_policy_eval": "all"}
    return _Batch(MoE(dim=D, num_experts=E, hidden_dim=hidden, capacity_factor_train=2.5, **policies))


def fairscale(D: int, hidden: int, E: int, K: int) -> Optional[nn.Module]:
    """GShard's two experts per token, with a fixed capacity."""
    if K != 2:
        return None  # it routes to two
    import torch.distributed as dist
    from fairscale.nn import MOELayer, Top2Gate

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return _Batch(MOELayer(Top2Gate(D, E), nn.ModuleList(Dense(D, hidden, E, 1) for _ in range(E))), batch_dim=1)


def tutel(D: int, hidden: int, E: int, K: int) -> nn.Module:
    """Microsoft's; capacity factor 0 is as much as is needed."""
    from tutel import moe

    return _Batch(
        moe.moe_layer(
            gate_type={"type": "top", "k": K, "capacity_factor": 0},
            model_dim=D,
            experts={"type": "ffn", "count_per_node": E, "hidden_size_per_expert": hidden},
        )
    )


class _Batch(nn.Module):
    """A layer that wants batches, (B, T, D) or (T, B, D), and may return more than its output."""

    def __init__(self, layer: nn.Module, batch_dim: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.batch_dim = batch_dim

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.unsqueeze(self.batch_dim))
        return (y if isinstance(y, Tensor) else y[0]).view_as(x)


DENSE = "dense, same FLOPs"
OURS = "fairseq_hyperrouter"
RAW = "raw grouped_mm, no biases"
PEERS: Dict[str, Builder] = {
    RAW: RawGroupedMM,
    "raw grouped_mm": partial(RawGroupedMM, biases=True),
    "padded bmm": PaddedBMM,
    "loop over a ModuleList": ModuleListLoop,
    "Hugging Face, eager": hugging_face("eager"),
    "Hugging Face, grouped_mm": hugging_face("grouped_mm"),
    "st-moe-pytorch, capacity 1.25 k": st_moe,
    "mixture-of-experts, capacity 2.5": mixture_of_experts,
    "fairscale, drops tokens": fairscale,
    "Tutel, dropless": tutel,
}


def build_all(D: int, hidden: int, E: int, K: int) -> Dict[str, nn.Module]:
    """Dense, ours, and every peer that is installed and can have this K."""
    layers: Dict[str, nn.Module] = {DENSE: Dense(D, hidden, E, K), OURS: Ours(D, hidden, E, K)}
    layers[f"{OURS}, torch's products"] = Ours(D, hidden, E, K, backend="runs")
    if has_native():
        layers["dense, our products"] = DenseNative(D, hidden, E, K)
    for name, builder in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer = builder(D, hidden, E, K)
        except (ImportError, OSError) as error:  # OSError: something it loads was built for another torch
            _note(f"{name}: left out, cannot be imported ({error}); pip install -r benchmarks/requirements.txt")
            continue
        if layer is not None:
            layers[name] = layer
    return layers


@cache
def _note(text: str) -> None:
    """Once."""
    logging.getLogger(__name__).warning(text)
