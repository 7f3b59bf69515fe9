"""Ways to train that are no routers, through fairseq's commands."""

import re

import pytest

from tests.commands import eval_arguments, load, train_arguments


def evaluate(preloaded, data, checkpoint, **overrides):
    arguments = eval_arguments(data, checkpoint, *(["--model-overrides", str(overrides)] if overrides else []))
    result = preloaded.run("fairseq-eval-lm", *arguments)
    assert result.code == 0, result.log[-3000:]
    return float(re.search(r"Loss \(base 2\): ([\d.]+)", result.log)[1])


def train(preloaded, data, folder, *options):
    result = preloaded.run("fairseq-train", *train_arguments(data, folder, *options))
    assert result.code == 0, result.log[-3000:]
    return result


@pytest.mark.parametrize("options", [[], ["--moe-layers", "1", "--moe-router", "smoe"]], ids=str)
def test_upcycling(preloaded, data, trained, tmp_path, options):
    """Steps of size 0 leave the dense model's loss, at every k; then it trains, and goes on without the dense file."""
    dense = tmp_path / "dense.pt"
    dense.write_bytes((trained("dense")[0] / "checkpoint_last.pt").read_bytes())
    upcycled = [*options, "--moe-upcycle-from", dense, "--moe-router-init-std", "0.5"]
    still = ["--optimizer", "sgd", "--lr", "0", "--lr-scheduler", "fixed", "--max-update", "1"]
    assert "every expert starts as a copy" in train(preloaded, data, tmp_path / "still", *upcycled, *still).log
    expected = evaluate(preloaded, data, dense)
    for top_k in (1, 8):
        found = evaluate(preloaded, data, tmp_path / "still" / "checkpoint_last.pt", moe_eval_top_k=top_k)
        assert found == pytest.approx(expected, abs=1.1e-4)  # printed with four digits
    train(preloaded, data, tmp_path / "trained", *upcycled, "--max-update", "2")
    dense.unlink()
    resumed = train(preloaded, data, tmp_path / "trained", *upcycled, "--max-update", "4")
    assert [entry["num_updates"] for entry in resumed.logged("train_inner")] == [3, 4]


def test_upcycling_into_divided_experts(preloaded, data, trained, tmp_path):
    dense = trained("dense")[0] / "checkpoint_last.pt"
    options = ["--moe-upcycle-from", dense, "--max-update", "2", "--update-freq"]
    one = train(preloaded, data, None, *options, "2", "--moe-expert-parallel-size", "1")
    arguments = train_arguments(data, None, *options, "1", "--moe-expert-parallel-size", "2")
    assert preloaded.run_workers(2, "fairseq-train", *arguments)[0].losses() == one.losses()


def test_dense_training_and_sparse_inference(preloaded, data, tmp_path):
    """A threshold of 0 leaves all experts, one of 1 the best alone."""
    options = ["--moe-top-k", "8", "--moe-mi-loss-wt", "0.1", "--moe-gate-softmax", "all", "--moe-router", "smoe"]
    train(preloaded, data, tmp_path, *options, "--max-update", "6")
    checkpoint = tmp_path / "checkpoint_last.pt"
    losses = {t: evaluate(preloaded, data, checkpoint, moe_eval_threshold=t) for t in (0.0, 0.12, 1.0)}
    assert losses[0.0] == evaluate(preloaded, data, checkpoint)
    assert losses[1.0] == evaluate(preloaded, data, checkpoint, moe_eval_top_k=1)
    assert len(set(losses.values())) == 3


def test_adapter_and_similarity(preloaded, data, tmp_path):
    options = ["--moe-adapter-dim", "4", "--moe-similarity-wt", "0.1", "--checkpoint-activations"]
    train(preloaded, data, tmp_path, *options, "--max-update", "3")
    model = load(tmp_path / "checkpoint_last.pt")["model"]
    assert model["decoder.layers.0.moe.adapter.up"].any()
    assert evaluate(preloaded, data, tmp_path / "checkpoint_last.pt", moe_eval_top_k=1) < 7


