import pytest
import torch

from fairseq_hyperrouter import MoELayer, RoutingContext, UserError
from fairseq_hyperrouter.routing import ExpertChoiceRouter, metrics, totals
from tests.reference import feed_forward
from tests.tiny import tiny_model


def test_every_expert_takes_its_tokens():
    """y against a loop over experts; every expert has ceil(T k / E) tokens, none of them padding."""
    torch.manual_seed(0)
    layer = MoELayer(ExpertChoiceRouter(6, 4, init_std=1.0), 8, top_k=2).double()
    x, padding = torch.randn(11, 6).double(), torch.arange(11) == 3
    y, routing = layer(x, padding_mask=padding)
    probability = (x @ layer.router.weight.t() + layer.router.bias).softmax(-1)
    expected = torch.zeros_like(x)
    for expert in range(4):
        tokens = [t for t in probability[:, expert].argsort(descending=True).tolist() if t != 3][:5]
        weights = [getattr(layer.experts, name)[expert] for name in ("weight1", "bias1", "weight2", "bias2")]
        for t in tokens:
            expected[t] += probability[t, expert] * feed_forward(x[t], *weights)
    torch.testing.assert_close(y, expected)
    assert totals.expert_load(routing).tolist() == [5, 5, 5, 5]
    assert not metrics.dropped(routing).any()


def test_refused_in_a_causal_decoder():
    with pytest.raises(UserError, match="--moe-router expert-choice: looks at later tokens, which a decoder must not"):
        tiny_model(moe_router="expert-choice")


def test_the_choice_depends_on_later_tokens():
    router = ExpertChoiceRouter(6, 4, init_std=1.0)
    x = torch.randn(8, 6)
    alone, more = router(x[:4], RoutingContext(1)), router(x, RoutingContext(1))
    assert not torch.equal(alone.chosen.float().sum(1), more.chosen[:4].float().sum(1))
