"""What the report looks at, in models that were not trained."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.logging import metrics

from fairseq_hyperrouter.analysis import inspection, layer_numbers
from fairseq_hyperrouter.analysis.inspection import inspect
from fairseq_hyperrouter.analysis.seen import Seen
from fairseq_hyperrouter.criterions.routing_metrics import log_routing, routing_sums
from fairseq_hyperrouter.routing import Routing
from tests.tiny import tiny_dictionary, tiny_model, tiny_sample

LOGGED = {
    "router_entropy": "moe_router_entropy",
    "normalised_entropy": "moe_normalised_entropy",
    "inner_balance": "moe_inner_balance",
    "outer_balance": "moe_outer_balance",
    "margin": "moe_margin",
    "load_imbalance": "moe_load_imbalance",
    "load_cv": "moe_load_cv",
    "unused_experts": "moe_unused_experts",
    "mean_top_k": "moe_top_k",
}


def evaluator(model, samples):
    """Of samples that follow each other in the text."""
    lengths, numbered = [], []
    for sample in samples:
        ids = torch.arange(len(sample["target"])) + len(lengths)
        lengths += sample["net_input"]["src_lengths"].tolist()
        numbered.append({**sample, "id": ids})

    def forward(sample):
        return model(**sample["net_input"])

    return SimpleNamespace(
        model=model,
        layers=[layer.moe for layer in model.decoder.layers],
        task=SimpleNamespace(target_dictionary=tiny_dictionary(), dataset=lambda split: SimpleNamespace(sizes=lengths)),
        split="valid",
        label="tiny",
        device="cpu",
        batches=lambda prefix: numbered,
        forward=forward,
    )


def logged(model, samples, top_k):
    """The validation's metrics with *top_k* experts per token."""
    with model.at_top_k(top_k), torch.no_grad():
        routings = [model(**sample["net_input"])[1]["routing"] for sample in samples]
    with metrics.aggregate(new_root=True) as aggregator:
        log_routing([routing_sums(one, 4, torch.device("cpu"), per_layer=True) for one in routings])
    return aggregator.get_smoothed_values()


@pytest.mark.parametrize(
    "options",
    [
        {"moe_router": "hyperrouter"},
        {"moe_router": "hyperrouter", "moe_eval_threshold": 1.0},  # which holds at no k that is named
        {"moe_router": "relu"},
        {"moe_router": "smoe", "moe_loss_free_rate": 0.5},
        {"moe_router": "recurrent"},
    ],
)
def test_the_report_measures_what_is_logged(options):
    model, samples = tiny_model(**options).eval(), [tiny_sample((9, 5)), tiny_sample((7, 7), seed=1)]
    for layer in model.decoder.layers:
        if layer.moe.router.loss_free_rate:
            layer.moe.router.balancing_steps.copy_(torch.tensor([3, 0, -1, -2]))
    expected = logged(model, samples, 2)
    layers, chosen, _ = inspect(evaluator(model, samples), 2)
    for number, layer in enumerate(layers):
        for name, metric in LOGGED.items():
            assert layer[name] == pytest.approx(expected[f"{metric}_layer{number}"], abs=6e-3), name
        shares = [expected[f"moe_load_expert{expert}_layer{number}"] for expert in range(4)]
        assert layer["load"] == pytest.approx(shares, abs=1e-4)
        assert chosen[number].shape == (28, 4)
    if options["moe_router"] == "relu":
        assert all(layer["mean_top_k"] < 2 for layer in layers)
    elif options["moe_router"] == "smoe":
        assert any(layer["margin"] < 0 for layer in layers)
    else:
        assert all(layer["mean_top_k"] == 2 for layer in layers)


def test_which_tokens_depends_on_the_text_alone(monkeypatch):
    """Not on how it is cut into batches, nor on their order."""
    monkeypatch.setattr(inspection, "TOKENS", 30)
    monkeypatch.setattr(inspection, "SAMPLE", 10)
    monkeypatch.setattr(layer_numbers, "JACOBIANS", 4)
    model, lengths = tiny_model(moe_router="recurrent").eval(), (9, 5, 7, 8, 3, 9, 6, 9)
    whole = tiny_sample(lengths)
    parts = []
    for row, length in enumerate(lengths):
        net_input = {
            "src_tokens": whole["net_input"]["src_tokens"][[row], :length],
            "src_lengths": torch.tensor([length]),
        }
        parts.append({"net_input": net_input, "target": whole["target"][[row], :length], "id": torch.tensor([row])})
    found = [inspect(evaluator(model, [whole]), 2)]
    for samples in (parts, parts[::-1]):
        one = evaluator(model, [whole])
        one.batches = lambda prefix, samples=samples: samples
        found.append(inspect(one, 2))
    for other in found[1:]:
        for layer, expected in zip(other.layers, found[0].layers):
            assert {**layer, "top_tokens": 0} == approx({**expected, "top_tokens": 0})
            assert layer["top_tokens"] == expected["top_tokens"]
        assert all(map(torch.equal, other.chosen, found[0].chosen))
        assert torch.equal(other.token_ids, found[0].token_ids)
    assert len(found[0].chosen[0]) == 28  # every second of 56


