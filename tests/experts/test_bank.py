import math

import pytest
import torch
import torch.nn.functional as F

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.experts import ExpertBank, SharedExperts

SIZES = {"num_experts": 3, "embed_dim": 4, "ffn_embed_dim": 5}


def bank(**options):
    return ExpertBank(**{**SIZES, **options}).double()


def test_unused_experts_get_a_zero_gradient():
    experts = bank()
    experts(torch.randn(4, 4).double(), torch.full((4, 1), 2), torch.ones(4, 1)).sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad[:2].any() and parameter.grad[2].any(), name


def test_starts_as_linear_layers_do():
    experts = ExpertBank(3, 100, 400)
    for weight, bias in ((experts.weight1, experts.bias1), (experts.weight2, experts.bias2)):
        bound = 1 / math.sqrt(weight.size(1))
        for drawn in (*weight, *bias):
            assert 0.9 * bound < drawn.abs().max() <= bound
            assert drawn.mean().abs() < 0.25 * bound


def test_every_expert_is_drawn_from_its_own_generator():
    def draw(seeds):
        experts = ExpertBank(**{**SIZES, "num_experts": len(seeds)})
        experts.reset_parameters([torch.Generator().manual_seed(seed) for seed in seeds])
        return experts

    one, other = draw([1, 2, 3]), draw([4, 2])
    for name, weight in one.named_parameters():
        assert torch.equal(weight[1], other.get_parameter(name)[1])
        assert not torch.equal(weight[0], other.get_parameter(name)[0])


def test_dropout_in_training_only():
    experts = bank(dropout=0.5)
    arguments = torch.randn(20, 4).double(), torch.zeros(20, 1, dtype=torch.long), torch.ones(20, 1)
    assert not torch.equal(experts(*arguments), experts(*arguments))
    experts.eval()
    assert torch.equal(experts(*arguments), experts(*arguments))


@pytest.mark.parametrize("name", SIZES)
def test_errors(name):
    with pytest.raises(UserError, match=f"{name} 0: must be at least 1"):
        bank(**{name: 0})


@pytest.mark.parametrize("activation, reason", [(torch.nn.PReLU(), "has parameters"), (torch.relu_, "works in place")])
def test_activations_that_not_every_backend_computes(activation, reason):
    with pytest.raises(UserError, match=f"activation .*: {reason}"):
        bank(activation=activation)


def test_shared_experts_are_a_sum_of_feed_forwards():
    shared = SharedExperts(3, 4, 5, activation=F.gelu).double()
    x = torch.randn(6, 4).double()
    fc1, fc2, bias1 = shared.fc1.weight.split(5), shared.fc2.weight.split(5, dim=1), shared.fc1.bias.split(5)
    y = sum(F.gelu(x @ w1.t() + b1) @ w2.t() for w1, b1, w2 in zip(fc1, bias1, fc2)) + shared.fc2.bias
    torch.testing.assert_close(shared(x), y)


def test_shared_experts_dropout_in_training_only():
    shared, x = SharedExperts(2, 4, 50, dropout=0.5), torch.randn(6, 4)
    assert not torch.equal(shared(x), shared(x))
    shared.eval()
    assert torch.equal(shared(x), shared(x))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"x": torch.zeros(5, 3)}, r"x \(5, 3\): must be \(T, 8\)"),
        ({"x": torch.zeros(8)}, r"x \(8,\): must be \(T, 8\)"),
        ({"x": torch.zeros(4, 8)}, r"expert_index \(5, 2\), gate \(5, 2\): must both be \(4, K\)"),
        ({"gate": torch.zeros(5, 1)}, r"expert_index \(5, 2\), gate \(5, 1\): must both be \(5, K\)"),
        ({"kept": torch.ones(5, 2)}, r"kept \(5, 2\) torch.float32: must be \(5, 2\) torch.bool"),
        ({"kept": torch.ones(5, 1, dtype=torch.bool)}, r"kept \(5, 1\) torch.bool: must be \(5, 2\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("gradients", [True, False])
def test_wrong_shapes(wrong, message, gradients):
    """C code would read other memory."""
    right = {"x": torch.zeros(5, 8), "expert_index": torch.zeros(5, 2, dtype=torch.long), "gate": torch.zeros(5, 2)}
    with torch.set_grad_enabled(gradients), pytest.raises(UserError, match=message):
        ExpertBank(3, 8, 4)(**{**right, **wrong})
