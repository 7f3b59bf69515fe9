import math

import pytest
import torch

from fairseq_hyperrouter import RoutingContext
from fairseq_hyperrouter.routing import NoisyTopKRouter
from fairseq_hyperrouter.routing.methods.noisy_top_k import _probability_to_stay, _squared_variation


def test_no_noise_outside_training():
    router, x = NoisyTopKRouter(6, 4, init_std=1.0), torch.randn(30, 6)
    noisy = router(x, RoutingContext(2))
    quiet = router.eval()(x, RoutingContext(2))
    torch.testing.assert_close(quiet.logits, x @ router.weight.t() + router.bias)
    assert quiet.loss is None and not torch.allclose(noisy.logits, quiet.logits)


def test_lr_scale():
    """Of what is stored divided by it, the same noisy logits."""
    plain, fast = (NoisyTopKRouter(6, 4, lr_scale=scale) for scale in (1, 10))
    torch.nn.init.normal_(plain.noise_weight)
    fast.load_state_dict({name: tensor / 10 for name, tensor in plain.state_dict().items()})
    found = []
    for router in (plain, fast):
        torch.manual_seed(0)
        found.append(router(torch.randn(30, 6), RoutingContext(2)).logits)
    torch.testing.assert_close(found[0], found[1])


def test_the_load_is_the_chance_to_be_chosen():
    """Against drawing each expert's noise anew many times, the others' kept."""
    torch.manual_seed(0)
    clean, size = torch.randn(3, 5), torch.rand(3, 5) + 0.2
    noisy = clean + torch.randn(3, 5) * size
    found = _probability_to_stay(clean, noisy, size, 2)
    for token in range(3):
        for expert in range(5):
            draws = noisy[token].repeat(20_000, 1)
            draws[:, expert] = clean[token, expert] + torch.randn(20_000) * size[token, expert]
            chosen = (draws.topk(2).indices == expert).any(-1).float().mean()
            assert abs(found[token, expert] - chosen) < 0.015


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_loss(top_k):
    """CV^2 of hand-made sums, and what the router returns; padding counts nowhere."""
    assert _squared_variation(torch.tensor([[1.0, 3.0]])).item() == pytest.approx(0.25)
    torch.manual_seed(0)
    router, x = NoisyTopKRouter(6, 4, init_std=1.0), torch.randn(30, 6)
    padding = torch.arange(30) > 20
    torch.manual_seed(5)
    found = router(x, RoutingContext(top_k, padding)).loss
    changed = x.masked_fill(padding[:, None], 100.0)
    torch.manual_seed(5)
    other = router(changed, RoutingContext(top_k, padding)).loss
    torch.testing.assert_close(found, other)
    found.backward()
    assert math.isfinite(found) and found > 0
    assert router.weight.grad.any() and router.noise_weight.grad.any()
