"""Experts that every token goes to (DeepSeekMoE, arXiv 2401.06066)."""

from typing import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class SharedExperts(nn.Module):
    """The ungated sum of ``num_experts`` feed-forwards of width F: one feed-forward of width ``num_experts`` F."""

    def __init__(
        self,
        num_experts: int,
        embed_dim: int,
        ffn_embed_dim: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.relu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(embed_dim, num_experts * ffn_embed_dim)
        self.fc2 = nn.Linear(num_experts * ffn_embed_dim, embed_dim)

    def reset_parameters(self) -> None:
        """Draw the weights anew, from the global generator."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.fc2(self.dropout(self.activation(self.fc1(x))))
