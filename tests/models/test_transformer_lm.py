from argparse import Namespace

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.transformer_lm import TransformerLanguageModel

from fairseq_hyperrouter import HyperRouterLanguageModel, MoECrossEntropyCriterion, MoELayer, UserError
from fairseq_hyperrouter.criterions.moe_cross_entropy import MoECrossEntropyConfig
from tests.tiny import ADAPTIVE, DECODER_ROUTERS, tiny_dictionary, tiny_model, tiny_sample, tiny_task


def tokens(lengths=(9, 5), seed=0):
    return tiny_sample(lengths, seed)["net_input"]["src_tokens"]


def moe_layers(model):
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def chosen_k(model):
    return [routing.expert_index.size(1) for routing in model(tokens())[1]["routing"]]


def same_as(dense, **options):
    """The MoE model whose experts are all copies of the feed-forwards of *dense*."""
    model = tiny_model(**options)
    state = dense.state_dict()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert all(".moe." in name for name in missing) and all(".fc" in name for name in unexpected)
    for number, layer in enumerate(model.decoder.layers):
        if hasattr(layer, "moe"):
            with torch.no_grad():
                for fc, weight, bias in (("fc1", "weight1", "bias1"), ("fc2", "weight2", "bias2")):
                    name = f"decoder.layers.{number}.{fc}"
                    layer.moe.experts.get_parameter(weight).copy_(state[f"{name}.weight"].t())
                    layer.moe.experts.get_parameter(bias).copy_(state[f"{name}.bias"])
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_layers": "1"},
        {"decoder_normalize_before": True, "activation_fn": "gelu"},
        {"decoder_learned_pos": True, "layernorm_embedding": True, "scale_attn": True, "scale_resids": True},
        {"no_token_positional_embeddings": True, "share_decoder_input_output_embed": True},
        {"tie_adaptive_weights": True, **ADAPTIVE},
    ],
    ids=str,
)
def test_experts_that_are_copies_of_one_feed_forward_compute_what_stock_computes(options):
    dense = tiny_model(TransformerLanguageModel, **options).eval()
    model = same_as(dense, **options)
    batch = tokens((9, 9))
    padded = tokens((9, 5))
    for k in (1, 3):
        with model.at_top_k(k), torch.no_grad():
            (expected, stock), (found, extra) = dense(batch), model(batch)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(extra["inner_states"], stock["inner_states"], rtol=0, atol=1e-5)
            torch.testing.assert_close(extra["attn"], stock["attn"], rtol=0, atol=1e-5)
            counts = padded != tiny_dictionary().pad()
            torch.testing.assert_close(model(padded)[0][counts], dense(padded)[0][counts], rtol=0, atol=1e-5)


def test_norm_former_inside_experts_is_refused():
    """--scale-fc puts a LayerNorm between fc1 and fc2, which experts do not have."""
    with pytest.raises(UserError, match="--scale-fc"):
        tiny_model(scale_fc=True)


@pytest.mark.parametrize("router", DECODER_ROUTERS)
def test_incremental_decoding_equals_the_full_forward(router):
    model = tiny_model(moe_router=router, moe_router_init_std=0.5, moe_shared_experts=1).eval()
    batch, state = tokens((9, 9)), {}
    full = model(batch)[0]
    for step in range(batch.size(1)):
        last = model.decoder(batch[:, : step + 1], incremental_state=state)[0]
        torch.testing.assert_close(last[:, 0], full[:, step])


def test_causal_also_with_a_capacity():
    model = tiny_model(moe_capacity_factor=0.5, moe_top_k=2)
    batch = tokens((9, 9))
    changed = batch.clone()
    changed[:, 6:] = 4 + (batch[:, 6:] - 3) % 12  # the next symbol
    assert not torch.isclose(model(batch)[0], model(changed)[0])[:, 6:].all()
    torch.testing.assert_close(model(batch)[0][:, :6], model(changed)[0][:, :6])


