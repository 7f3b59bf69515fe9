"""HyperRouter (Do et al., arXiv 2312.07035): a frozen hypernetwork generates the router.

Dimensions: T tokens, D model, E experts, C router embedding, H hypernetwork hidden.
"""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hyperrouter.errors import UserError

from ..inference import InferenceCache
from ..router import Place, Router, RoutingContext, check_positive, register_router

HYPERNETWORK_INIT_STD = 0.02


class HyperNetwork(nn.Module):
    """H(e) = W2 relu(W1 e + b1) + b2, frozen: (C,) -> (E * (D + 1),).

    All four tensors are buffers, so nothing can train them and every checkpoint holds them.
    Weights are drawn from N(0, 0.02), biases are 0.
    """

    def __init__(self, embedding_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        for name, value in (("embedding dimension", embedding_dim), ("hidden width", hidden_dim)):
            if value < 1:
                raise UserError(f"hypernetwork {name} {value}: must be at least 1")
        self.register_buffer("weight1", torch.empty(hidden_dim, embedding_dim))
        self.register_buffer("bias1", torch.empty(hidden_dim))
        self.register_buffer("weight2", torch.empty(output_dim, hidden_dim))
        self.register_buffer("bias2", torch.empty(output_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        self.weight1.normal_(0.0, HYPERNETWORK_INIT_STD, generator=generator)
        self.weight2.normal_(0.0, HYPERNETWORK_INIT_STD, generator=generator)
        self.bias1.zero_()
        self.bias2.zero_()

    def forward(self, embedding: Tensor) -> Tensor:
        hidden = F.relu(F.linear(embedding, self.weight1.to(embedding.dtype), self.bias1.to(embedding.dtype)))
        return F.linear(hidden, self.weight2.to(embedding.dtype), self.bias2.to(embedding.dtype))

    def extra_repr(self) -> str:
        hidden_dim, embedding_dim = self.weight1.shape
        return f"{embedding_dim} -> {hidden_dim} -> {self.weight2.size(0)}, frozen"


@register_router("hyperrouter")
class HyperRouter(InferenceCache, Router):
    """The router's weights are generated; only the embedding they are generated from is trained.

    1. [W, b] = reshape(H(e), (E, D + 1)), e the trained router embedding (C,), drawn from N(0, 1).
    2. z = x W^T + b.

    Training and evaluation do the same. C trained numbers replace the E (D + 1) of a linear router.
    W starts with a standard deviation of about 0.072 at C = H = 256, 3.6 times that of a linear
    router. ``init_std`` sets another one: the embedding's draw is kept and the output of H is
    multiplied by the constant ``scale``, so that W starts with exactly that standard deviation (around 0).
    With an ``lr_scale`` s the embedding is stored divided by s, so that a step of Adam moves it s times as far.

    Args:
        hypernetwork: one to share with other routers; by default the router makes its own.

    Raises:
        UserError (a ValueError): *hypernetwork* has other sizes than this router, or is so narrow that none of its
            hidden units is active and the router could never learn.
    """

    elastic_lr_scale = 10.0  # docs/elastic.md shows why
    takes = {
        "moe_router_init_std": "init_std",
        "moe_router_lr_scale": "lr_scale",
        "moe_hyper_embed_dim": "embedding_dim",
        "moe_hyper_hidden_dim": "hidden_dim",
        "moe_hyper_shared": "shared",
    }

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        embedding_dim: Optional[int] = None,
        hidden_dim: int = 256,
        hypernetwork: Optional[HyperNetwork] = None,
        init_std: Optional[float] = None,
        lr_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_experts, **options)
        check_positive(init_std=init_std, lr_scale=lr_scale)
        embedding_dim = embed_dim if embedding_dim is None else embedding_dim
        output_dim = num_experts * (embed_dim + 1)
        self._owns_hypernetwork = hypernetwork is None
        if hypernetwork is None:
            hypernetwork = HyperNetwork(embedding_dim, hidden_dim, output_dim)
        wanted, found = (embedding_dim, output_dim), (hypernetwork.weight1.size(1), hypernetwork.weight2.size(0))
        if found != wanted:
            raise UserError(
                f"shared hypernetwork maps {found[0]} -> {found[1]}, this router needs {wanted[0]} -> {wanted[1]}"
            )
        self.init_std = init_std
        self.lr_scale = lr_scale
        self.hypernetwork = hypernetwork
        self.embedding = nn.Parameter(torch.empty(embedding_dim))
        self.register_buffer("scale", torch.ones(()))
        self.reset_parameters()

    @classmethod
    def options(cls, config: Any, place: Place) -> Dict[str, Any]:
        options = super().options(config, place)
        shared = options.pop("shared") and place.lower
        return {**options, "hypernetwork": place.lower[0].hypernetwork if shared else None}

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        self.forget()
        if self._owns_hypernetwork:
            self.hypernetwork.reset_parameters(generator)
        self.embedding.normal_(0.0, 1.0, generator=generator).div_(self.lr_scale)
        self.scale.fill_(1.0)
        weight, _ = self.generate()
        if not weight.any():
            hidden_dim = self.hypernetwork.weight1.size(0)
            raise UserError(f"--moe-hyper-hidden-dim {hidden_dim}: no hidden unit is active, take a wider hypernetwork")
        if self.init_std is not None:
            self.scale.fill_(self.init_std / weight.square().mean().sqrt())

    def generate(self, dtype: torch.dtype = torch.float32) -> Tuple[Tensor, Tensor]:
        """The router's weights: W (E, D) and b (E,)."""
        generated = self.hypernetwork(self.embedding.to(dtype) * self.lr_scale) * self.scale.to(dtype)
        weight, bias = generated.view(self.num_experts, self.embed_dim + 1).split((self.embed_dim, 1), dim=1)
        return weight, bias.squeeze(1)

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        # At one token a step generating the weights would cost more than all experts.
        return F.linear(x, *self.once(x.dtype, lambda: self.generate(x.dtype)))
