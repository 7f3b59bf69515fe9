"""What stock transformer_lm and its commands offer works with experts too."""

import json
import math
import os
import re
import shutil
import struct

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from fairseq_hyperrouter import HyperRouterLanguageModel
from tests.commands import (
    CRITERION,
    EXPERTS,
    LOG,
    MODEL,
    ON_CPU,
    OPTIMIZER,
    SAMPLE,
    TASK,
    USER_DIR,
    evaluate,
    hydra_arguments,
    load,
    loss_of,
    run,
    train,
    train_arguments,
)

AUXILIARY = ["--moe-gate-loss-wt", "0.01", "--moe-z-loss-wt", "0.001"]
ADAPTIVE = [
    *("--adaptive-input", "--adaptive-input-cutoff", "20,40", "--adaptive-input-factor", "2"),
    *("--adaptive-softmax-cutoff", "20,40", "--adaptive-softmax-factor", "2"),
    *("--tie-adaptive-weights", "--tie-adaptive-proj"),
]
CHARACTERS = ["--character-embeddings", "--character-embedding-dim", "4", "--character-filters", "[(1, 8), (2, 8)]"]


def updates_of(preloaded, data, *options, updates=3):
    """Train without saving; what was logged at each update."""
    arguments = train_arguments(data, None, *options, "--max-update", updates)
    result = preloaded.run("fairseq-train", *arguments)
    assert result.code == 0, result.log[-6000:]
    entries = result.logged("train_inner")
    assert [entry["num_updates"] for entry in entries] == list(range(1, updates + 1))
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    return entries


def losses_of(preloaded, data, *options):
    return [entry["loss"] for entry in updates_of(preloaded, data, *options)]


@pytest.mark.parametrize(
    "options",
    [
        ["--share-decoder-input-output-embed", *AUXILIARY],
        [*CHARACTERS, *AUXILIARY],
        ["--decoder-layerdrop", "0.5", *AUXILIARY],
    ],
    ids=["share-embeddings", "character-embeddings", "layerdrop"],
)
def test_model_options(preloaded, data, options):
    entries = updates_of(preloaded, data, *options, updates=12)
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.5
    top_k = [entry.get("moe_top_k") for entry in entries]  # nothing where LayerDrop left all layers out
    assert set(top_k) == ({2, None} if "--decoder-layerdrop" in options else {2})


def test_adaptive_softmax(preloaded, tmp_path, data):
    """Our loss is that of fairseq-eval-lm, auxiliary losses or not.

    Stock adaptive_loss trains our model too; it logs less, because it leaves a token out of every tail.
    """
    arguments = [*ADAPTIVE, *AUXILIARY, "--max-update", "4", "--required-batch-size-multiple", "1"]
    result = train(data, tmp_path, *arguments, validate=True)
    losses = result.losses()
    assert losses[-1] < losses[0]
    found = evaluate(data, tmp_path / "checkpoint_last.pt", split="valid")
    assert found["loss"] == pytest.approx(result.logged("valid")[-1]["valid_loss"], abs=6e-4)
    stock = losses_of(preloaded, data, *ADAPTIVE, "--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp")
    assert losses[0] - 0.5 < stock[0] < losses[0] and stock[-1] < stock[0]


def test_stock_task_and_criterion(data, trained):
    options = ["--task", "language_modeling", *SAMPLE, *MODEL, "--criterion", "cross_entropy", *OPTIMIZER, *LOG]
    arguments = [data, "--user-dir", USER_DIR, *options, *ON_CPU, "--batch-size", "8", "--no-save"]
    result = run("fairseq-train", *arguments, "--disable-validation", "--max-update", "3")
    assert result.losses() == pytest.approx(trained("hyperrouter")[1][:3], abs=2e-3)