def loss_and_gradients(model, seed=3):
    config = MoECrossEntropyConfig(sentence_avg=False, moe_gate_loss_wt=0.5, moe_z_loss_wt=0.1)
    torch.manual_seed(seed)
    loss, _, logged = MoECrossEntropyCriterion.build_criterion(config, tiny_task())(model, tiny_sample())
    loss.backward()
    return loss, logged, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("router", DECODER_ROUTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_half_precision(router, dtype):
    """A whole step: the loss is about that in float32, and every gradient is a number."""
    options = {"moe_router": router, "moe_router_init_std": 0.5}
    exact, _, _ = loss_and_gradients(tiny_model(**options))
    loss, _, gradients = loss_and_gradients(tiny_model(**options).to(dtype))
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    for name, gradient in gradients.items():
        assert gradient is None or (gradient.dtype == dtype and gradient.isfinite().all()), name


@pytest.mark.parametrize("router", DECODER_ROUTERS)
@pytest.mark.parametrize("options", [{}, {"moe_capacity_factor": 0.5, "dropout": 0.1, "offload_activations": True}])
def test_activation_checkpointing_changes_nothing(router, options):
    # at k = 1 the auxiliary losses are all that gives the router a gradient
    options = {"moe_router": router, "moe_top_k": 1, "moe_router_init_std": 0.5, **options}
    offload = {"offload_activations": options.pop("offload_activations", False)}
    plain = loss_and_gradients(tiny_model(**options))
    checkpointed = loss_and_gradients(tiny_model(checkpoint_activations=True, **offload, **options))
    torch.testing.assert_close(checkpointed, plain)
    routers = [gradient for name, gradient in plain[2].items() if ".router." in name]
    nothing_trained = router in ("smoe-dropout", "hash")
    assert bool(routers) != nothing_trained and any(gradient.any() for gradient in routers) != nothing_trained


def test_layer_drop_leaves_none_in_routing():
    model = tiny_model(decoder_layers=4, decoder_layerdrop=0.5, moe_freq=2)
    torch.manual_seed(0)
    patterns = {tuple(routing is None for routing in model(tokens())[1]["routing"]) for _ in range(40)}
    assert patterns == {(a, b) for a in (False, True) for b in (False, True)}
    model.eval()
    assert None not in model(tokens())[1]["routing"]


@pytest.mark.parametrize(
    "options, expected",
    [({}, [0, 1, 2, 3]), ({"moe_freq": 2}, [1, 3]), ({"moe_layers": "0,1"}, [0, 1]), ({"moe_layers": "2"}, [2])],
)
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_which_layers_have_experts(options, expected, checkpoint_activations):
    model = tiny_model(decoder_layers=4, checkpoint_activations=checkpoint_activations, **options)
    assert [number for number, layer in enumerate(model.decoder.layers) if hasattr(layer, "moe")] == expected
    routings = model(tokens())[1]["routing"]
    assert len(routings) == len(expected)
    for routing in routings:
        assert routing.logits.shape == (18, 4) and routing.expert_index.shape == (18, 2)
        assert torch.equal(routing.token_mask, tokens().t().flatten() != tiny_dictionary().pad())


def test_routing_is_in_the_order_of_the_layers():
    model = tiny_model(decoder_layers=4, moe_freq=2).eval()
    seen = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    routings = model(tokens())[1]["routing"]
    assert all(torch.equal(routing.logits, logits) for routing, logits in zip(routings, seen))


def moe_state(model):
    return {name: value for name, value in model.state_dict().items() if ".router." in name or ".experts." in name}


@pytest.mark.parametrize("router", DECODER_ROUTERS)
def test_the_seed_alone_draws_routers_and_experts(router):
    """Frozen parts too: the same on every worker and whatever the global random generator has given before."""
    one, same, other = (
        moe_state(tiny_model(moe_router=router, seed=seed, rng_seed=rng)) for seed, rng in ((1, 0), (1, 7), (2, 0))
    )
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    drawn = [name for name, value in one.items() if len(value.unique()) > 1]  # the rest starts as a constant
    assert len(drawn) >= 5 and not any(torch.equal(one[name], other[name]) for name in drawn)


def test_no_two_layers_or_experts_start_alike():
    first, second = moe_layers(tiny_model())
    rows = [*first.experts.weight1, *second.experts.weight1]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 8
    assert not torch.equal(first.router.embedding, second.router.embedding)
    assert not torch.equal(first.router.hypernetwork.weight1, second.router.hypernetwork.weight1)


def test_whole_model_is_reproducible():
    one, same = (tiny_model(rng_seed=5).state_dict() for _ in range(2))
    drawn = [name for name in one if not name.endswith("_float_tensor")]  # stock fairseq 0.12.2 never sets it
    assert all(torch.equal(one[name], same[name]) for name in drawn)


@pytest.mark.parametrize("shared", [False, True])
def test_shared_hypernetwork(shared):
    model = tiny_model(decoder_layers=3, moe_hyper_shared=shared)
    routers = [layer.router for layer in moe_layers(model)]
    assert len({id(router.hypernetwork) for router in routers}) == (1 if shared else 3)
    assert len({tuple(router.embedding.tolist()) for router in routers}) == 3


def test_at_top_k_restores():
    model = tiny_model(moe_eval_top_k="2").eval()
    with model.at_top_k(4):
        assert chosen_k(model) == [4, 4]
        with model.at_top_k((1, 3)):
            assert chosen_k(model) == [1, 3]
        assert chosen_k(model) == [4, 4]
    assert chosen_k(model) == [2, 2]
    with pytest.raises(KeyError), model.at_top_k(3):
        raise KeyError
    for options, message in (
        ({"top_k": 5}, "^top_k 5: must be"),
        ({"top_k": (1, 2, 3)}, "^top_k 1,2,3: must be one number, or one for each of the 2 MoE layers"),
        ({"top_k": 1, "top_p": 1.5}, "^top-p 1.5: must be between 0 and 1"),
    ):
        with pytest.raises(UserError, match=message), model.at_top_k(**options):
            pass
    assert chosen_k(model) == [2, 2]


def mean_k(model):
    routings = model(tokens((9, 9)))[1]["routing"]
    return [routing.chosen_mask().sum(1).double().mean().item() for routing in routings]


@pytest.mark.parametrize("own", [{"moe_eval_threshold": 1.0}, {"moe_eval_top_p": 0.0}])
def test_at_top_k_means_exactly_that_k(own):
    """The model's own limit, here to the best expert, holds outside; inside only one that is given."""
    model = tiny_model(**own).eval()
    assert mean_k(model) == [1, 1]
    with model.at_top_k(3):
        assert mean_k(model) == [3, 3]
        with model.at_top_k((2, 4), threshold=1.0):
            assert mean_k(model) == [1, 1]
        with model.at_top_k(4, top_p=0.5):
            assert all(1 < k < 4 for k in mean_k(model))
        assert mean_k(model) == [3, 3]
    assert mean_k(model) == [1, 1]


def test_no_limit_without_probabilities():
    model = tiny_model(moe_router="relu").eval()
    with pytest.raises(UserError, match=r"^top-p 0\.5: relu has no prob"), model.at_top_k(4, top_p=0.5):
        pass


def test_schedule_moves_k_in_training_only():
    model = tiny_model(moe_top_k_schedule="linear", moe_top_k=4, moe_top_k_schedule_updates=30, moe_eval_top_k="2")
    for update, k in ((0, 1), (10, 2), (20, 3), (30, 4), (99, 4)):
        model.set_num_updates(update)
        assert chosen_k(model.train()) == [k, k]
        assert chosen_k(model.eval()) == [2, 2]


def test_elastic_draws_per_layer():
    model = tiny_model(moe_top_k_schedule="elastic", moe_top_k=4, moe_freq=1)
    drawn = []
    for update in range(12):
        model.set_num_updates(update)
        drawn.append(chosen_k(model))
        assert drawn[-1] == [model.decoder.schedule(update, layer) for layer in (0, 1)]
    assert any(a != b for a, b in drawn) and {k for pair in drawn for k in pair} == {1, 2, 4}


@pytest.mark.parametrize("router", DECODER_ROUTERS)
def test_state_dict_round_trip(router):
    options = {"moe_router": router, "moe_router_init_std": 0.5, "moe_shared_experts": 1}
    model, fresh = tiny_model(**options).eval(), tiny_model(seed=2, rng_seed=2, **options).eval()
    assert not torch.equal(model(tokens())[0], fresh(tokens())[0])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens())[0], fresh(tokens())[0])


