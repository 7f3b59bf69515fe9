"""The numbers of one layer, of layers small enough to work them out by hand."""

import math

import pytest
import torch

from fairseq_hyperrouter import LinearRouter, MoELayer
from fairseq_hyperrouter.analysis.layer_numbers import of_experts, of_routing
from fairseq_hyperrouter.analysis.seen import Seen
from fairseq_hyperrouter.routing import Routing, RoutingContext

A, B, C = (9.0, 8.0, 0.0), (9.0, 0.0, 8.0), (0.0, 9.0, 8.0)
"""Tokens that have experts 0 and 1, 0 and 2, 1 and 2."""


def layer_of(*tokens):
    """Three experts whose logits are the three numbers of a token, and what the layer makes of the tokens."""
    layer, x = MoELayer(LinearRouter(3, 3), 4, top_k=2), torch.tensor(tokens)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3))
        layer.router.bias.zero_()
    routing = layer.router(x, RoutingContext(2))
    return layer, Seen(torch.arange(len(x)), x, routing, torch.zeros(len(x)).long(), None)


def test_similarity_of_weights():
    """Both matrices of an expert as one vector, here (3, 4), (3, 0) and (0, 4); the mean leaves out the diagonal."""
    layer, sample = layer_of(A)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.zero_()
        layer.experts.weight1[:, 1, 2] = torch.tensor([3.0, 3.0, 0.0])
        layer.experts.weight2[:, 3, 0] = torch.tensor([4.0, 0.0, 4.0])
    found = of_experts(layer, sample, 2)
    assert [pytest.approx(row) for row in found["weight_similarity"]] == [[1, 0.6, 0.8], [0.6, 1, 0], [0.8, 0, 1]]
    assert found["mean_weight_similarity"] == pytest.approx((0.6 + 0.8 + 0) / 3)


def test_similarity_of_outputs():
    """An expert, its copy with other units of measure, and one that has the same output for every token."""
    torch.manual_seed(0)
    layer, sample = layer_of(A, B, C, (1.0, -2.0, 3.0), (-4.0, 1.0, 0.5))
    with torch.no_grad():
        layer.experts.weight1.normal_()
        layer.experts.weight1[1] = layer.experts.weight1[0]
        layer.experts.bias1[1] = layer.experts.bias1[0]
        layer.experts.weight2[1] = 5 * layer.experts.weight2[0]
        layer.experts.weight2[2] = 0
        layer.experts.bias2[2] = 1
    found = of_experts(layer, sample, 2)
    assert found["output_similarity"] == [[pytest.approx(1)] * 2 + [None]] * 2 + [[None] * 3]
    assert found["mean_output_similarity"] == pytest.approx(1)  # of what there is


def test_rank_of_the_hidden_states():
    """Two directions of the same spread around a mean far from 0 fill two dimensions."""
    layer, sample = layer_of((51.0, 50.0, 7.0), (49.0, 50.0, 7.0), (50.0, 51.0, 7.0), (50.0, 49.0, 7.0))
    assert of_experts(layer, sample, 2)["hidden_rank"] == pytest.approx(2)


@pytest.mark.parametrize("tokens, span", [((A, A), 1), ((A, B), 2), ((A, B, C), 2)])
def test_rank_of_the_routing_term(tokens, span):
    """With two gates it is g1 g2 (FFN1 - FFN2) (w1 - w2)^T: of rank 1 at a token, and over all of that of the w1 - w2.

    These are e0 - e1, e0 - e2 and e1 - e2, the last of which is the difference of the others.
    """
    torch.manual_seed(0)
    layer, sample = layer_of(*tokens)
    found = of_experts(layer, sample, 2)
    assert (found["jacobian_rank"], found["jacobian_span"], found["width"]) == (1, span, 3)


def test_routing():
    """Four tokens with one of three experts each, of even probabilities."""
    index = torch.tensor([[0], [0], [0], [1]])
    routing = Routing(torch.zeros(4, 3), index, torch.ones(4, 1))
    found = of_routing(Seen(torch.arange(4), torch.zeros(4, 3), routing, torch.zeros(4).long(), None))
    assert found["router_entropy"] == pytest.approx(math.log(3))
    assert found["normalised_entropy"] == pytest.approx(1)
    assert found["load"] == pytest.approx([0.75, 0.25, 0])
    assert found["load_imbalance"] == pytest.approx(2.25) and found["unused_experts"] == 1
    assert found["load_cv"] == pytest.approx((14 / 9) ** 0.5 / (4 / 3))  # of 3, 1 and 0
    assert found["inner_balance"] == pytest.approx(1) and found["outer_balance"] == pytest.approx(1 / 3)
    assert (found["margin"], found["mean_top_k"]) == (0, 1)