def test_checkpoint_activations_changes_nothing(tmp_path, data):
    final = []
    for name, options in (("plain", []), ("checkpointed", ["--checkpoint-activations"])):
        entries = train(data, tmp_path / name, *AUXILIARY, "--dropout", "0.1", "--max-update", "4", *options)
        final.append((load(tmp_path / name / "checkpoint_last.pt")["model"], entries.logged("train_inner")))
    (plain, plain_log), (checkpointed, checkpointed_log) = final
    for first, second in zip(plain_log, checkpointed_log):
        for name in ("loss", "gnorm", "moe_balance_loss", "moe_router_entropy"):
            assert first[name] == pytest.approx(second[name], abs=2e-3)
    assert plain.keys() == checkpointed.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(weight, checkpointed[name], rtol=1e-4, atol=1e-5, msg=name)


# Stock --fp16 flattens gradients with calls that need CUDA, and so does its way out of an overflow (a large
# --fp16-init-scale); these run on a CPU. --amp casts on CUDA only and must at least not be in the way.
@pytest.mark.parametrize(
    "options",
    [["--bf16"], ["--fp16", "--fp16-no-flatten-grads"], ["--memory-efficient-fp16"], ["--amp"]],
    ids=["bf16", "fp16", "memory-efficient-fp16", "amp"],
)
def test_precision(preloaded, data, trained, options):
    expected = trained("hyperrouter")[1][:3]
    assert losses_of(preloaded, data, *options) == pytest.approx(expected, abs=0.05)


def test_paper_size(data):
    arguments = [data, "--user-dir", USER_DIR, "--arch", "transformer_lm_hyperrouter_small", *TASK, *CRITERION]
    arguments += [*OPTIMIZER, *LOG, *ON_CPU, "--batch-size", "1", "--no-save", "--disable-validation"]
    result = run("fairseq-train", *arguments, "--max-update", "1")
    assert len(result.losses()) == 1
    assert "in training constant 2, at inference 2 of 16" in result.log
    assert "(0-3): 4 x MoEDecoderLayer" in result.log
    assert "num_experts=16, 256 -> 512 -> 256" in result.log


@pytest.fixture(scope="session")
def deep(once, data):
    """Four layers, every second one with experts: capacity, shared experts and a shared hypernetwork."""

    def make(folder):
        options = ["--decoder-layers", "4", "--moe-freq", "2", "--moe-shared-experts", "1", "--moe-hyper-shared"]
        options += ["--moe-capacity-factor", "0.5", "--max-update", "10"]
        return train(data, folder, *options, *AUXILIARY).logged("train_inner")

    return once("deep", make)


def test_moe_options(data, deep):
    folder, entries = deep
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert all(0.4 < entry["moe_dropped"] < 1 for entry in entries)  # half the places that are needed
    model = load(folder / "checkpoint_last.pt")["model"]
    assert {name.split(".")[2] for name in model if ".moe." in name} == {"1", "3"}
    first, second = (model[f"decoder.layers.{n}.moe.router.hypernetwork.weight2"] for n in (1, 3))
    assert torch.equal(first, second)
    assert model["decoder.layers.1.moe.shared_experts.fc1.weight"].shape == (64, 32)
    assert model["decoder.layers.1.moe.experts.weight1"].shape == (EXPERTS, 32, 64)
    assert evaluate(data, folder / "checkpoint_last.pt")["loss"] < entries[0]["loss"]


@pytest.mark.parametrize("keep", ["0,1", "0,2", "1,3", "2,3"])
def test_layers_to_keep(data, deep, keep):
    """Pruning at evaluation takes the layers that were asked for, those with experts with theirs."""
    checkpoint = deep[0] / "checkpoint_last.pt"
    found = evaluate(data, checkpoint, options=["--model-overrides", f"{{'decoder_layers_to_keep': '{keep}'}}"])
    hub = HyperRouterLanguageModel.from_pretrained(
        str(checkpoint.parent), checkpoint_file=checkpoint.name, data_name_or_path=str(data)
    )
    decoder = hub.models[0].decoder.eval()
    kept = set(map(int, keep.split(",")))
    for number, layer in enumerate(decoder.layers):
        if number not in kept:  # the residual stream passes by
            layer.forward = passing_by(decoder, layer)
    assert found["loss"] == pytest.approx(loss_of(hub.models[0], hub.task), abs=1e-4)


