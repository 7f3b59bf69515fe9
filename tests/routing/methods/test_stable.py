import pytest
import torch

from fairseq_hyperrouter import RoutingContext, UserError
from fairseq_hyperrouter.routing import StableRouter


def context(ids, update, padding=None):
    return RoutingContext(1, padding, token_ids=ids, update=update)


def test_two_stages():
    torch.manual_seed(0)
    router = StableRouter(6, 4, vocabulary=9, stage1_updates=3, init_std=1.0)
    optimizer = torch.optim.Adam(router.parameters(), 0.1, weight_decay=0.1)
    x, ids = torch.randn(40, 6), torch.randint(0, 9, (40,))
    for update in range(6):
        optimizer.zero_grad()
        routing = router(x, context(ids, update))
        by_word = (router.frozen_words @ router.frozen_experts.t()).argmax(1)[ids]
        by_logits = routing.logits.argmax(1)
        assert torch.equal(routing.expert_index[:, 0], by_word if update >= 3 else by_logits)
        torch.testing.assert_close(routing.gate, routing.logits.gather(1, routing.expert_index).sigmoid())
        assert bool(router.is_frozen) == (update >= 3) and (routing.loss > 0) == (update < 3)
        if update == 3:
            frozen = router.frozen_words.clone(), router.frozen_experts.clone()
            assert torch.equal(frozen[0], router.words)
        (routing.gate.sum() + routing.loss).backward()
        assert all(parameter.grad is not None for parameter in router.parameters())
        optimizer.step()
    assert torch.equal(router.frozen_words, frozen[0]) and torch.equal(router.frozen_experts, frozen[1])
    fresh = StableRouter(6, 4, vocabulary=9, stage1_updates=3)
    fresh.load_state_dict(router.state_dict())
    assert torch.equal(fresh.eval()(x, context(ids, 0)).expert_index, router.eval()(x, context(ids, 0)).expert_index)


def test_lr_scale():
    """Of what is stored divided by it, the same losses and, in both stages, choices."""
    plain, fast = (StableRouter(6, 4, vocabulary=9, stage1_updates=1, lr_scale=scale) for scale in (1, 10))
    stored = {name: value / 10 if value.is_floating_point() else value for name, value in plain.state_dict().items()}
    fast.load_state_dict(stored)
    x, ids = torch.randn(40, 6), torch.randint(0, 9, (40,))
    for update in (0, 1):
        one, other = (router(x, context(ids, update)) for router in (plain, fast))
        torch.testing.assert_close(one.loss, other.loss)
        assert torch.equal(one.expert_index, other.expert_index)


def test_distillation_learns_the_choice():
    torch.manual_seed(0)
    router = StableRouter(6, 4, vocabulary=9, stage1_updates=10**6, init_std=1.0)
    ids = torch.arange(9)
    x = torch.randn(9, 6)  # one hidden state per word
    optimizer = torch.optim.Adam([router.words, router.experts], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        routing = router(x, context(ids, 0))
        routing.loss.backward()
        optimizer.step()
    assert torch.equal((router.words @ router.experts.t()).argmax(1), routing.expert_index[:, 0])


def test_padding_and_mistakes():
    router, x, ids = StableRouter(6, 4, vocabulary=9, stage1_updates=3), torch.randn(8, 6), torch.arange(8)
    padding = torch.arange(8) > 4
    loss = router(x, context(ids, 0, padding)).loss
    x[padding] = 9.0
    torch.testing.assert_close(router(x, context(ids, 0, padding)).loss, loss)
    with pytest.raises(UserError, match="--moe-stage1-updates 0: must be at least 1"):
        StableRouter(6, 4, vocabulary=9, stage1_updates=0)
