import pytest
import torch

from fairseq_hyperrouter import MoELayer, RoutingContext, UserError
from fairseq_hyperrouter.routing import HashRouter


def test_a_function_of_the_token_alone():
    router = HashRouter(4, 6, vocabulary=20)
    ids = torch.tensor([3, 7, 3, 19, 7])
    one, other = (router(torch.randn(5, 4), RoutingContext(2, token_ids=ids)) for _ in range(2))
    assert torch.equal(one.expert_index, other.expert_index)
    assert torch.equal(one.expert_index[0], one.expert_index[2])
    assert torch.equal(one.gate, torch.full((5, 2), 0.5))
    assert torch.equal(one.logits.topk(2).indices, one.expert_index)
    assert not list(router.parameters())


@pytest.mark.parametrize("vocabulary, num_experts", [(24, 6), (25, 6), (5, 8), (1000, 16)])
def test_balanced_at_every_place(vocabulary, num_experts):
    router = HashRouter(4, num_experts, vocabulary=vocabulary)
    assert all(sorted(row) == list(range(num_experts)) for row in router.table.tolist())
    for place in range(num_experts):
        load = router.table[:, place].long().bincount(minlength=num_experts)
        blocks = vocabulary // num_experts
        assert load.min() >= blocks and load.max() <= blocks + 1


def test_drawn_from_its_generator():
    tables = []
    for seed in (1, 1, 2):
        router = HashRouter(4, 6, vocabulary=20)
        router.reset_parameters(torch.Generator().manual_seed(seed))
        tables.append(router.table)
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def test_token_ids_are_needed():
    layer = MoELayer(HashRouter(4, 6, vocabulary=20), 8)
    layer(torch.randn(2, 3, 4), token_ids=torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(UserError, match="token_ids None: HashRouter needs them"):
        layer(torch.randn(2, 3, 4))
