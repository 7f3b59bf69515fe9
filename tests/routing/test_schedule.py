import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_hyperrouter import TopKSchedule, UserError
from fairseq_hyperrouter.routing.schedule import doubling

GROWING = ["linear", "cosine", "exponential", "steps"]
UP_AND_DOWN = pytest.mark.parametrize("start, end", [(1, 16), (16, 1), (8, 16), (3, 12), (5, 5)])


@pytest.mark.parametrize("name", GROWING)
@UP_AND_DOWN
@pytest.mark.parametrize("updates", [1, 2, 299, 300, 400_000])
def test_edges(name, start, end, updates):
    schedule = TopKSchedule(name, end=end, start=start, updates=updates)
    assert schedule(0) == start
    assert schedule(updates) == schedule(updates + 1) == schedule(10 * updates) == end
    assert min(start, end) <= schedule(updates - 1) <= max(start, end)
    if updates >= 299:
        assert schedule(updates - 1) == end
        rise = 1 if end >= start else -1
        values = [rise * schedule(t) for t in range(0, updates + 1, max(1, updates // 1000))]
        assert values == sorted(values)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(GROWING), st.integers(1, 64), st.integers(1, 64), st.integers(1, 10**6), st.integers(0, 2 * 10**6)
)
def test_stays_between_start_and_end(name, start, end, updates, t):
    k = TopKSchedule(name, end=end, start=start, updates=updates)(t)
    assert isinstance(k, int) and min(start, end) <= k <= max(start, end)


def test_constant():
    assert {TopKSchedule("constant", end=3, start=1)(t) for t in (0, 1, 10**9)} == {3}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 32), st.integers(1, 32), st.integers(1, 5000), st.data())
def test_published_linear_formula(k_min, k_max, updates, data):
    """k(t) = clip(round((k_max - k_min) t / T) + k_min); a tie may be rounded either way."""
    t = data.draw(st.integers(0, updates + 10))
    exact = (k_max - k_min) * min(t, updates) / updates + k_min
    assert abs(TopKSchedule("linear", end=k_max, start=k_min, updates=updates)(t) - exact) <= 0.5


@pytest.mark.parametrize("name, at_half", [("linear", 9), ("cosine", 9), ("exponential", 13)])
def test_shape(name, at_half):
    assert TopKSchedule(name, end=16, start=1, updates=1000)(500) == at_half


@pytest.mark.parametrize(
    "start, end, values",
    [(1, 16, (1, 2, 4, 8, 16)), (16, 1, (16, 8, 4, 2, 1)), (1, 12, (1, 2, 4, 8, 12)), (4, 4, (4,))],
)
@pytest.mark.parametrize("stage", [1, 7, 80_000])
def test_steps_are_equally_long(start, end, values, stage):
    assert doubling(start, end) == values
    updates = stage * len(values)
    schedule = TopKSchedule("steps", end=end, start=start, updates=updates)
    for number, value in enumerate(values):
        assert schedule(number * stage) == schedule((number + 1) * stage - 1) == value


def elastic(**options):
    return TopKSchedule("elastic", **{"end": 16, **options})


