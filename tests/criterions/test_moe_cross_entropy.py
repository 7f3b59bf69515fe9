from statistics import fmean

import pytest
import torch
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.logging import metrics
from fairseq.models.transformer_lm import TransformerLanguageModel

from fairseq_hyperrouter import MoECrossEntropyCriterion, UserError
from fairseq_hyperrouter.criterions.moe_cross_entropy import MoECrossEntropyConfig
from fairseq_hyperrouter.criterions.routing_metrics import routing_sums
from tests import reference
from tests.tiny import ADAPTIVE, tiny_model, tiny_sample, tiny_task


def make_criterion(sentence_avg=False, **options):
    config = MoECrossEntropyConfig(sentence_avg=sentence_avg, **options)
    return MoECrossEntropyCriterion.build_criterion(config, tiny_task())


@pytest.mark.parametrize("balance_weight, z_weight", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (0.5, 0.25)])
@pytest.mark.parametrize("sentence_avg", [False, True])
def test_auxiliary_losses_are_trained_but_not_logged(balance_weight, z_weight, sentence_avg):
    model, sample = tiny_model(), tiny_sample()
    criterion = make_criterion(sentence_avg, moe_gate_loss_wt=balance_weight, moe_z_loss_wt=z_weight)
    loss, sample_size, logged = criterion(model, sample)
    assert sample_size == logged["sample_size"] == (2 if sentence_avg else 14)

    log_probability = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
    target = sample["target"]
    cross_entropy = -log_probability.gather(2, target[:, :, None])[target != 1].sum()
    torch.testing.assert_close(logged["loss"], cross_entropy)
    routings, padding = model(**sample["net_input"])[1]["routing"], target.t().reshape(-1) == 1  # time-major
    balance, z = (fmean(reference.of_layers(f, routings, padding)) for f in (reference.balance_loss, reference.z_loss))
    auxiliary = sample_size * (balance_weight * balance + z_weight * z)
    assert (loss - logged["loss"]).item() == pytest.approx(auxiliary, rel=1e-4, abs=1e-4)

    criterion.eval()
    loss, _, logged = criterion(model, sample)
    assert torch.equal(loss, logged["loss"])


def reduced(outputs):
    with metrics.aggregate(new_root=True) as aggregator:
        MoECrossEntropyCriterion.reduce_metrics(outputs)
    return aggregator.get_smoothed_values()


def part(sample, rows):
    net_input = {name: value[rows] for name, value in sample["net_input"].items()}
    target = sample["target"][rows]
    return {"net_input": net_input, "target": target, "ntokens": int((target != 1).sum()), "nsentences": len(target)}


def test_two_halves_of_a_batch_log_what_the_whole_logs():
    model, criterion, sample = tiny_model().eval(), make_criterion().eval(), tiny_sample((9, 5, 2, 7))
    whole, *halves = (criterion(model, part(sample, rows))[2] for rows in (slice(None), slice(0, 2), slice(2, None)))
    for name in (n for n in whole if n.startswith("moe_")):
        torch.testing.assert_close(halves[0][name] + halves[1][name], whole[name])
    metric, metric_of_halves = reduced([whole]), reduced(halves)
    assert metric == pytest.approx(metric_of_halves, rel=1e-4, abs=2e-3)  # metrics are rounded
    assert sum(name.startswith("moe_") for name in metric) == 6


def test_what_is_logged_of_routings():
    """routing_sums of what the model returned, with what is of single layers when asked for."""
    model, sample = tiny_model().eval(), tiny_sample()
    routings = model(**sample["net_input"])[1]["routing"]
    for per_layer in (False, True):
        logged = make_criterion(moe_log_layers=per_layer).eval()(model, sample)[2]
        expected = routing_sums(routings, 4, torch.device("cpu"), per_layer)
        assert {name for name in logged if "moe_" in name} == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(logged[name], value)


def test_dense_models_log_no_routing():
    output = make_criterion(moe_gate_loss_wt=1.0)(tiny_model(TransformerLanguageModel), tiny_sample())
    assert torch.equal(output[0], output[2]["loss"])
    assert not any(name.startswith("moe_") for name in reduced([output[2]]))


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_adaptive_softmax_is_that_of_the_stock_criterion(sentence_avg):
    model, sample = tiny_model(**ADAPTIVE), tiny_sample()
    target = sample["target"]
    target[(target == 6 + 1) | (target == 11 + 1)] = 8  # the second symbol of a tail is padding to the stock criterion
    loss, sample_size, logged = make_criterion(sentence_avg)(model, sample)
    stock_loss, stock_size, stock_logged = AdaptiveLoss(tiny_task(), sentence_avg)(model, sample)
    torch.testing.assert_close(loss, stock_loss.squeeze())
    assert sample_size == stock_size
    assert all(logged[name] == stock_logged[name] for name in stock_logged)


