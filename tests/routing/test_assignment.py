import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fairseq_hyperrouter.routing.assignment import balanced_assignment


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 40), experts=st.integers(1, 6), seed=st.integers(0, 999), scale=st.sampled_from([0, 50]))
def test_balanced_and_nearly_the_best(tokens, experts, seed, scale):
    """Against scipy's exact assignment, each expert as often as it has room."""
    torch.manual_seed(seed)
    scores = scale * torch.randn(tokens, experts)
    expert = balanced_assignment(scores)
    load = expert.bincount(minlength=experts)
    assert load.max() - load.min() <= 1
    if not tokens:
        return
    columns = torch.arange(experts).repeat_interleave(load)
    rows, places = linear_sum_assignment(-scores[:, columns].numpy())
    best = scores[rows, columns[places]].sum()
    found = scores[torch.arange(tokens), expert].sum()
    assert found >= best - tokens * (scores.max() - scores.min()) / 1000 - 1e-3


@pytest.mark.parametrize("equal", [False, True])
def test_many_tokens(equal):
    scores = torch.zeros(2048, 16) if equal else torch.randn(2048, 16) + torch.arange(16)
    assert (balanced_assignment(scores).bincount(minlength=16) == 128).all()


def test_an_experts_offset_hides_no_difference():
    """Scores that differ by little beside what one expert has over another for all tokens."""
    torch.manual_seed(0)
    scores = 0.01 * torch.randn(256, 8) + 5 * torch.arange(8)
    rows, places = linear_sum_assignment(-scores.repeat_interleave(32, dim=1).numpy())
    best, even = scores[rows, places // 32].sum(), scores[torch.arange(256), torch.arange(256) % 8].sum()
    found = scores[torch.arange(256), balanced_assignment(scores)].sum()
    assert found - even > 0.95 * (best - even)
