"""A stock decoder in which some layers are MoE layers."""

import logging
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer.transformer_decoder import TransformerDecoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from fairseq_hyperrouter.config import MoEConfig, TopK, format_ints, parse_top_k, top_k_per_layer
from fairseq_hyperrouter.experts import ExpertParallel
from fairseq_hyperrouter.moe_layer import MoELayer
from fairseq_hyperrouter.routing import ROUTERS, Limit, Place, Routing

from .linear import Linear
from .moe_decoder_layer import DecoderLayer, MoEDecoderLayer

logger = logging.getLogger(__name__)


class MoEDecoder(TransformerDecoderBase):
    """The stock decoder with MoE layers, which says how many experts are active and returns the Routings.

    In training k follows the schedule of *moe* at the number of updates that the trainer announces; in
    evaluation it is ``eval_top_k``, and ``eval_limit`` may leave a token fewer. ``extra["routing"]`` holds one
    Routing per MoE layer, in the order of the layers; None for a layer that LayerDrop left out. With
    *parallel* the experts are divided over workers.

    Raises:
        UserError (a ValueError): an option of *moe* that does not fit, by name, value and what is allowed. What does
            not fit the rest of a decoder is refused where the model is built (``checks/moe_options.py``).
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        moe: MoEConfig,
        dictionary: Any,
        embed_tokens: nn.Module,
        parallel: Optional[ExpertParallel] = None,
    ) -> None:
        moe.check(cfg.decoder.layers)
        # nn.Module's constructor has not run yet: plain attributes only.
        self.moe_config = moe
        self.parallel = parallel
        self.dictionary = dictionary
        self.moe_numbers = sorted(moe.layer_numbers(cfg.decoder.layers))
        self._built: List[Optional[MoELayer]] = []  # one entry per layer that build_decoder_layer was asked for
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn=True)
        del self._built
        self.schedule = moe.schedule
        self.eval_top_k = moe.eval_top_k(len(self.moe_numbers))
        self.eval_limit = Limit(moe.moe_eval_threshold, moe.moe_eval_top_p)
        self.num_updates = 0
        self._at_largest = False
        if self.moe_numbers:
            same = len(set(self.eval_top_k)) == 1
            at_inference = format_ints(self.eval_top_k[0] if same else self.eval_top_k)
            logger.info(
                f"experts per token: in training {self.schedule}, at inference {at_inference} of {moe.moe_expert_count}"
            )

    def build_decoder_layer(self, cfg: TransformerConfig, no_encoder_attn: bool = False) -> nn.Module:
        layer = self._build_layer(cfg, no_encoder_attn)
        if cfg.checkpoint_activations:
            layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
        return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)

    def _build_layer(self, cfg: TransformerConfig, no_encoder_attn: bool) -> nn.Module:
        number = len(self._built)
        if number not in self.moe_numbers:
            self._built.append(None)
            return DecoderLayer(cfg, no_encoder_attn)
        index = self.moe_numbers.index(number)
        place = Place(
            cfg.decoder.embed_dim,
            index=index,
            count=len(self.moe_numbers),
            lower=[layer.router for layer in self._built if layer is not None],
            vocabulary=len(self.dictionary),
        )
        moe = build_moe_layer(self.moe_config, cfg, number, place, self.parallel)
        self._built.append(moe)
        return MoEDecoderLayer(cfg, moe, index, no_encoder_attn)

    def build_output_projection(self, *args: Any) -> None:
        super().build_output_projection(*args)
        if self.output_projection is not None:  # not with an adaptive softmax
            self.output_projection = Linear.like(self.output_projection)

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq's trainer before every update."""
        self.num_updates = num_updates

    def check_top_k(self, option: str, values: Iterable[Any]) -> None:
        """Raise a UserError that names *option* when one of *values* cannot be the experts per token."""
        for value in values:
            parse_top_k(option, value, self.moe_config.moe_expert_count)

    @contextmanager
    def at_top_k(
        self, top_k: TopK, *, threshold: Optional[float] = None, top_p: Optional[float] = None
    ) -> Iterator[None]:
        """Evaluate with *top_k* experts per token, or as many in each MoE layer, inside the ``with`` block.

        The model's own threshold and top-p do not hold inside; those given here do.

        Raises:
            UserError (a ValueError): there are not so many experts, or layers; a share that is none.
        """
        experts, layers = self.moe_config.moe_expert_count, len(self.moe_numbers)
        inside = top_k_per_layer("top_k", top_k, experts, layers), Limit(threshold, top_p)
        self.moe_config.check_limit(threshold, top_p, prefix="")
        before = self.eval_top_k, self.eval_limit
        self.eval_top_k, self.eval_limit = inside
        try:
            yield
        finally:
            self.eval_top_k, self.eval_limit = before

    @contextmanager
    def at_largest_top_k(self) -> Iterator[None]:
        """Train with the largest k of the schedule inside the ``with`` block."""
        self._at_largest = True
        try:
            yield
        finally:
            self._at_largest = False

    def active_top_k(self, moe_index: int) -> int:
        """Experts per token now, in the *moe_index*-th MoE layer."""
        if self.training and self._at_largest:
            return self.schedule.largest
        return self.schedule(self.num_updates, moe_index) if self.training else self.eval_top_k[moe_index]

    def extract_features_scriptable(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Optional[Dict[str, List[Tensor]]] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        full_context_alignment: bool = False,
        alignment_layer: Optional[int] = None,
        alignment_heads: Optional[int] = None,
    ) -> Tuple[Tensor, Dict[str, List[Any]]]:
        """The stock method with a layer loop that keeps what MoE layers return; same arguments and result.

        A language model has no encoder, so no attention to it either.

        Returns:
            features (B, T, D) and {"attn", "inner_states", "routing"}
        """
        tokens = prev_output_tokens if incremental_state is None else prev_output_tokens[:, -1:]
        x, padding_mask = self._embed(prev_output_tokens, incremental_state)
        causal = incremental_state is None and not full_context_alignment
        inner_states: List[Tensor] = [x]
        routing: List[Optional[Routing]] = [None] * len(self.moe_numbers)
        router_state: Optional[Tensor] = None
        for layer in self.layers:
            moe_index = getattr(layer, "moe_index", None)
            x, _, _, *routing_fields = layer(
                x,
                None,
                None,
                incremental_state,
                self_attn_mask=self.buffered_future_mask(x) if causal else None,
                self_attn_padding_mask=padding_mask,
                **({} if moe_index is None else self._of_moe(moe_index, tokens, router_state)),
            )
            inner_states.append(x)
            if moe_index is not None:
                routing[moe_index] = Routing(*routing_fields)
                router_state = routing[moe_index].state

        if self.layer_norm is not None:
            x = self.layer_norm(x)
        features = x.transpose(0, 1)
        if self.project_out_dim is not None:
            features = self.project_out_dim(features)
        return features, {"attn": [None], "inner_states": inner_states, "routing": routing}

    def _of_moe(self, moe_index: int, tokens: Tensor, router_state: Optional[Tensor]) -> Dict[str, Any]:
        """What a MoE layer is told beside what every layer is told."""
        return {
            "top_k": self.active_top_k(moe_index),
            "token_ids": tokens,
            "router_state": router_state,
            "update": self.num_updates,
            "limit": self._limit(tokens),
        }

    def _limit(self, tokens: Tensor) -> Optional[Limit]:
        """Which of their K experts tokens keep now, drawn anew for every layer."""
        if not self.training:
            limit = self.eval_limit
        elif self._at_largest:
            return None
        else:
            limit = Limit(token_top_k=self.schedule.per_token(self.num_updates, tokens.numel(), tokens.device))
        return limit if any(one is not None for one in limit) else None

    def _embed(self, tokens: Tensor, incremental_state: Optional[Dict[str, Any]]) -> Tuple[Tensor, Optional[Tensor]]:
        """Tokens (B, T) -> embeddings (T, B, D) and the padding mask (B, T), None without padding."""
        positions = None
        if self.embed_positions is not None:
            positions = self.embed_positions(tokens, incremental_state=incremental_state)
        if incremental_state is not None:  # all but the last were seen at earlier steps
            tokens = tokens[:, -1:]
        x = self.embed_scale * self.embed_tokens(tokens.contiguous())
        for optional in (self.quant_noise, self.project_in_dim):
            if optional is not None:
                x = optional(x)
        if positions is not None:
            x = x + positions
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        padding_mask = tokens.eq(self.padding_idx)
        return self.dropout_module(x).transpose(0, 1), padding_mask if padding_mask.any() else None


