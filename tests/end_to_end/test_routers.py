"""Every routing method through fairseq-train, fairseq-eval-lm and a resume."""

import re

import pytest

from fairseq_hyperrouter.routing import ROUTERS
from tests.commands import differing_tensors, eval_arguments, load, train_arguments
from tests.tiny import DECODER_ROUTERS

OPTIONS = {
    "switch": ["--moe-capacity-factor", "1.25", "--moe-router-jitter", "0.01", "--moe-gate-loss-wt", "0.01"],
    "stable": ["--moe-stage1-updates", "2"],
    "compete": ["--moe-compete-rate", "0.9"],
    "relu": ["--moe-router-loss-wt", "0.01"],
    "smoe": ["--moe-loss-free-rate", "0.01", "--moe-gate-softmax", "sigmoid"],
}
COMMON = ["--update-freq", "2", "--checkpoint-activations", "--sample-break-mode", "eos", "--max-tokens", "512"]


def options(router):
    top_k = ["--moe-top-k", ROUTERS[router].trains_with or 2]
    return ["--moe-router", router, *top_k, *COMMON, *OPTIONS.get(router, [])]


@pytest.mark.parametrize("router", DECODER_ROUTERS)
def test_train_resume_and_evaluate(preloaded, data, tmp_path, router):
    """With padding, micro-batches and activation checkpointing; a resume is bit for bit; any k at inference."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder, updates in ((whole, 4), (halves, 2), (halves, 4)):
        arguments = train_arguments(data, folder, *options(router), "--max-update", updates)
        result = preloaded.run("fairseq-train", *arguments)
        assert result.code == 0, result.log[-3000:]
    assert "Loaded checkpoint" in result.log
    states = [load(folder / "checkpoint_last.pt") for folder in (whole, halves)]
    for part in ("model", "last_optimizer_state"):
        assert not differing_tensors(*(state[part] for state in states))
    found = {}
    for top_k in (1, 8):
        overrides = ["--model-overrides", f"{{'moe_eval_top_k': {top_k}}}"]
        result = preloaded.run("fairseq-eval-lm", *eval_arguments(data, whole / "checkpoint_last.pt", *overrides))
        assert result.code == 0, result.log[-3000:]
        found[top_k] = float(re.search(r"Loss \(base 2\): ([\d.]+)", result.log)[1])
    assert 4 < min(found.values()) <= max(found.values()) < 7
    assert found[1] != found[8]


@pytest.mark.parametrize("router", [name for name in DECODER_ROUTERS if name not in ("smoe-dropout", "hyperrouter")])
def test_two_workers_with_divided_experts(preloaded, data, tmp_path, router):
    """Replicated or divided, the same losses and gradient norms.

    base with one sample at a time: the first tokens of several score alike, and rounding would decide between them.
    """
    one_sample = ["--batch-size", "1"] if router == "base" else []
    logged = []
    for size in (1, 2):
        arguments = train_arguments(data, None, *options(router), *one_sample, "--max-update", "2")
        results = preloaded.run_workers(2, "fairseq-train", *arguments, "--moe-expert-parallel-size", size)
        logged.append([(entry["loss"], entry["gnorm"]) for entry in results[0].logged("train_inner")])
    assert len(logged[0]) == 2 and logged[0] == logged[1]
