import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_hyperrouter import Routing
from fairseq_hyperrouter.routing import limit_capacity
from tests import reference

FACTORS = [0.25, 0.5, 1.0, 1.25, 2.0]  # exact in binary: no doubt about the ceiling


def make_routing(chosen, num_experts, padding=None):
    index = torch.tensor(chosen).view(len(chosen), -1)
    mask = None if padding is None else ~torch.tensor(padding, dtype=torch.bool)
    kept = None if mask is None else mask[:, None].expand_as(index)
    return Routing(torch.zeros(len(index), num_experts), index, torch.ones(index.shape), mask, kept)


@st.composite
def assignments(draw):
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_experts))
    orders = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    chosen = draw(st.lists(orders, min_size=1, max_size=14))
    padding = draw(st.none() | st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
    return num_experts, chosen, padding


@settings(max_examples=60, deadline=None)
@given(assignments(), st.sampled_from(FACTORS))
def test_capacity(drawn, factor):
    num_experts, chosen, padding = drawn
    routing = make_routing(chosen, num_experts, padding)
    limited = limit_capacity(routing, factor)
    padded = padding or [False] * len(chosen)
    assert limited.kept.tolist() == reference.limit_capacity(chosen, num_experts, factor, padded)
    assert all(a is b for a, b in zip(limited[:4], routing[:4]))  # gates are not renormalised

    valid = len(chosen[0]) * padded.count(False)
    taken = torch.bincount(routing.expert_index[limited.kept], minlength=num_experts)
    assert taken.max() <= math.ceil(factor * valid / num_experts)
    assert torch.equal(
        limit_capacity(routing, float(num_experts)).kept, ~torch.tensor(padded)[:, None].expand_as(limited.kept)
    )


@settings(max_examples=30, deadline=None)
@given(assignments(), st.sampled_from(FACTORS), st.data())
def test_causal(drawn, factor, data):
    """Later tokens have no say: at the same capacity C, what comes after changes nothing before."""
    num_experts, chosen, padding = drawn
    length = data.draw(st.integers(1, len(chosen)))
    padding = padding or [False] * len(chosen)
    whole = limit_capacity(make_routing(chosen, num_experts, padding), factor).kept
    top_k, prefix = len(chosen[0]), padding[:length]
    capacity = math.ceil(factor * top_k * padding.count(False) / num_experts)
    same_capacity = (capacity - 0.5) * num_experts / (top_k * max(prefix.count(False), 1))
    part = limit_capacity(make_routing(chosen[:length], num_experts, prefix), same_capacity).kept
    assert torch.equal(part, whole[:length])


def test_queue_is_in_token_order_whichever_choice_it_is():
    routing = make_routing([[0, 1], [1, 0], [0, 1], [1, 0]], 2)
    assert limit_capacity(routing, 0.5).kept.tolist() == [[True, True], [True, True], [False, False], [False, False]]


def test_padding_takes_no_place():
    routing = make_routing([0, 0, 0, 0], 2, padding=[True, True, False, False])
    assert limit_capacity(routing, 2.0).kept.flatten().tolist() == [False, False, True, True]


def test_same_expert_for_all():
    routing = make_routing([2] * 10, 4)
    assert limit_capacity(routing, 1.0).kept.flatten().tolist() == [True] * 3 + [False] * 7


@pytest.mark.parametrize("padding", [None, []])
def test_no_tokens(padding):
    index = torch.empty(0, 2, dtype=torch.long)
    mask = None if padding is None else torch.empty(0, dtype=torch.bool)
    kept = None if padding is None else torch.empty(0, 2, dtype=torch.bool)
    assert limit_capacity(Routing(torch.empty(0, 4), index, torch.empty(0, 2), mask, kept), 1.0).kept.shape == (0, 2)


def test_nothing_but_padding():
    assert not limit_capacity(make_routing([0, 1], 2, padding=[True, True]), 1.0).kept.any()


@pytest.mark.parametrize("factor", [1.05, 1.1, 1.2, 1.3, 1.7, 2.2])
def test_decimal_factors(factor):
    """C = ceil(factor N / E) of the number that the user typed."""
    for num_tokens in (50, 100, 160, 1000, 8000):
        capacity = limit_capacity(make_routing([0] * num_tokens, 5), factor).kept.sum().item()
        assert capacity == math.ceil(Fraction(str(factor)) * num_tokens / 5)