def approx(numbers):
    return {
        name: [pytest.approx(one, rel=1e-4, abs=1e-6) for one in value]
        if isinstance(value, list)
        else pytest.approx(value, rel=1e-4, abs=1e-6)
        for name, value in numbers.items()
    }


def test_similarity_of_unrelated_and_equal_experts():
    """The outputs' CKA is 1 for a copy, and not for the others."""
    model, samples = tiny_model(decoder_embed_dim=16, decoder_input_dim=16, decoder_output_dim=16).eval(), []
    for seed in range(8):
        samples.append(tiny_sample((9, 9), seed=seed))
    with torch.no_grad():
        for weight in model.decoder.layers[0].moe.experts.parameters():
            weight[1] = weight[0]
    similarity = torch.tensor(inspect(evaluator(model, samples), 2).layers[0]["output_similarity"])
    assert similarity[0, 1].item() == pytest.approx(1)
    assert similarity.diag().tolist() == pytest.approx([1] * 4)
    assert similarity[2:, :2].max() < 0.95
    torch.testing.assert_close(similarity, similarity.t())


@pytest.mark.parametrize("sharper", [30, 1000, 30_000])
@pytest.mark.parametrize("router", ["smoe", "hyperrouter", "recurrent", "cosine"])
def test_rank_of_a_sharp_router(router, sharper):
    """With two gates that add up to 1 the routing term is g1 g2 (FFN1 - FFN2) (w1 - w2)^T, of rank 1 at every token.

    Of rank 0 at those where one gate is 1 to all digits.
    """
    model, samples = tiny_model(moe_router=router).eval(), [tiny_sample((9, 5)), tiny_sample((7, 7), seed=1)]
    with torch.no_grad():
        for layer in model.decoder.layers:
            for tensor in layer.moe.router.parameters():
                tensor.mul_(sharper)
    for layer in inspect(evaluator(model, samples), 2).layers:
        assert layer["jacobian_rank"] == 1 if sharper == 30 or router == "cosine" else layer["jacobian_rank"] <= 1


def test_what_is_not_finite_has_no_numbers():
    """Of one expert of the upper layer; the routing's numbers stay."""
    model, samples = tiny_model(moe_router="smoe").eval(), [tiny_sample((9, 5))]
    with torch.no_grad():
        model.decoder.layers[1].moe.experts.bias2[3] = torch.inf
        model.decoder.layers[1].moe.experts.weight1[3] = torch.nan
    whole, lost = inspect(evaluator(model, samples), 2).layers
    assert lost["jacobian_span"] is None and lost["output_similarity"][3] == [None] * 4
    assert lost["output_similarity"][0][0] == pytest.approx(1)
    assert None not in [lost["router_entropy"], whole["jacobian_span"], whole["hidden_rank"]]


def test_top_tokens():
    """Of six tokens expert 0 has two, expert 1 four: a third and two thirds of what each symbol would have by chance.

    Expert 0 takes two of three "a", expert 1 both "b" and the one "c": more than its share, of "b" more often.
    """
    dictionary = ["<pad>", "a", "b", "c"]
    token_ids, expert = torch.tensor([1, 1, 1, 2, 2, 3]), torch.tensor([[0], [0], [1], [1], [1], [1]])
    routing = Routing(torch.zeros(6, 2), expert, torch.ones(6, 1))
    first, second = inspection._top_tokens(
        Seen(torch.arange(6), torch.zeros(6, 1), routing, token_ids, None), dictionary
    )
    assert first == [{"token": "a", "count": 2, "share": pytest.approx(2 / 3)}]
    assert second == [{"token": "b", "count": 2, "share": 1}, {"token": "c", "count": 1, "share": 1}]
