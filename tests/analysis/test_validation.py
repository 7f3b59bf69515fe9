"""What a validation logs of the layers, against what the report says of the same tokens."""

import pytest
import torch
from fairseq.logging import metrics

from fairseq_hyperrouter.analysis.inspection import inspect
from fairseq_hyperrouter.analysis.layer_numbers import LOOK_AT
from fairseq_hyperrouter.analysis.validation import LOGGED, ValidationLog
from tests.analysis.test_inspection import evaluator
from tests.tiny import DECODER_ROUTERS, tiny_model, tiny_sample

SAMPLE = tiny_sample((9, 5, 7))


def validate(log, model, samples):
    with metrics.aggregate(new_root=True) as aggregator:
        for sample in samples:
            log.look(model, sample)
    return aggregator.get_smoothed_values()


@pytest.mark.parametrize("router", DECODER_ROUTERS)
def test_is_what_the_report_says(router):
    """Of the middle batch only, whatever comes before or after it, and at the k of a report."""
    model, log = tiny_model(moe_router=router).eval(), ValidationLog()
    log.begin()
    log.begin_set(range(3))
    logged = validate(log, model, [tiny_sample((3,)), SAMPLE, tiny_sample((16, 16), seed=3)])
    for number, layer in enumerate(inspect(evaluator(model, [SAMPLE]), LOOK_AT).layers):
        for name in LOGGED:
            assert logged[f"moe_{name}_layer{number}"] == pytest.approx(layer[name], abs=1e-3), name


def test_once_per_set():
    model, log = tiny_model().eval(), ValidationLog()
    log.begin_set(range(1))
    assert not validate(log, model, [SAMPLE])  # no validation of a training
    log.begin()
    log.begin_set(range(1))
    assert validate(log, model, [SAMPLE])
    assert not validate(log, model, [SAMPLE])
    log.begin_set(range(2))
    assert not validate(log, model, [SAMPLE])
    assert validate(log, model, [SAMPLE])
    log.begin_set(range(9), at_most=1)
    assert validate(log, model, [SAMPLE])


def test_changed():
    """Of 8 tokens that all go to experts 0 and 1 a new router sends half to 2 and 3; other sets' do not count.

    The model itself validates with all 4 experts, where nothing can change.
    """
    model, log, sample = tiny_model(moe_router="smoe", moe_top_k=4).eval(), ValidationLog(), tiny_sample((8,))
    router, low, high = model.decoder.layers[0].moe.router, torch.tensor([1.0, 1, 0, 0]), torch.tensor([0, 0, 1.0, 1])
    router.logits = lambda x, context: low.repeat(len(x), 1)
    log.begin()
    log.begin_set(range(1))
    assert not any("changed" in name for name in validate(log, model, [sample]))
    log.begin_set(range(1))
    assert not any("changed" in name for name in validate(log, model, [sample]))
    router.logits = lambda x, context: torch.stack((low, high)).repeat(len(x) // 2, 1)
    log.begin()
    log.begin_set(range(1))
    logged = validate(log, model, [sample])
    assert logged["moe_changed_layer0"] == 0.5


def test_too_few_tokens_for_a_similarity():
    """With three tokens there is none; the rest is logged."""
    model, log = tiny_model().eval(), ValidationLog()
    log.begin()
    log.begin_set(range(1))
    logged = validate(log, model, [tiny_sample((3,))])
    assert "moe_jacobian_rank_layer0" in logged
    assert "moe_mean_output_similarity_layer0" not in logged