def passing_by(decoder, layer):
    if not hasattr(layer, "moe_index"):
        return lambda x, *_, **__: (x, None, None)
    forward = layer.forward

    def pass_by(x, *args, **kwargs):
        _, *rest = forward(x, *args, **kwargs)
        return (x, *rest)

    return pass_by


def test_layers_to_keep_of_a_list(tmp_path, data):
    """--moe-layers, as the paper's sizes have it."""
    options = ["--decoder-layers", "3", "--moe-layers", "0,2", "--max-update", "1"]
    train(data, tmp_path, *options)
    overrides = ["--model-overrides", "{'decoder_layers_to_keep': '0,2'}"]
    assert evaluate(data, tmp_path / "checkpoint_last.pt", options=overrides)["loss"] > 0


def inference_arguments(data, checkpoint, *options):
    return [data, "--user-dir", USER_DIR, *TASK, "--path", checkpoint, *ON_CPU, *options]


def test_validate(data, trained, evaluated):
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    options = ["--valid-subset", "test", "--batch-size", "4", "--required-batch-size-multiple", "1"]
    log = run("fairseq-validate", *inference_arguments(data, checkpoint, *options, "--valid-top-k", "1,5")).log
    for suffix, top_k in (("", None), ("_k1", 1), ("_k5", 5)):
        (loss,) = re.findall(rf"\| loss{suffix} ([\d.]+)", log)
        assert float(loss) == pytest.approx(evaluated("hyperrouter", top_k)["loss"], abs=6e-4)


def test_generate(data, trained):
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    options = ["--gen-subset", "valid", "--sample-break-mode", "eos", "--batch-size", "4", "--beam", "2"]
    options += ["--max-len-b", "60", "--no-progress-bar", "--skip-invalid-size-inputs-valid-test"]
    out = run("fairseq-generate", *inference_arguments(data, checkpoint, *options)).out
    sources = dict(re.findall(r"^S-(\d+)\t(.*)$", out, re.MULTILINE))
    hypotheses = dict(re.findall(r"^H-(\d+)\t-[\d.]+\t(.*)$", out, re.MULTILINE))
    assert len(sources) > 50 and sources.keys() == hypotheses.keys()
    assert all(hypotheses[key].startswith(sources[key]) for key in sources)  # each goes on where its prefix ends


def test_interactive(data, trained):
    checkpoint = trained("smoe")[0] / "checkpoint_last.pt"
    options = ["--sampling", "--sampling-topk", "5", "--beam", "1", "--nbest", "1", "--max-len-b", "20", "--seed", "3"]
    text = "F i r s t\nK I N G\n"
    result = run("fairseq-interactive", *inference_arguments(data, checkpoint, *options), stdin=text)
    hypotheses = re.findall(r"^H-\d+\t-[\d.]+\t(.*)$", result.out, re.MULTILINE)
    assert [h.startswith(line) and len(h) > len(line) for h, line in zip(hypotheses, text.splitlines())] == [True] * 2


def test_hub(data, trained):
    """from_pretrained, .score and .generate; generating, token by token, is what scoring the result says."""
    hub = HyperRouterLanguageModel.from_pretrained(
        str(trained("hyperrouter")[0]),
        checkpoint_file="checkpoint_last.pt",
        data_name_or_path=str(data),
        moe_eval_top_k=1,
    ).eval()
    assert hub.models[0].decoder.eval_top_k == (1, 1)
    prefix = hub.encode("F i r s t \u2581 C i")[:-1]
    (generated,) = hub.generate(prefix, beam=1, max_len_b=30)
    tokens = generated["tokens"]
    assert torch.equal(tokens[: len(prefix)], prefix) and len(tokens) > len(prefix)

    text = hub.decode(tokens)
    scored = hub.score(text)
    n = len(hub.encode(text)) - 1
    torch.testing.assert_close(scored["positional_scores"][:n], generated["positional_scores"][:n], atol=1e-4, rtol=0)
    with hub.models[0].at_top_k(EXPERTS):
        assert not torch.allclose(hub.score(text)["positional_scores"], scored["positional_scores"], atol=1e-4)


