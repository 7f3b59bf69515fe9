"""Hand counts for the tiny model: V = 16 symbols, D = 8, 2 layers, E = 4 experts of F = 12, H = 16."""

import pytest
from fairseq.models.transformer_lm import TransformerLanguageModel

from fairseq_hyperrouter.analysis.cost import model_cost
from tests.tiny import ADAPTIVE, tiny_model

EMBEDDINGS = 2 * 16 * 8  # input and output
ATTENTION_AND_NORMS = 4 * (8 * 8 + 8) + 2 * 2 * 8
EXPERT = 8 * 12 + 12 + 12 * 8 + 8
ROUTER = 4 * (8 + 1)
HYPERNETWORK = (256 * 8 + 256) + (ROUTER * 256 + ROUTER)
SCALE = 1  # of a HyperRouter, a frozen number

# router, options -> trained and frozen parameters of the routers of both layers
ROUTERS = [
    ("hyperrouter", {}, 2 * 8, 2 * (HYPERNETWORK + SCALE)),
    ("hyperrouter", {"moe_hyper_shared": True}, 2 * 8, HYPERNETWORK + 2 * SCALE),
    ("smoe", {}, 2 * ROUTER, 0),
    ("smoe-dropout", {}, 0, 2 * ROUTER),
]


@pytest.mark.parametrize("router, options, trained, frozen", ROUTERS)
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_parameters(router, options, trained, frozen, top_k):
    cost = model_cost(tiny_model(moe_router=router, **options), top_k, context=10)
    trained += EMBEDDINGS + 2 * (ATTENTION_AND_NORMS + 4 * EXPERT)
    assert (cost.total_parameters, cost.trained_parameters, cost.frozen_parameters) == (
        trained + frozen,
        trained,
        frozen,
    )
    assert cost.active_parameters == EMBEDDINGS + 2 * (ATTENTION_AND_NORMS + ROUTER + top_k * EXPERT)


STABLE = 50 * (16 + 4)  # the frozen words and experts


@pytest.mark.parametrize(
    "router, options, frozen",
    [
        ("smoe", {"moe_loss_free_rate": 0.001}, 0),
        ("relu", {}, 0),
        ("hash", {}, 0),
        ("stable", {}, 2 * STABLE),
        ("smoe-dropout", {"moe_loss_free_rate": 0.001}, 2 * ROUTER),
    ],
)
def test_counters_and_tables_are_no_parameters(router, options, frozen):
    """Steps of loss-free balancing and of relu's penalty, hash's table, whether stable is in its second stage."""
    model = tiny_model(moe_router=router, **options)
    assert any(not buffer.is_floating_point() for buffer in model.decoder.layers[0].moe.router.buffers())
    cost = model_cost(model, 1, context=10)
    assert cost.frozen_parameters == frozen
    assert cost.total_parameters == cost.trained_parameters + frozen


@pytest.mark.parametrize("router, top_k, context", [("hyperrouter", 1, 10), ("smoe", 3, 10), ("smoe-dropout", 3, 1)])
def test_flops_count_every_product_and_no_bias(router, top_k, context):
    attention = 4 * 8 * 8 + 2 * 8 * (context + 1) / 2
    products = 16 * 8 + 2 * (attention + 4 * 8 + top_k * 2 * 8 * 12)
    assert model_cost(tiny_model(moe_router=router), top_k, context).flops_per_token == 2 * products


def test_shared_experts_are_always_active():
    options = {"moe_layers": "0", "decoder_layers": 1}
    plain, shared = (model_cost(tiny_model(moe_shared_experts=n, **options), 1, 10) for n in (0, 2))
    assert shared.active_parameters - plain.active_parameters == 2 * EXPERT - 8  # their output bias is one
    assert shared.flops_per_token - plain.flops_per_token == 2 * 2 * (8 * 12 + 12 * 8)


def test_dense_model():
    cost = model_cost(tiny_model(TransformerLanguageModel), 0, context=10)
    total = EMBEDDINGS + 2 * (ATTENTION_AND_NORMS + EXPERT)
    assert cost[:4] == (total, total, 0, total)
    assert cost.flops_per_token == 2 * (16 * 8 + 2 * (4 * 8 * 8 + 2 * 8 * 5.5 + 2 * 8 * 12))


def test_frozen_by_the_user_counts_as_frozen():
    model = tiny_model()
    before = model_cost(model, 2, 10)
    model.decoder.embed_tokens.weight.requires_grad_(False)
    after = model_cost(model, 2, 10)
    assert after.frozen_parameters - before.frozen_parameters == 16 * 8
    assert after.total_parameters == before.total_parameters
    assert after.active_parameters == before.active_parameters


def test_flops_of_a_tied_output_layer_count():
    tied, plain = (model_cost(tiny_model(share_decoder_input_output_embed=tie), 2, 10) for tie in (True, False))
    assert tied.flops_per_token == plain.flops_per_token
    assert tied.total_parameters == plain.total_parameters - 16 * 8


def test_flops_of_a_tied_adaptive_softmax_count():
    tied, plain = (model_cost(tiny_model(tie_adaptive_weights=tie, **ADAPTIVE), 2, 10) for tie in (True, False))
    assert tied.flops_per_token == plain.flops_per_token
