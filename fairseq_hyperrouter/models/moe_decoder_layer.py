"""The layers of our decoder: the stock one with causal attention, and the same with a MoE layer as feed-forward."""

from typing import Any, Optional, Tuple

from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from fairseq_hyperrouter.moe_layer import MoELayer
from fairseq_hyperrouter.routing import Limit, Routing

from .causal_attention import CausalSelfAttention


def _identity(x: Tensor) -> Tensor:
    return x


class DecoderLayer(TransformerDecoderLayerBase):
    """The stock layer of a decoder, which does not compute attention that the mask hides."""

    def build_self_attention(self, embed_dim: int, cfg: TransformerConfig, **_: Any) -> nn.Module:
        return CausalSelfAttention(
            embed_dim,
            cfg.decoder.attention_heads,
            dropout=cfg.attention_dropout,
            self_attention=True,
            xformers_att_config=cfg.decoder.xformers_att_config,
        )


class MoEDecoderLayer(DecoderLayer):
    """Attention, residuals and norms are the stock layer's; it returns the Routing beside the stock result.

    The stock forward ends in fc2(dropout(activation(fc1(x)))). Here fc1, activation and dropout do nothing
    and ``fc2`` is a method that calls the MoE layer, so nothing of the stock forward is written again.
    """

    def __init__(self, cfg: TransformerConfig, moe: MoELayer, moe_index: int, no_encoder_attn: bool = False) -> None:
        super().__init__(cfg, no_encoder_attn)
        del self.fc2  # the stock constructor's placeholder hides the method of this name
        self.activation_fn = _identity
        self.activation_dropout_module = nn.Identity()
        self.moe = moe
        self.moe_index = moe_index
        self._routing: Optional[Routing] = None

    def build_fc1(self, *_: Any) -> nn.Module:
        return nn.Identity()

    def build_fc2(self, *_: Any) -> nn.Module:
        return nn.Identity()

    def fc2(self, x: Tensor) -> Tensor:
        y, self._routing = self.moe(x, **self._call)
        return y

    def forward(
        self,
        x: Tensor,
        *args: Any,
        top_k: int,
        token_ids: Tensor,
        router_state: Optional[Tensor] = None,
        update: int = 0,
        limit: Optional[Limit] = None,
        self_attn_padding_mask: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tuple[Any, ...]:
        """x (T, B, D) -> (x, attention, attention state, *fields of the Routing of the T B tokens in x's order).

        The Routing comes as a flat tuple because fairseq's activation checkpointing passes gradients through
        tensors returned at the top level only.

        Args:
            top_k: experts per token for this call.
            token_ids: (B, T) int64.
            router_state: (T B, S), what the router of the MoE layer below handed on.
            update: how many updates the training has made.
            limit: which of their K experts tokens keep, in x's order.
            self_attn_padding_mask: (B, T) bool, True at padding.
        """
        padding_mask = None if self_attn_padding_mask is None else self_attn_padding_mask.t()
        self._call = {
            "top_k": top_k,
            "padding_mask": padding_mask,
            "token_ids": token_ids.t(),
            "router_state": router_state,
            "update": update,
            "limit": limit,
        }
        try:
            stock = super().forward(x, *args, self_attn_padding_mask=self_attn_padding_mask, **kwargs)
            routing: Routing = self._routing
        finally:  # what fc2 needs and finds lives as long as this call, never longer
            del self._call
            self._routing = None
        return (*stock, *routing)
