"""Parameters and floating point operations of a language model at a number of active experts."""

from typing import NamedTuple, Sequence, Union

from fairseq.modules.adaptive_softmax import TiedLinear
from torch import nn

from fairseq_hyperrouter.moe_layer import moe_layers


class ModelCost(NamedTuple):
    """What a model holds, and what one token uses of it."""

    total_parameters: int
    """All of them: trained and frozen."""
    trained_parameters: int
    frozen_parameters: int
    """The weights of frozen routers and hypernetworks; no counters, nor a hash router's table of experts."""
    active_parameters: int
    """Those that a token's forward pass uses: k experts per MoE layer, what the router reads at inference in the
    place of what it is trained with, and all that is not MoE (the whole embedding table counts)."""
    flops_per_token: float
    """Of the forward pass, two per multiply-add: every matrix product of the decoder, its attention over half
    the context on average, and the output layer; not the input embedding."""


def model_cost(model: nn.Module, top_k: Union[float, Sequence[float]], context: int) -> ModelCost:
    """Count for *top_k* experts per token, or as many in each MoE layer, and samples of *context* tokens."""
    layers = moe_layers(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # A hypernetwork shared by all layers counts once. What is no floating point number counts or looks up: no weight.
    frozen_weights = {b for layer in layers for b in layer.router.buffers() if b.is_floating_point()}
    frozen = sum(b.numel() for b in frozen_weights)
    frozen += sum(p.numel() for p in model.parameters() if not p.requires_grad)
    active = sum(p.numel() for p in model.parameters())
    flops = 0.0
    for layer, k in zip(layers, [top_k] * len(layers) if isinstance(top_k, (int, float)) else top_k):
        router, experts = layer.router, layer.experts
        expert_parameters = sum(p.numel() for p in experts.parameters()) // len(experts.local_experts)
        expert_products = (experts.weight1.numel() + experts.weight2.numel()) // len(experts.local_experts)
        active -= expert_parameters * (experts.num_experts - k)
        active += router.inference_parameters() - sum(p.numel() for p in router.parameters())
        flops += router.flops() + 2 * k * expert_products
        if layer.adapter is not None:
            flops += 2 * (layer.adapter.down.numel() + layer.adapter.up.numel())
    looked_up = set(model.decoder.embed_tokens.modules())
    for module in model.modules():
        if isinstance(module, (nn.Linear, TiedLinear)) and module not in looked_up:
            flops += 2 * module.weight.numel()
    for layer in model.decoder.layers:
        if hasattr(layer, "self_attn"):
            flops += 2 * 2 * layer.self_attn.embed_dim * (context + 1) / 2
    return ModelCost(trained + frozen, trained, frozen, round(active), flops)
