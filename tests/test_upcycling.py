"""An upcycled model computes what the dense one computes."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq.models.transformer_lm import TransformerLanguageModel

from fairseq_hyperrouter import UserError, upcycling
from fairseq_hyperrouter.upcycling import check_upcycling, upcycle
from tests.tiny import ADAPTIVE, DECODER_ROUTERS, tiny_model, tiny_sample

GATES_SUM_TO_1 = [name for name in DECODER_ROUTERS if name not in ("switch", "base", "stable", "relu")]


@pytest.fixture(autouse=True)
def plain_files(monkeypatch):
    monkeypatch.setattr(upcycling.checkpoint_utils, "load_checkpoint_to_cpu", torch.load)


def saved_dense(folder, **options):
    """A stock model and its checkpoint, as far as upcycling reads it."""
    model = tiny_model(TransformerLanguageModel, rng_seed=3, **options)
    torch.save({"model": model.state_dict()}, folder / "dense.pt")
    return model.eval(), str(folder / "dense.pt")


@pytest.mark.parametrize("router", GATES_SUM_TO_1)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_same_outputs(tmp_path, router, top_k):
    dense, path = saved_dense(tmp_path)
    sparse = tiny_model(moe_router=router, moe_eval_top_k=top_k, moe_layers="1").eval()
    upcycle(sparse, path)
    tokens = tiny_sample((9, 9))["net_input"]  # experts compute no padding
    torch.testing.assert_close(sparse(**tokens)[0], dense(**tokens)[0], rtol=0, atol=1e-5)


def test_adaptive_inputs_and_adapter(tmp_path):
    dense, path = saved_dense(tmp_path, **ADAPTIVE)
    sparse = tiny_model(moe_adapter_dim=3, **ADAPTIVE).eval()
    upcycle(sparse, path)
    tokens = tiny_sample((9, 9))["net_input"]  # experts compute no padding
    torch.testing.assert_close(sparse(**tokens)[0], dense(**tokens)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decoder_layers": 3}, "has no decoder.layers.2.*, it is of another architecture"),
        ({"decoder_layers": 1}, "has decoder.layers.1.*, which this model lacks"),
        ({"moe_ffn_embed_dim": 5}, "decoder.layers.0.fc1.weight is of another size"),
        ({"moe_layers": "1", "decoder_ffn_embed_dim": 5}, "is of another size"),
    ],
)
def test_another_model(tmp_path, options, message):
    _, path = saved_dense(tmp_path)
    with pytest.raises(UserError, match=f"--moe-upcycle-from .*: .*{message}"):
        upcycle(tiny_model(**options), path)


@pytest.mark.parametrize("dense_ties", [False, True])
def test_tied_embeddings(tmp_path, dense_ties):
    """What is one tensor in the dense model may be two here, not the other way round."""
    dense, path = saved_dense(tmp_path, share_decoder_input_output_embed=dense_ties)
    sparse = tiny_model(share_decoder_input_output_embed=not dense_ties).eval()
    if not dense_ties:
        with pytest.raises(UserError, match=r"embed_tokens.weight and .*output_projection.weight are one tensor here"):
            upcycle(sparse, path)
        return
    upcycle(sparse, path)
    tokens = tiny_sample((9, 9))["net_input"]
    torch.testing.assert_close(sparse(**tokens)[0], dense(**tokens)[0], rtol=0, atol=1e-5)


def test_names_of_older_fairseq(tmp_path):
    """One tensor for queries, keys and values; no output layer beside tied embeddings."""
    dense, path = saved_dense(tmp_path, share_decoder_input_output_embed=True)
    state = dense.state_dict()
    del state["decoder.output_projection.weight"]
    for attention in {name.rpartition(".k_proj")[0] for name in state if ".k_proj" in name}:
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{attention}.{one}_proj.{kind}") for one in "qkv"]
            state[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
    torch.save({"model": state}, path)
    sparse = tiny_model(share_decoder_input_output_embed=True).eval()
    upcycle(sparse, path)
    tokens = tiny_sample((9, 9))["net_input"]
    torch.testing.assert_close(sparse(**tokens)[0], dense(**tokens)[0], rtol=0, atol=1e-5)


def test_mistakes(tmp_path):
    sparse = tiny_model()
    torch.save({"model": sparse.state_dict()}, tmp_path / "sparse.pt")
    with pytest.raises(UserError, match="has experts already"):
        upcycle(sparse, str(tmp_path / "sparse.pt"))
    _, path = saved_dense(tmp_path)
    for options in ({"moe_router": "base"}, {"moe_router": "switch"}, {"moe_gate_softmax": "all"}):
        with pytest.raises(UserError, match="needs gates that sum to 1"):
            upcycle(tiny_model(**options), path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_upcycle_from": "nowhere"}, "--moe-upcycle-from nowhere: no such file"),
        ({"moe_upcycle_from": "."}, "--moe-upcycle-from .: no file"),
        ({"moe_upcycle_from": ""}, "--moe-upcycle-from : no file"),
        ({"moe_layers": "none"}, "--moe-layers none leaves no expert to start from it"),
        ({"moe_shared_experts": 1}, "not together with --moe-shared-experts"),
        ({"finetune_from_model": "x.pt"}, "not together with --finetune-from-model"),
        ({"activation_fn": "gelu"}, r"--activation-fn gelu: --moe-upcycle-from .* was trained with relu, give that"),
        ({"decoder_attention_heads": 4}, r"--decoder-attention-heads 4: .* was trained with 2, give that"),
        ({"decoder_normalize_before": False}, r"--decoder-normalize-before False: .* was trained with True"),
    ],
    ids=str,
)
def test_a_model_that_would_compute_something_else(tmp_path, changes, message):
    """What the shapes of the tensors do not show is in the dense checkpoint's own options."""
    path = tmp_path / "dense.pt"
    options = {"activation_fn": "relu", "decoder_attention_heads": 2, "decoder_normalize_before": True}
    torch.save({"model": {}, "cfg": {"model": {"_name": "transformer_lm", **options}}}, path)
    checkpoint = SimpleNamespace(
        finetune_from_model=changes.pop("finetune_from_model", None),
        restore_file="checkpoint_last.pt",
        save_dir=str(tmp_path / "new"),
        continue_once=None,
    )
    given = {"moe_upcycle_from": str(path), "moe_shared_experts": 0, "moe_layers": None, **options}
    model = SimpleNamespace(**{**given, **changes})
    with pytest.raises(UserError, match=message):
        check_upcycling(SimpleNamespace(model=model, checkpoint=checkpoint))
    checkpoint.finetune_from_model = None
    assert check_upcycling(SimpleNamespace(model=SimpleNamespace(**given), checkpoint=checkpoint))