@pytest.mark.parametrize("per", ["layer", "update"])
def test_elastic_is_reproducible(per):
    random.seed(1)
    before = random.getstate()
    draws = [[elastic(seed=3, per=per)(t, layer) for t in range(30) for layer in range(2)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert random.getstate() == before
    assert draws[0] != [elastic(seed=4, per=per)(t, layer) for t in range(30) for layer in range(2)]


def test_elastic_per():
    def layers_agree(per):
        return [elastic(per=per)(t, 0) == elastic(per=per)(t, 1) for t in range(50)]

    assert all(layers_agree("update"))
    assert sum(layers_agree("layer")) < 15


@pytest.mark.parametrize("choices", [None, [1, 2, 4, 8, 16], [3]])
def test_elastic_draws_every_choice_alike(choices):
    schedule = elastic(choices=choices)
    count = Counter(schedule(t) for t in range(4000))
    expected = choices or [1, 2, 4, 8, 16]
    assert set(count) == set(expected)
    assert all(0.7 < n * len(expected) / 4000 < 1.3 for n in count.values())


def test_elastic_weights():
    """A number given three times in four is drawn three times in four."""
    schedule = elastic(choices=[1, 16, 16, 16])
    assert 0.72 < sum(schedule(t) == 16 for t in range(4000)) / 4000 < 0.78


def test_elastic_per_token():
    schedule = elastic(choices=[1, 2, 4, 4], per="token")
    assert schedule(0) == 4 and elastic().per_token(0, 9, torch.device("cpu")) is None
    torch.manual_seed(0)
    draws = schedule.per_token(0, 4000, torch.device("cpu"))
    assert set(draws.tolist()) == {1, 2, 4} and 0.45 < (draws == 4).float().mean() < 0.55
    torch.manual_seed(0)
    assert torch.equal(draws, schedule.per_token(0, 4000, torch.device("cpu")))


@pytest.mark.parametrize("per", ["layer", "token"])
def test_elastic_with_a_start_grows(per):
    """At update t of 100 nothing above 2 + 14 t / 100 is drawn, and in the end everything."""
    schedule = elastic(start=2, updates=100, per=per)

    def drawn(t):
        of_tokens = schedule.per_token(t, 500, torch.device("cpu"))
        return set(of_tokens.tolist()) if per == "token" else {schedule(t, layer) for layer in range(500)}

    assert [drawn(t) for t in (0, 50, 100, 200)] == [{1, 2}, {1, 2, 4, 8}, *[{1, 2, 4, 8, 16}] * 2]
    assert elastic(start=2, updates=9, choices=[4, 8, 16])(0) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "sinus"}, r"--moe-top-k-schedule 'sinus': choose from constant, linear, .*elastic"),
        ({"name": "elastic", "per": "day"}, r"--moe-elastic-per 'day': choose from update, layer, token"),
        ({"name": "elastic", "start": 2}, r"--moe-top-k-schedule elastic: .*--max-update.* at least 1"),
        ({"name": "linear"}, r"--moe-top-k-schedule linear: .*--max-update.* at least 1"),
        ({"name": "steps", "updates": -1}, r"--moe-top-k-schedule steps: .* at least 1"),
        (
            {"name": "elastic", "end": 4, "choices": [1, 5]},
            r"--moe-top-k-choices 1,5: each must be an integer from 1 to --moe-top-k \(4\)",
        ),
        ({"name": "elastic", "choices": [0]}, r"--moe-top-k-choices 0: each must be an integer from 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        TopKSchedule(**options)


@pytest.mark.parametrize(
    "options",
    [{"end": 0}, {"name": "linear", "start": 0, "updates": 9}, {"name": "steps", "start": 0, "end": 4, "updates": 9}],
    ids=str,
)
def test_a_k_below_one_is_refused(options):
    """Not least because steps from 0 would double 0 for ever."""
    with pytest.raises(UserError, match="must be"):
        TopKSchedule(**options)


@pytest.mark.parametrize(
    "schedule, text",
    [
        (TopKSchedule("constant", end=3), "constant 3"),
        (TopKSchedule("linear", end=16, start=8, updates=9), "linear 8 -> 16 over 9 updates"),
        (elastic(), "elastic, drawn from 1,2,4,8,16 per layer"),
        (elastic(choices=(1, 2), per="update"), "elastic, drawn from 1,2 per update"),
        (elastic(start=1, updates=9), "elastic, drawn from 1,2,4,8,16 per layer, up to 1 -> 16 over 9 updates"),
    ],
)
def test_says_what_it_does(schedule, text):
    assert str(schedule) == text


def test_elastic_cannot_fall():
    with pytest.raises(UserError, match=r"--moe-top-k-start 4: elastic grows, at most --moe-top-k \(2\)"):
        TopKSchedule("elastic", end=2, start=4, updates=10)


def test_largest():
    assert TopKSchedule("linear", end=2, start=8, updates=10).largest == 8
    assert TopKSchedule("linear", end=8, updates=10).largest == 8