def test_hydra_train(tmp_path, data):
    """The example's configuration, made small, trains; its checkpoint is evaluated like any other."""
    result = run("fairseq-hydra-train", *hydra_arguments(data, **{"hydra.run.dir": tmp_path}), cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"\[train_inner\].* loss=([\d.]+)", result.log)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "loss_k1 " in result.log
    (checkpoint,) = tmp_path.rglob("checkpoint_last.pt")
    assert load(checkpoint)["cfg"]["model"]["_name"] == "transformer_lm_hyperrouter"
    assert evaluate(data, checkpoint, 1)["loss"] < 10


def test_plugin_from_elsewhere(tmp_path, data):
    """--user-dir may be a copy of the folder, seen from another working directory."""
    copy = tmp_path / "fairseq_hyperrouter"
    shutil.copytree(USER_DIR, copy, ignore=shutil.ignore_patterns("__pycache__"))
    arguments = [data, "--user-dir", "fairseq_hyperrouter", *TASK, *MODEL, *CRITERION, *OPTIMIZER, *LOG, *ON_CPU]
    arguments += ["--batch-size", "8", "--no-save", "--disable-validation", "--max-update", "1"]
    assert len(run("fairseq-train", *arguments, cwd=tmp_path).losses()) == 1


def events(folder):
    """{name: {step: value}} of a folder that TensorBoard reads: records of length, checksum, bytes, checksum."""
    found = {}
    for file in folder.glob("events*"):
        content = file.read_bytes()
        while content:
            length = struct.unpack("<Q", content[:8])[0]
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_layers_of_a_training_that_diverges(data, tmp_path):
    """It ends, and is saved, as without the option."""
    options = ["--moe-log-layers", "--optimizer", "sgd", "--clip-norm", "0", "--lr", "1e8", "--max-update", 1]
    logged = train(data, tmp_path, *options, validate=True).logged("valid")[-1]
    assert "valid_moe_hidden_rank_layer1" not in logged
    assert (tmp_path / "checkpoint_last.pt").exists()


def test_tensorboard_shows_every_layer(data, tmp_path):
    options = ["--moe-log-layers", "--tensorboard-logdir", tmp_path, "--max-update", 2]
    logged = train(data, None, *options, validate=True).logged("train_inner")
    drawn = events(tmp_path / "train_inner")
    names = "router_entropy", "load_imbalance", "load_cv", "load_expert7", "margin", "inner_balance"
    for name in map("moe_{}".format, names):
        for layer in (0, 1):
            values = drawn[f"{name}_layer{layer}"]
            assert [entry[f"{name}_layer{layer}"] for entry in logged] == pytest.approx([values[1], values[2]])
    assert drawn["moe_router_entropy_layer0"] != drawn["moe_router_entropy_layer1"]
    drawn = events(tmp_path / "valid")
    assert {"moe_margin_layer1", "moe_jacobian_rank_layer1", "moe_mean_output_similarity_layer1"} <= set(drawn)


WANDB = """
import json, os

class config:
    update = staticmethod(lambda _: None)

def init(project, **_):
    assert project == "mine"

def log(values, step):
    with open(os.environ["LOGGED"], "a") as file:
        print(json.dumps([step, values]), file=file)
"""


def test_weights_and_biases_get_every_layer(data, tmp_path, monkeypatch):
    """What fairseq's own logger hands to the package wandb, of which this is all that it uses."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("LOGGED", str(tmp_path / "logged"))
    options = ["--moe-log-layers", "--wandb-project", "mine", "--max-update", 2]
    train(data, None, *options, validate=True)
    logged = [json.loads(line) for line in (tmp_path / "logged").read_text().splitlines()]
    steps = {name: step for step, values in logged for name in values}
    for name in ("moe_router_entropy", "moe_load_cv", "moe_load_expert7", "moe_margin"):
        assert steps[f"train_inner/{name}_layer1"] == 2
    assert {"valid/moe_jacobian_rank_layer0", "valid/moe_mean_output_similarity_layer1"} <= set(steps)
