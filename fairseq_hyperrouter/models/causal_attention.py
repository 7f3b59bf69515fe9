"""Self-attention that knows its mask is the causal one."""

import math
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from fairseq_hyperrouter.native import causal_attention as native
from fairseq_hyperrouter.native.usable import serves_inference, torch_keeps_to_avx2

from .linear import Linear

KEY_BLOCK = 512
"""What the mask hides torch's kernel for CPUs leaves out in blocks of so many keys."""
SHORTEST = 64
"""Context from which on our C code is faster than torch's AVX2, whatever the heads."""
SMALLEST = 4096
"""Context times width of a head from which on it is faster than torch's AVX-512 too."""
PIECE = 128
"""Queries of one call, where a context is no longer than a block."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, training: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys up to a query's own: (T, B, H, d) -> (T, B, H, d).

    1. On a GPU, and where whole blocks of keys are hidden, torch leaves out what it can.
    2. Of a short context on a CPU it leaves out nothing. There, but in the shortest, the queries go in pieces, each
       with the keys that its last one sees; at T = 512 that takes 0.7 to 0.9 of the time.
    3. At inference, in float32 on a CPU with AVX-512, C code of ours (causal_attention.c) takes 0.5 to 0.9 of that
       again, but for small contexts and heads. Not in training even without gradients: checkpointed activations are
       computed again with them, and must be the same.
    """
    if not training and _serves(q, k, v, dropout):
        return _native(q, k, v)
    T = len(q)
    q, k, v = (one.permute(1, 2, 0, 3) for one in (q, k, v))
    if q.device.type != "cpu" or not 2 * PIECE < T <= KEY_BLOCK:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return y.permute(2, 0, 1, 3)
    pieces = []
    for start in range(0, T, PIECE):
        stop = min(start + PIECE, T)
        hidden = q.new_full((stop - start, stop), -math.inf).triu(start + 1)
        seen = (k[:, :, :stop], v[:, :, :stop])
        pieces.append(F.scaled_dot_product_attention(q[:, :, start:stop], *seen, attn_mask=hidden, dropout_p=dropout))
    return torch.cat(pieces, dim=2).permute(2, 0, 1, 3)


def _serves(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> bool:
    """Whether ``_native`` can compute this, and is faster."""
    T, _, _, d = q.shape
    faster = T >= SHORTEST and (torch_keeps_to_avx2() or T * d >= SMALLEST)
    return native is not None and faster and d <= native.widest and not dropout and serves_inference(q, k, v)


@torch.no_grad()
def _native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (T, B, H, d), threads = q.shape, torch.get_num_threads()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    y, room = torch.empty_like(q), q.new_empty(threads * native.room(T, d))
    native.attention(*(one.data_ptr() for one in (q, k, v, y, room)), T, B * H, d, threads)
    return y


class CausalSelfAttention(MultiheadAttention):
    """The stock self-attention of a decoder, which does not compute what the mask hides.

    Stock hands torch the causal mask as T x T numbers like any other: all pairs of tokens are multiplied, and on a GPU
    flash attention (arXiv 2205.14135), which takes no such mask, is out of reach. Here torch is told that the mask is
    the causal one, which in a decoder every mask is. Padding after a sample's last token is hidden by it as well, so
    that what comes out differs from stock at the padding alone, which nobody reads; on a GPU, which would have to wait
    for where padding is, such batches go the stock way, and so do generation and all else that is not plain.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, Linear.like(getattr(self, name)))

    def forward(
        self, query: Tensor, key: Optional[Tensor], value: Optional[Tensor], **stock: Any
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Arguments (but by name) and result are the stock method's: query (T, B, D) -> (T, B, D), attention weights.

        There are no weights (None) on the way of our own.
        """
        if not self._is_plain(**stock):
            return super().forward(query, key, value, **stock)
        T, B, _ = query.shape

        def heads(projection: nn.Module) -> Tensor:
            """(T, B, H, D / H)"""
            return projection(query).view(T, B, self.num_heads, self.head_dim)

        dropped = self.training or self.dropout_module.apply_during_inference
        dropout = self.dropout_module.p if dropped else 0.0
        y = causal_attention(heads(self.q_proj), heads(self.k_proj), heads(self.v_proj), dropout, self.training)
        return self.out_proj(y.reshape(T, B, self.embed_dim)), None

    def _is_plain(
        self,
        attn_mask: Optional[Tensor] = None,
        need_weights: bool = True,
        need_head_weights: bool = False,
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Any] = None,
        **_: Any,
    ) -> bool:
        others = (need_weights, need_head_weights, self.use_xformers, self.onnx_trace, self.skip_embed_dim_check)
        plain = attn_mask is not None and not any(others) and incremental_state is None
        return plain and (key_padding_mask is None or _only_at_the_end(key_padding_mask))


def _only_at_the_end(padding_mask: Tensor) -> bool:
    """Whether no token comes after padding, (B, T); not asked on a GPU."""
    return padding_mask.device.type == "cpu" and not bool((padding_mask[:, :-1] & ~padding_mask[:, 1:]).any())