@pytest.mark.parametrize("holder", ["args", "cfg"])
def test_options_in_a_namespace(tmp_path, holder):
    """As in checkpoints of older fairseq, and of its models without a dataclass."""
    path = tmp_path / "dense.pt"
    model = SimpleNamespace(moe_upcycle_from=str(path), moe_shared_experts=0, moe_layers=None, activation_fn="relu")
    checkpoint = SimpleNamespace(
        finetune_from_model=None, restore_file="checkpoint_last.pt", save_dir=str(tmp_path), continue_once=None
    )
    for options, message in (
        ({"activation_fn": "gelu"}, "--activation-fn relu: .* was trained with gelu"),
        ({"encoder_layers": 2}, "has an encoder, give a language model's checkpoint"),
    ):
        saved = Namespace(arch="transformer", **options)
        torch.save({"model": {}, "args": saved} if holder == "args" else {"model": {}, "cfg": {"model": saved}}, path)
        with pytest.raises(UserError, match=message):
            check_upcycling(SimpleNamespace(model=model, checkpoint=checkpoint))


def test_layers_that_are_one_flat_tensor_each(tmp_path):
    """As fairscale's are, with --ddp-backend fully_sharded, before the model is upcycled."""
    _, path = saved_dense(tmp_path)
    sparse = tiny_model()
    flat = torch.nn.Module()
    flat._fsdp_wrapped_module = sparse.decoder.layers[0]
    sparse.decoder.layers[0] = flat
    with pytest.raises(UserError, match="not with --ddp-backend fully_sharded and --checkpoint-activations"):
        upcycle(sparse, path)