def build_moe_layer(
    moe: MoEConfig,
    cfg: TransformerConfig,
    number: int,
    place: Place,
    parallel: Optional[ExpertParallel] = None,
) -> MoELayer:
    """The MoE layer of decoder layer *number*, whose router stands at *place*.

    The router, every expert and the shared experts are drawn from generators of their own, seeded by seed, layer
    and expert: the same on every worker, and whatever else the model holds. The global generator is left as it
    was, so two models that differ in their routers alone are alike in all the rest.
    """

    def seed(index: int) -> int:
        return (moe.init_seed * 1_000 + number) * 100_000 + index

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed(0))
        layer = MoELayer(
            ROUTERS[moe.moe_router].from_config(moe, place),
            moe.moe_ffn_embed_dim or cfg.decoder.ffn_embed_dim,
            top_k=moe.moe_top_k,
            # stock's "gelu" is this one in float32, which this one computes in anyway
            activation=F.gelu if cfg.activation_fn == "gelu" else utils.get_activation_fn(cfg.activation_fn),
            activation_dropout=cfg.activation_dropout or cfg.relu_dropout or 0.0,
            capacity_factor=moe.moe_capacity_factor,
            shared_experts=moe.moe_shared_experts,
            adapter_dim=moe.moe_adapter_dim,
            similarity_weight=moe.moe_similarity_wt,
            backend=moe.moe_backend,
            parallel=parallel,
        )
        torch.manual_seed(seed(1))
        for part in (layer.shared_experts, layer.adapter):
            if part is not None:
                part.reset_parameters()
    layer.router.reset_parameters(torch.Generator().manual_seed(seed(2)))
    experts = range(moe.moe_expert_count)
    layer.experts.reset_parameters([torch.Generator().manual_seed(seed(3 + expert)) for expert in experts])
    return layer
