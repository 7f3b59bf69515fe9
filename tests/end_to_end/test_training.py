"""fairseq-train learns with every router, and what must stay frozen does."""

import math

import pytest
import torch
from fairseq import tasks, utils
from omegaconf import OmegaConf

import fairseq_hyperrouter  # noqa: F401  (registers the task and the architecture)
from tests.commands import EXPERTS, evaluate, load, train

ROUTERS = ("hyperrouter", "smoe", "smoe-dropout")
FROZEN = {"hyperrouter": ("hypernetwork.", "scale"), "smoe": (), "smoe-dropout": ("weight", "bias")}


def untrained(state):
    """The model of a checkpoint as it was at its start."""
    cfg = OmegaConf.create(state["cfg"])
    task = tasks.setup_task(cfg.task)
    utils.set_torch_seed(cfg.common.seed)
    return task.build_model(cfg.model, from_checkpoint=True).state_dict()


@pytest.mark.parametrize("router", ROUTERS)
def test_trains_and_leaves_the_frozen_parts_alone(trained, router):
    folder, losses = trained(router)
    assert len(losses) == 30
    assert sum(losses[-5:]) / 5 < losses[0] - 1, losses

    state = load(folder / "checkpoint_last.pt")
    before, after = untrained(state), state["model"]
    assert before.keys() == after.keys()
    of_routers = {name: name.partition(".moe.router.")[2] for name in after if ".moe.router." in name}
    assert len(of_routers) == 2 * {"hyperrouter": 6, "smoe": 2, "smoe-dropout": 2}[router]
    for name, part in of_routers.items():
        unchanged = torch.equal(before[name], after[name])
        assert unchanged == part.startswith(FROZEN[router]) if FROZEN[router] else not unchanged, name
    for name in after:
        if ".moe.experts." in name:  # each expert of each layer learned
            assert not any(torch.equal(b, a) for b, a in zip(before[name], after[name])), name


@pytest.mark.parametrize("size", ["", "_small"])
def test_what_a_checkpoint_says(tmp_path, data, size):
    """By what its router's numbers are divided, whatever the default; no backend, which is the machine's."""
    options = [
        "--arch",
        f"transformer_lm_hyperrouter{size}",
        "--moe-top-k-schedule",
        "elastic",
        "--moe-backend",
        "loop",
    ]
    result = train(data, tmp_path, *options, "--max-update", "1")
    assert "computed by the backend loop" in result.log
    saved = load(tmp_path / "checkpoint_last.pt")["cfg"]["model"]
    assert saved["moe_router_lr_scale"] == 10 and saved["moe_backend"] == "auto"


def test_validation_at_several_k(tmp_path, data):
    """--valid-top-k, its metrics, --best-checkpoint-metric, epochs and gradient accumulation in one run."""
    options = ["--max-epoch", "1", "--update-freq", "2", "--validate-interval-updates", "8", "--valid-top-k", "1,2,8"]
    options += ["--best-checkpoint-metric", "ppl_k1", "--moe-top-k-schedule", "elastic", "--moe-top-k", "8"]
    # Stock fairseq drops the last samples of a validation, those beyond a multiple of 8, unless it is told not to.
    arguments = [*options, "--moe-eval-top-k", "2", "--lr", "0.03", "--required-batch-size-multiple", "1"]
    arguments += ["--save-interval-updates", "8", "--no-epoch-checkpoints"]
    result = train(data, tmp_path, *arguments, batch_size=16, validate=True)

    updates = result.logged("train_inner")
    assert len(updates) == 27  # 52,000 tokens in samples of 64, 32 of them per update
    assert all(1 <= entry["moe_top_k"] <= EXPERTS for entry in updates)
    assert len({entry["moe_top_k"] for entry in updates}) > 3

    validations = result.logged("valid")
    assert len(validations) >= 4
    for entry in validations:
        assert entry["valid_loss_k2"] == pytest.approx(entry["valid_loss"], abs=1e-3)
        for suffix in ("", "_k1", "_k2", "_k8"):
            loss = entry[f"valid_loss{suffix}"]
            assert entry[f"valid_bpc{suffix}"] == pytest.approx(loss, abs=6e-4)  # a token is a character
            rounding = 2**loss * math.log(2) * 5e-4 + 5e-3  # of a loss of three digits, and of a perplexity of two
            assert entry[f"valid_ppl{suffix}"] == pytest.approx(2**loss, abs=1.01 * rounding)
    assert all(entry["bpc"] == pytest.approx(entry["loss"], abs=6e-4) for entry in updates)

    best = min(entry["valid_ppl_k1"] for entry in validations)
    assert load(tmp_path / "checkpoint_best.pt")["extra_state"]["val_loss"] == pytest.approx(best, abs=6e-3)
    last = validations[-1]
    assert last["valid_loss_k1"] != last["valid_loss_k8"]
    for top_k in (1, 8):
        found = evaluate(data, tmp_path / "checkpoint_last.pt", top_k, "valid")
        assert found["loss"] == pytest.approx(last[f"valid_loss_k{top_k}"], abs=6e-4)
        assert found["perplexity"] == pytest.approx(last[f"valid_ppl_k{top_k}"], abs=0.011)
        assert math.isclose(found["loss"], math.log2(found["perplexity"]), abs_tol=2e-3)
