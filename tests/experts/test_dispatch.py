import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_hyperrouter.experts.dispatch import order_by_expert


@st.composite
def assignments(draw):
    num_experts, num_tokens, top_k = (draw(st.integers(*limits)) for limits in ((1, 6), (0, 12), (1, 4)))
    size = num_tokens * top_k
    experts = draw(st.lists(st.integers(0, num_experts - 1), min_size=size, max_size=size))
    kept = draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size))
    kept = None if kept is None else torch.tensor(kept, dtype=torch.bool).view(num_tokens, top_k)
    return torch.tensor(experts, dtype=torch.long).view(num_tokens, top_k), num_experts, kept


@settings(max_examples=60, deadline=None)
@given(assignments())
def test_order(drawn):
    index, num_experts, kept = drawn
    size, top_k = index.numel(), index.size(1)
    dispatch = order_by_expert(index, num_experts, kept)
    is_kept = [True] * size if kept is None else kept.flatten().tolist()
    experts = index.flatten().tolist()

    # a stable sort by expert, dropped assignments behind: in particular a permutation
    expected = sorted(range(size), key=lambda n: experts[n] if is_kept[n] else num_experts)
    assert dispatch.order.tolist() == expected
    assert dispatch.token.tolist() == [n // top_k for n in expected]
    carried_out = [experts[n] if is_kept[n] else num_experts for n in expected]
    assert dispatch.expert.tolist() == carried_out and dispatch.is_whole == (kept is None)
    counts = [sum(e == expert and k for e, k in zip(experts, is_kept)) for expert in range(num_experts)]
    assert dispatch.ends.tolist() == [sum(counts[: expert + 1]) for expert in range(num_experts)]
