"""HyperMoE (Zhao et al., arXiv 2402.12656): what the experts that were not chosen know, as a small adapter.

Dimensions: T tokens, D model, E experts, H adapter, C expert embedding.
"""

import torch
from torch import Tensor, nn

EMBEDDING_DIM = 16


class UnselectedAdapter(nn.Module):
    """A hypernetwork makes an adapter for every token from the embeddings of the experts it did not choose.

    1. s = mean of the embeddings (C,) of the experts that were not chosen, plus one of the layer.
    2. [A, B] = sum_c s_c [A_c, B_c], A_c (D, H), B_c (H, D): a linear hypernetwork.
    3. y = relu(x A) B, added to the layer's output.

    A_c starts as ``nn.Linear`` does, B_c at 0: at the start the adapter adds nothing. The weights of an adapter are
    never built: x A = sum_c s_c (x A_c).
    """

    def __init__(self, embed_dim: int, num_experts: int, adapter_dim: int) -> None:
        super().__init__()
        self.expert_embedding = nn.Parameter(torch.empty(num_experts, EMBEDDING_DIM))
        self.layer_embedding = nn.Parameter(torch.empty(EMBEDDING_DIM))
        self.down = nn.Parameter(torch.empty(EMBEDDING_DIM, embed_dim, adapter_dim))
        self.up = nn.Parameter(torch.empty(EMBEDDING_DIM, adapter_dim, embed_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, from the global generator."""
        bound = self.down.size(1) ** -0.5
        self.expert_embedding.normal_()
        self.layer_embedding.normal_()
        self.down.uniform_(-bound, bound)
        self.up.zero_()

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x (T, D) and which experts each token has, (T, E) bool -> (T, D)."""
        rest = (~chosen).to(x.dtype)
        s = rest @ self.expert_embedding.to(x.dtype) / rest.sum(1, keepdim=True).clamp(min=1)
        s = s + self.layer_embedding.to(x.dtype)
        hidden = torch.einsum("tc,tch->th", s, torch.einsum("td,cdh->tch", x, self.down.to(x.dtype))).relu()
        outer = (s[:, :, None] * hidden[:, None]).flatten(1)  # (T, C H), smaller than every adapter's output
        return outer @ self.up.to(x.dtype).flatten(0, 1)
