"""Several workers compute what one computes, with experts on every worker or divided over them."""

import re
import shutil

import pytest
import torch
from fairseq import checkpoint_utils

import fairseq_hyperrouter  # noqa: F401  (registers the architecture)
from tests.commands import eval_arguments, load, loss_of, train_arguments

SGD = ["--optimizer", "sgd", "--lr", "0.5", "--lr-scheduler", "fixed", "--clip-norm", "0.5"]
SGD += ["--activation-fn", "gelu"]  # of a ReLU whose input is nearly 0, rounding decides the gradient
ELASTIC = ["--moe-top-k-schedule", "elastic", "--moe-top-k", "8", "--moe-top-k-choices", "1,2,3,4,5,6,7,8"]
ELASTIC += ["--moe-gate-loss-wt", "0.01"]
GLOBAL_BATCH = 4
"""Micro-batches per update, over all workers."""


def train(preloaded, workers, data, folder, *options, size=1):
    """fairseq-train with the same global batch whatever the number of workers; worker 0's log."""
    options = [*options, "--update-freq", GLOBAL_BATCH // workers, "--moe-expert-parallel-size", size]
    arguments = train_arguments(data, folder, *options, batch_size=4)
    return preloaded.run_workers(workers, "fairseq-train", *arguments)[0]


def assert_same_model(found, expected, rtol):
    """Every parameter, relative to its largest entry."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        error = (found[name] - weight).abs().max() / weight.abs().max().clamp(min=1e-3)
        assert found[name].shape == weight.shape and error <= rtol, (name, error.item())


@pytest.fixture(scope="module")
def one_worker(preloaded, data, tmp_path_factory):
    """The checkpoint of one process after 4 updates of SGD."""
    folder = tmp_path_factory.mktemp("one")
    train(preloaded, 1, data, folder, *SGD, *ELASTIC, "--max-update", "4")
    return load(folder / "checkpoint_last.pt")["model"]


@pytest.mark.parametrize("workers, size", [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_workers_equal_one(preloaded, data, tmp_path, one_worker, workers, size):
    """k is drawn from 1 to E in every layer and update; the balance loss and the gradient norm are in it."""
    log = train(preloaded, workers, data, tmp_path, *SGD, *ELASTIC, "--max-update", "4", size=size).log
    assert f"training on {workers} devices" in log
    assert_same_model(load(tmp_path / "checkpoint_last.pt")["model"], one_worker, rtol=1e-6)


@pytest.mark.parametrize("options", [["--checkpoint-activations"], ["--moe-capacity-factor", "1.0"]], ids=str)
def test_other_options_with_divided_experts(preloaded, data, tmp_path, options):
    """Against replicated experts. A capacity is that of each worker's own micro-batch either way."""
    for size in (1, 2):
        train(preloaded, 2, data, tmp_path / str(size), *SGD, *options, "--max-update", "2", size=size)
    found, expected = (load(tmp_path / size / "checkpoint_last.pt")["model"] for size in ("2", "1"))
    assert_same_model(found, expected, rtol=1e-6)


ADAM = ["--moe-router", "smoe", "--save-interval-updates", "3", "--keep-interval-updates", "1"]
WORKERS = {1: 1, 2: 2, 4: 2}
"""Number of workers: how many the experts are divided over."""


@pytest.fixture(scope="module")
def saved(preloaded, data, tmp_path_factory):
    """Folders with a checkpoint of Adam after 3 updates, by the number of workers that made it."""
    folders = {workers: tmp_path_factory.mktemp(f"saved{workers}") for workers in WORKERS}
    for workers, folder in folders.items():
        train(preloaded, workers, data, folder, *ADAM, "--max-update", "3", size=WORKERS[workers])
    return folders


def moments(checkpoint):
    state = checkpoint["last_optimizer_state"]["state"]
    return {f"{number} {name}": state[number][name] for number in state for name in ("exp_avg", "exp_avg_sq")}


def assert_same_training(found, expected):
    """Weights and moments, but for attention's key biases: they change nothing, their gradient is rounding alone."""
    without = [{n: t for n, t in state["model"].items() if "k_proj.bias" not in n} for state in (found, expected)]
    assert_same_model(*without, rtol=1e-3)
    assert moments(found).keys() == moments(expected).keys()
    for name, moment in moments(expected).items():
        if moment.abs().max() > 1e-6:
            torch.testing.assert_close(moments(found)[name], moment, rtol=1e-3, atol=1e-3 * moment.abs().max())


def test_the_checkpoint_is_that_of_one_process(saved):
    expected = load(saved[1] / "checkpoint_last.pt")
    for workers in (2, 4):
        assert_same_training(load(saved[workers] / "checkpoint_last.pt"), expected)


def evaluation_loss(checkpoint):
    """Of one process, in bits, in full precision."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    return loss_of(model.eval(), task)


@pytest.fixture(scope="module")
def uninterrupted(preloaded, data, tmp_path_factory):
    """The checkpoint of one process after 6 updates of Adam."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(preloaded, 1, data, folder, *ADAM, "--max-update", "6")
    return folder / "checkpoint_last.pt"


@pytest.mark.parametrize("after", WORKERS)
@pytest.mark.parametrize("before", WORKERS)
def test_resume_at_any_number_of_workers(preloaded, data, tmp_path, saved, uninterrupted, before, after):
    """With the moments, and with the next batches: all goes on as in one process that was not interrupted."""
    folder = tmp_path / "resumed"
    shutil.copytree(saved[before], folder)
    log = train(preloaded, after, data, folder, *ADAM, "--max-update", "6", size=WORKERS[after]).log
    assert "Loaded checkpoint" in log and "@ 3 updates" in log
    assert_same_training(load(folder / "checkpoint_last.pt"), load(uninterrupted))
    assert abs(evaluation_loss(folder / "checkpoint_last.pt") - evaluation_loss(uninterrupted)) < 1e-5


@pytest.mark.parametrize("before, after", [(1, 4), (2, 1), (4, 2)])
def test_moments_are_loaded_bit_for_bit(preloaded, data, tmp_path, saved, before, after):
    """An update whose betas are 1 up to rounding leaves them as they were saved."""
    folder = tmp_path / "resumed"
    shutil.copytree(saved[before], folder)
    still = ["--optimizer-overrides", f"{{'betas': ({1 - 2**-53!r}, {1 - 2**-53!r})}}", "--max-update", "4"]
    train(preloaded, after, data, folder, *ADAM, *still, size=WORKERS[after])
    found, expected = (load(place / "checkpoint_last.pt") for place in (folder, saved[before]))
    assert found["optimizer_history"][-1]["num_updates"] == 4
    assert moments(found).keys() == moments(expected).keys()
    for name, moment in moments(expected).items():
        is_large = moment.abs() > 1e-6  # beside which a gradient times 2 ** -53 is nothing
        assert torch.equal(moments(found)[name][is_large], moment[is_large]), name


def test_validation_inside_a_training(preloaded, data, tmp_path):
    """The split has 52 samples; two workers get 7 and 6 batches of it, and log what one logs."""
    logged = {}
    for workers in (1, 2):
        options = [*SGD, "--update-freq", 2 // workers, "--max-update", "2", "--valid-top-k", "1,8", "--moe-log-layers"]
        options += ["--moe-expert-parallel-size", workers, "--required-batch-size-multiple", "1"]
        arguments = train_arguments(data, None, *options, batch_size=4, validate=True)
        logged[workers] = preloaded.run_workers(workers, "fairseq-train", *arguments)[0].logged("valid")[-1]
    names = [name for name in logged[1] if re.search(r"_loss|_ppl|_bpc|_entropy", name) and "layer" not in name]
    similarity = [name for name in logged[1] if "weight_similarity" in name]
    assert len(similarity) == 2 and all(logged[2][name] == logged[1][name] for name in similarity)
    assert {"valid_loss", "valid_loss_k1", "valid_bpc_k8", "valid_moe_router_entropy"} <= set(names)
    assert {name: logged[2][name] for name in names} == {name: logged[1][name] for name in names}


def test_every_worker_evaluates_the_whole_set(preloaded, data, saved):
    """fairseq-eval-lm adds up nothing over workers. A checkpoint of divided experts is whole in every process."""
    losses = set()
    for workers in (1, 3):
        arguments = eval_arguments(data, saved[4] / "checkpoint_last.pt", "--model-overrides", "{'moe_eval_top_k': 1}")
        result = preloaded.run_workers(workers, "fairseq-eval-lm", *arguments)[0]
        losses.add(re.search(r"Loss \(base 2\): [\d.]+, Perplexity: [\d.]+", result.log)[0])
    assert "every worker evaluates the whole set" in result.log
    assert len(losses) == 1


@pytest.mark.parametrize("balance", ["local", "global"])
def test_the_end_of_an_epoch_that_does_not_divide_evenly(preloaded, data, tmp_path, balance):
    """The last update has an odd number of batches: one worker has none where the other has one. Against one process.

    Two updates of few tokens: where two experts of a token are nearly even, the rounding of sums of another order
    may choose the other one, and the models part by 1e-4. A dummy that counted would part them by 7e-2.
    """
    options = [*SGD, "--train-subset", "valid", "--required-batch-size-multiple", "1", "--max-epoch", "1"]
    options += ["--moe-router", "smoe", "--clip-norm", "0", "--moe-gate-loss-wt", "1", "--moe-balance-batch", balance]
    if balance == "global":  # equals one process with all samples in one micro-batch; unshuffled, it holds the same
        options += ["--curriculum", "5"]
    updates = []
    for workers, size in ((1, 1), (2, 1), (2, 2)):
        if balance == "local":  # 52 samples in 7 batches, 4 of them per update
            batch_size, per_worker, samples = 8, 4 // workers, [32, 20]
        else:
            batch_size, per_worker, samples = 36 // workers, 1, [36, 16]
        chosen = [*options, "--update-freq", per_worker, "--moe-expert-parallel-size", size]
        arguments = train_arguments(data, tmp_path / f"{workers}{size}", *chosen, batch_size=batch_size)
        logged = preloaded.run_workers(workers, "fairseq-train", *arguments)[0].logged("train_inner")
        assert [entry["bsz"] for entry in logged] == samples
        updates.append([entry["loss"] for entry in logged])
    assert updates[0] == updates[1] == updates[2]
    models = [load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("11", "21", "22")]
    for model in models[1:]:
        assert_same_model(model, models[0], rtol=1e-5)


@pytest.mark.parametrize("command", ["fairseq-eval-lm", "fairseq-validate"])
def test_evaluations_that_would_print_a_share(preloaded, data, saved, command):
    task = ["--task", "language_modeling"] if command == "fairseq-eval-lm" else []
    arguments = eval_arguments(data, saved[1] / "checkpoint_last.pt", *task)
    results = [preloaded.wait(process) for process in preloaded.start_workers(2, command, *arguments)]
    said = {"fairseq-eval-lm": "print the loss of its share, give hyperrouter", "fairseq-validate": "use one process"}
    assert all(result.code == 1 and said[command] in result.last_line for result in results), results[0].log[-2000:]


def test_a_hash_table_is_resumed_on_several_workers(preloaded, data, tmp_path):
    for updates in (1, 2):
        result = train(preloaded, 2, data, tmp_path, "--moe-router", "hash", "--max-update", updates)
    assert "Loaded checkpoint" in result.log


def test_a_checkpoint_of_another_model_is_named_for_divided_experts(preloaded, data, saved):
    arguments = train_arguments(data, None, "--moe-expert-parallel-size", 2, "--max-update", 1)
    options = [
        "--finetune-from-model",
        saved[1] / "checkpoint_last.pt",
        "--moe-router",
        "smoe",
        "--decoder-learned-pos",
    ]
    process, _ = preloaded.start_workers(2, "fairseq-train", *arguments, *options)
    result = preloaded.wait(process)
    assert result.code == 1 and "is of another model" in result.last_line and "embed_positions" in result.last_line
