import pytest

from fairseq_hyperrouter import MoEConfig, UserError
from fairseq_hyperrouter.config import format_ints, parse_ints, parse_top_k

BAD = [
    ({"moe_router": "best"}, r"--moe-router 'best': choose from .*hyperrouter.*smoe"),
    ({"moe_gate_softmax": "none"}, r"--moe-gate-softmax 'none': choose from selected, all"),
    ({"moe_expert_count": 0}, r"--moe-expert-count 0: must be at least 1"),
    ({"moe_freq": 0}, r"--moe-freq 0: must be at least 1"),
    ({"moe_freq": 5}, r"--moe-freq 5: leaves no MoE layer in a model of 4 layers"),
    ({"moe_layers": "0,4"}, r"--moe-layers 0,4: layers are numbered 0 to 3"),
    ({"moe_layers": "-1"}, r"--moe-layers -1: layers are numbered 0 to 3"),
    ({"moe_layers": "0;1"}, r"--moe-layers '0;1': must be integers separated by commas"),
    ({"moe_layers": ""}, r"--moe-layers '': must be integers separated by commas"),
    ({"moe_ffn_embed_dim": 0}, r"--moe-ffn-embed-dim 0: must be at least 1"),
    ({"moe_top_k": 17}, r"--moe-top-k 17: must be an integer between 1 and the number of experts \(16\)"),
    ({"moe_top_k": 0}, r"--moe-top-k 0: must be an integer between 1"),
    ({"moe_top_k_start": 17}, r"--moe-top-k-start 17: must be an integer between 1"),
    ({"moe_top_k_start": 0}, r"--moe-top-k-start 0: must be an integer between 1"),
    ({"moe_top_k_schedule": "up"}, r"--moe-top-k-schedule 'up': choose from constant, linear"),
    ({"moe_top_k_schedule": "linear"}, r"--moe-top-k-schedule linear: .*--moe-top-k-schedule-updates to at least 1"),
    ({"moe_top_k_schedule": "elastic", "moe_top_k_choices": "1,3"}, r"--moe-top-k-choices 1,3: .* 1 to --moe-top-k"),
    (
        {"moe_top_k_choices": "few", "moe_top_k_schedule": "elastic"},
        r"--moe-top-k-choices 'few': must be integers separated by commas",
    ),
    ({"moe_top_k_choices": "1,2"}, r"--moe-top-k-choices 1,2: only with --moe-top-k-schedule elastic"),
    ({"moe_top_k_start": 2}, r"--moe-top-k-start 2: not with a constant schedule"),
    ({"moe_layers": "1", "moe_freq": 2}, r"--moe-freq 2: not together with --moe-layers 1"),
    (
        {"moe_elastic_per": "day", "moe_top_k_schedule": "elastic"},
        r"--moe-elastic-per 'day': choose from update, layer",
    ),
    ({"moe_eval_top_k": "17"}, r"--moe-eval-top-k 17: must be an integer between 1"),
    ({"moe_eval_top_k": "1.5"}, r"--moe-eval-top-k 1.5: must be an integer between 1"),
    ({"moe_eval_top_k": "all"}, r"--moe-eval-top-k all: must be an integer between 1"),
    ({"moe_router_init_std": 0.0}, r"--moe-router-init-std 0.0: must be greater than 0"),
    ({"moe_hyper_embed_dim": 0}, r"--moe-hyper-embed-dim 0: must be at least 1"),
    ({"moe_hyper_hidden_dim": 0}, r"--moe-hyper-hidden-dim 0: must be at least 1"),
    ({"moe_capacity_factor": -1.0}, r"--moe-capacity-factor -1.0: must be greater than 0"),
    ({"moe_capacity_factor": float("nan")}, r"--moe-capacity-factor nan: must be greater than 0"),
    ({"moe_shared_experts": -1}, r"--moe-shared-experts -1: must be at least 0"),
    ({"moe_router": "smoe", "moe_hyper_shared": True}, r"--moe-hyper-shared True: means nothing to smoe"),
    (
        {"moe_router": "relu", "moe_top_k_schedule": "elastic", "moe_elastic_per": "token"},
        "--moe-elastic-per token: relu has as many experts at every k; give layer or update",
    ),
    ({"moe_router": "hash", "moe_router_jitter": 0.1}, r"--moe-router-jitter 0.1: means nothing to hash"),
    ({"moe_elastic_per": "token"}, r"--moe-elastic-per token: only with --moe-top-k-schedule elastic"),
    ({"moe_elastic_per": "update"}, r"--moe-elastic-per update: only with --moe-top-k-schedule elastic"),
    ({"moe_router": "switch", "moe_gate_softmax": "sigmoid"}, r"--moe-gate-softmax sigmoid: switch has gates of its"),
    ({"moe_router": "base", "moe_gate_softmax": "all"}, r"--moe-gate-softmax all: base has gates of its own"),
    ({"moe_compete_rate": 0.5}, r"--moe-compete-rate 0.5: means nothing to hyperrouter"),
]


@pytest.mark.parametrize("options, message", BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_check_names_option_value_and_what_is_allowed(options, message):
    with pytest.raises(UserError, match=message):
        MoEConfig(**options).check(4)


def test_defaults_are_allowed():
    MoEConfig().check(1)


@pytest.mark.parametrize(
    "options, layers",
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"moe_freq": 2}, {1, 3, 5}),
        ({"moe_freq": 6}, {5}),
        ({"moe_layers": "0,1,2"}, {0, 1, 2}),
        ({"moe_layers": " 4, 0,4"}, {0, 4}),
    ],
)
def test_layer_numbers(options, layers):
    config = MoEConfig(**options)
    config.check(6)
    assert config.layer_numbers(6) == layers


@pytest.mark.parametrize("value, expected", [(None, 3), ("1", 1), (4, 4), (" 2 ", 2)])
def test_eval_top_k(value, expected):
    assert MoEConfig(moe_top_k=3, moe_eval_top_k=value).eval_top_k(2) == (expected, expected)


def test_eval_top_k_by_layer():
    config = MoEConfig(moe_eval_top_k="1, 4")
    config.check(2)
    assert config.eval_top_k(2) == (1, 4)
    with pytest.raises(UserError, match="must be one number, or one for each of the 3 MoE layers"):
        config.check(3)


def test_schedule():
    config = MoEConfig(moe_top_k_schedule="linear", moe_top_k_start=8, moe_top_k=16, moe_top_k_schedule_updates=100)
    schedule = config.schedule
    assert (schedule.name, schedule.start, schedule.end, schedule.updates) == ("linear", 8, 16, 100)
    elastic = MoEConfig(
        moe_top_k_schedule="elastic", moe_top_k=8, moe_top_k_choices="1,8", moe_elastic_per="update", seed=3
    )
    assert (elastic.schedule.choices, elastic.schedule.per, elastic.schedule.seed) == ((1, 8), "update", 3)


def test_outside_a_full_config_references_have_defaults():
    assert MoEConfig().init_seed == 1
    assert MoEConfig().schedule.updates == 0


def test_parsing():
    assert parse_ints("--x", "1, 2,-3") == (1, 2, -3)
    assert [format_ints(value) for value in (8, (1, 4), [3])] == ["8", "1,4", "3"]
    assert parse_top_k("--x", "4", 4) == 4
    for value in ("", None, 5, -1, True, "²"):
        with pytest.raises(UserError, match=r"--x .*: must be an integer between 1 and the number of experts \(4\)"):
            parse_top_k("--x", value, 4)