@pytest.mark.parametrize("option, dim", [({"moe_ffn_embed_dim": 7}, 7), ({}, 12)])
def test_width_of_the_experts(option, dim):
    assert {layer.experts.weight1.shape for layer in moe_layers(tiny_model(**option))} == {(4, 8, dim)}


def test_dropout_of_the_options_reaches_the_experts():
    for options in ({"activation_dropout": 0.3}, {"relu_dropout": 0.3}):
        assert {layer.experts.dropout for layer in moe_layers(tiny_model(**options))} == {0.3}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"moe_top_k": 5}, r"--moe-top-k 5: must be an integer between 1 and the number of experts \(4\)"),
        ({"moe_layers": "2"}, r"--moe-layers 2: layers are numbered 0 to 1"),
        ({"quant_noise_pq": 0.1}, r"--quant-noise-pq 0.1: .*leave it out"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        tiny_model(**options)


@pytest.mark.parametrize("size, layers", [("small", 4), ("medium", 8), ("large", 18)])
def test_sizes_of_the_paper(size, layers):
    architecture = ARCH_CONFIG_REGISTRY[f"transformer_lm_hyperrouter_{size}"]
    args = Namespace()
    architecture(args)
    assert (args.decoder_layers, args.decoder_embed_dim, args.decoder_ffn_embed_dim) == (layers, 256, 512)
    assert (args.moe_expert_count, args.moe_layers) == (16, "0,1,2,3")
    chosen = Namespace(decoder_embed_dim=64, moe_freq=2)
    architecture(chosen)
    assert (chosen.decoder_embed_dim, chosen.decoder_input_dim, chosen.moe_freq) == (64, 64, 2)
    assert not hasattr(chosen, "moe_layers")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"checkpoint_file": "missing.pt"}, "checkpoint .*missing.pt: no such file"),
        ({"checkpoint_file": "text.pt"}, "cannot read checkpoint .*text.pt: truncated, or not a checkpoint"),
        ({"checkpoint_file": "list.pt"}, "cannot read checkpoint .*list.pt: it was not written by fairseq's trainer"),
        ({"checkpoint_file": "module.pt"}, "cannot read checkpoint .*module.pt: it holds objects that are neither"),
        ({"data_name_or_path": "nowhere"}, "DATA nowhere: no such folder"),
        ({"moe_eval_topk": 1}, r"from_pretrained moe_eval_topk: no such option, moe_eval_top_k\?"),
    ],
)
def test_from_pretrained_says_what_is_wrong(tmp_path, arguments, message):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    torch.save({"model": {}, "cfg": {"model": {}}}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=message):
        HyperRouterLanguageModel.from_pretrained(str(tmp_path), **arguments)