def test_adaptive_softmax_loss_is_the_negative_log_probability_of_the_targets():
    model, sample = tiny_model(**ADAPTIVE), tiny_sample()
    target = sample["target"]
    target[0, :2] = torch.tensor([6 + 1, 11 + 1])  # no loss for these in stock adaptive_loss
    assert (target > 11).any() and (target < 6).any()
    log_probability = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
    expected = -log_probability.gather(2, target[:, :, None])[target != 1].sum()
    torch.testing.assert_close(make_criterion()(model, sample)[0], expected)


@pytest.mark.parametrize("name", ["moe_gate_loss_wt", "moe_z_loss_wt"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_errors(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: must be at least 0"):
        make_criterion(**{name: value})


def decisions(model, learns, teaches, symbol):
    """What the softmax decides for one token: the symbol; or first head symbol or tail, then the symbol of the tail."""
    softmax = model.decoder.adaptive_softmax
    if softmax is None:
        return [(symbol, learns.log_softmax(-1), teaches.log_softmax(-1))]
    tail = sum(symbol >= cutoff for cutoff in softmax.cutoff[:-1])
    layers = [(softmax.head, softmax.cutoff[0] + tail - 1 if tail else symbol)]
    if tail:
        layers.append((softmax.tail[tail - 1], symbol - softmax.cutoff[tail - 1]))
    return [(place, *(layer(x[None])[0].log_softmax(-1) for x in (learns, teaches))) for layer, place in layers]


TIED = {**ADAPTIVE, "tie_adaptive_weights": True, "tie_adaptive_proj": True}


@pytest.mark.parametrize("options", [{}, ADAPTIVE, TIED], ids=["plain", "adaptive", "tied"])
@pytest.mark.parametrize("weight", [None, 0.0, 0.25, 1.0])
def test_distillation(weight, options):
    """(CE_K + (1 - w) CE_k + w KL(p_K || p_k)) / 2 and its gradients, p_K without; by default at w = 1."""
    model = tiny_model(moe_top_k=4, moe_top_k_schedule="elastic", moe_top_k_choices="1", **options).train()
    sample = tiny_sample()
    loss, _, logged = make_criterion(moe_distill_wt=weight)(model, sample)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    target, counts = sample["target"], sample["target"] != 1
    one = model(**sample["net_input"])
    assert {routing.expert_index.size(1) for routing in one[1]["routing"]} == {1}
    with model.decoder.at_largest_top_k():
        four = model(**sample["net_input"])
    assert {routing.expert_index.size(1) for routing in four[1]["routing"]} == {4}
    ce_student = ce_teacher = divergence = 0
    for learns, teaches, symbol in zip(one[0][counts], four[0][counts], target[counts].tolist()):  # token by token
        for place, log_q, log_p in decisions(model, learns, teaches, symbol):
            ce_student, ce_teacher = ce_student - log_q[place], ce_teacher - log_p[place]
            fixed = log_p.detach()
            divergence = divergence + (fixed.exp() * (fixed - log_q)).sum()
    w = 1 if weight is None else weight
    expected = (ce_teacher + (1 - w) * ce_student + w * divergence) / 2 if w else ce_student
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logged["loss"], ce_student)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_no_distillation_elsewhere():
    """Not with another schedule, not in evaluation, and not in a model without experts."""
    sample = tiny_sample()
    model = tiny_model(moe_top_k=4).train()
    assert make_criterion()._distill_weight(model) == 0
    model = tiny_model(moe_top_k=4, moe_top_k_schedule="elastic").eval()
    loss, _, logged = make_criterion().eval()(model, sample)
    assert torch.equal(loss, logged["loss"])
    model = tiny_model(moe_top_k=4, moe_top_k_schedule="elastic", moe_router="relu").train()
    assert make_criterion()._distill_weight(model) == 0
    dense = tiny_model(TransformerLanguageModel).train()
    loss, _, logged = make_criterion(moe_distill_wt=0.5)(dense, sample)
    assert torch.equal(loss, logged["loss"])
