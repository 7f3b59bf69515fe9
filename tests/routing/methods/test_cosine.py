import pytest
import torch
import torch.nn.functional as F

from fairseq_hyperrouter import RoutingContext, UserError
from fairseq_hyperrouter.routing import CosineRouter


def test_logits_are_cosines_over_the_temperature():
    router, x = CosineRouter(10, 4, dim=3), torch.randn(7, 10)
    routing = router(x, RoutingContext(2))
    for token, row in zip(x, routing.logits):
        for embedding, logit in zip(router.expert_embedding, row):
            cosine = F.cosine_similarity(router.projection @ token, embedding, dim=0)
            torch.testing.assert_close(logit, cosine / 0.07, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(router(10 * x, RoutingContext(2)).logits, routing.logits, rtol=1e-4, atol=1e-4)


def test_the_temperature_is_trained_and_has_a_least():
    router = CosineRouter(10, 4)
    router(torch.randn(9, 10), RoutingContext(2)).gate.square().sum().backward()
    assert all(parameter.grad.any() for parameter in router.parameters())
    with torch.no_grad():
        router.temperature.fill_(-5.0)
    assert router(torch.randn(9, 10), RoutingContext(2)).logits.abs().max() <= 100.001
    with pytest.raises(UserError, match="cosine router dim 0"):
        CosineRouter(10, 4, dim=0)