@pytest.mark.parametrize(
    "options, message",
    [
        (["--moe-router", "relu", "--task", "language_modeling"], "--moe-router relu: needs --task hyperrouter"),
        (["--moe-loss-free-rate", "0.1", "--criterion", "cross_entropy"], "needs --criterion moe_cross_entropy"),
        (
            ["--moe-router", "stable", "--moe-top-k", "1", "--criterion", "cross_entropy"],
            "stable: needs --criterion moe",
        ),
        (["--moe-similarity-wt", "0.1", "--criterion", "cross_entropy"], "--moe-similarity-wt 0.1: needs --criterion"),
        (
            ["--moe-router", "stable", "--moe-top-k", "1", "--max-update", "0", "--max-epoch", "1"],
            "--moe-stage1-updates: is required when --max-update is not set",
        ),
        (
            ["--moe-router", "switch", "--moe-gate-softmax", "sigmoid"],
            "--moe-gate-softmax sigmoid: switch has gates of its own",
        ),
        (
            ["--moe-router", "base", "--moe-top-k", "1", "--moe-loss-free-rate", "1"],
            "-rate 1.0: base selects in its own",
        ),
        (["--moe-router-jitter", "1"], "--moe-router-jitter 1.0: must be at least 0 and below 1"),
        (["--moe-loss-free-rate", "-1"], "--moe-loss-free-rate -1.0: must be at least 0"),
        (
            ["--moe-router", "relu", "--moe-distill-wt", "0.5", "--moe-top-k-schedule", "elastic"],
            "--moe-distill-wt 0.5: relu trains with as many experts",
        ),
        (["--moe-distill-wt", "0.5"], "--moe-distill-wt 0.5: with a constant k there is nothing larger to learn from"),
        (["--moe-distill-wt", "2", "--moe-top-k-schedule", "elastic"], "--moe-distill-wt 2.0: must be between 0 and 1"),
        (["--moe-router", "base"], "--moe-top-k 2: base is trained with 1 expert per token"),
        (["--moe-router", "expert-choice"], "--moe-router expert-choice: looks at later tokens"),
        (["--moe-upcycle-from", "nowhere.pt"], "--moe-upcycle-from nowhere.pt: no such file"),
        (["--moe-router", "relu", "--moe-gate-softmax", "all"], "--moe-gate-softmax all: relu has gates of its own"),
        (
            ["--moe-router", "hash", "--moe-eval-threshold", "0.1"],
            "threshold 0.1: hash has no probabilities",
        ),
        (
            ["--moe-router", "cosine", "--moe-router-init-std", "1"],
            "init-std 1.0: means nothing to cosine",
        ),
        (["--moe-stage1-updates", "5"], "--moe-stage1-updates 5: means nothing to hyperrouter"),
        (["--moe-similarity-wt", "1", "--moe-top-k", "1"], "--moe-similarity-wt 1.0: with --moe-top-k 1"),
        (["--moe-eval-threshold", "2"], "--moe-eval-threshold 2.0: must be between 0 and 1"),
        (["--moe-router-loss-wt", "-1", "--moe-router", "relu"], "--moe-router-loss-wt -1.0: must be at least 0"),
        (["--moe-router-dim", "0", "--moe-router", "cosine"], "--moe-router-dim 0: must be at least 1"),
        (["--moe-compete-version", "v3", "--moe-router", "compete"], "--moe-compete-version 'v3': choose from v2, v1"),
        (["--moe-balance-batch", "all"], "--moe-balance-batch 'all': choose from local, global"),
        (["--moe-backend", "triton"], "--moe-backend triton: needs"),
        (["--moe-top-k-schedule-updates", "9", "--moe-top-k-schedule", "elastic"], "9: means nothing to elastic"),
        (["--moe-balance-batch", "global"], "--moe-balance-batch global: means nothing without --moe-gate-loss-wt or"),
        (["--moe-top-k-schedule-updates", "9"], "--moe-top-k-schedule-updates 9: means nothing to constant"),
        (["--moe-router", "cosine", "--moe-router-lr-scale", "2"], "lr-scale 2.0: means nothing to cosine"),
        (["--moe-router", "compete", "--moe-gate-softmax", "all"], "softmax all: compete has gates of its own"),
    ],
)
def test_mistakes(preloaded, data, options, message):
    result = preloaded.run("fairseq-train", *train_arguments(data, None, "--max-update", "1", *options))
    assert result.code == 1 and message in result.last_line, result.log[-2000:]
    assert "Traceback" not in result.log
