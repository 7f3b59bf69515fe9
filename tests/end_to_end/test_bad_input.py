"""A user's mistake ends in one line that names the option or file, its value and what is allowed."""

import re
import shutil
import socket

import pytest
import torch

from fairseq_hyperrouter.launch import worker_options
from tests.commands import (
    CRITERION,
    EXPERTS,
    LOG,
    MODEL,
    ON_CPU,
    OPTIMIZER,
    SAMPLE,
    SIZE,
    TASK,
    USER_DIR,
    eval_arguments,
    hydra_arguments,
    run,
    train,
    train_arguments,
)

COMMAND = "-m fairseq_hyperrouter.commands"


def assert_explained(result, *words):
    """One line that holds every one of *words* as a word of its own, and no traceback."""
    assert result.code not in (0, None), result.log[-3000:]
    assert "Traceback" not in result.log, result.log[-3000:]
    for word in words:
        found = re.search(rf"(?<![\w.]){re.escape(str(word))}(?!\w)", result.last_line)
        assert found, f"{word!r} is not in: {result.last_line}"


TRAINING = {
    "router": (["--moe-router", "foo"], ["--moe-router", "foo", "hyperrouter", "smoe", "smoe-dropout"]),
    "schedule": (
        ["--moe-top-k-schedule", "foo"],
        ["--moe-top-k-schedule", "foo", "constant", "linear", "cosine", "exponential", "steps", "elastic"],
    ),
    "top-k 0": (["--moe-top-k", 0], ["--moe-top-k", 0, 1, 8]),
    "top-k 99": (["--moe-top-k", 99], ["--moe-top-k", 99, 1, 8]),
    "top-k x": (["--moe-top-k", "x"], ["--moe-top-k", "x", "int"]),
    "top-k-start": (["--moe-top-k-schedule", "linear", "--moe-top-k-start", 9], ["--moe-top-k-start", 9, 1, 8]),
    "top-k-choices": (
        ["--moe-top-k-schedule", "elastic", "--moe-top-k", 8, "--moe-top-k-choices", "1,9"],
        ["--moe-top-k-choices", "1,9", 8],
    ),
    "eval-top-k 0": (["--moe-eval-top-k", 0], ["--moe-eval-top-k", 0, 1, 8]),
    "eval-top-k x": (["--moe-eval-top-k", "two"], ["--moe-eval-top-k", "two", 1, 8]),
    "layers": (["--moe-layers", 9], ["--moe-layers", 9, 0, 1]),
    "freq": (["--moe-freq", 3], ["--moe-freq", 3, 2]),
    "experts": (["--moe-expert-count", 0], ["--moe-expert-count", 0, 1]),
    "gate-softmax": (["--moe-gate-softmax", "foo"], ["--moe-gate-softmax", "foo", "selected", "all"]),
    "capacity": (["--moe-capacity-factor", 0], ["--moe-capacity-factor", "0.0", 0]),
    "gate-loss": (["--moe-gate-loss-wt", -1], ["--moe-gate-loss-wt", "-1.0", 0]),
    "z-loss nan": (["--moe-z-loss-wt", "nan"], ["--moe-z-loss-wt", "nan", 0]),
    "valid-top-k": (["--valid-top-k", "1,99"], ["--valid-top-k", 99, 1, 8]),
    "valid-top-k x": (["--valid-top-k", "one"], ["--valid-top-k", "one", "integers"]),
    "best metric": (
        ["--valid-top-k", "1,8", "--best-checkpoint-metric", "ppl_k4"],
        ["--best-checkpoint-metric", "ppl_k4", "--valid-top-k", 4],
    ),
    "token-unit": (["--token-unit", "foo"], ["--token-unit", "foo", "auto", "character", "word"]),
    "linear without an end": (
        ["--moe-top-k-schedule", "linear", "--max-update", 0, "--max-epoch", 1],
        ["--moe-top-k-schedule", "linear", "--max-update"],
    ),
    "best metric without a number": (
        ["--valid-top-k", "1", "--best-checkpoint-metric", "ppl_k01"],
        ["--best-checkpoint-metric", "ppl_k01", "ppl_k1"],
    ),
    "best metric of another criterion": (
        ["--best-checkpoint-metric", "nll_loss"],
        ["--best-checkpoint-metric", "nll_loss", "loss", "ppl", "bpc"],
    ),
    "heads": (["--decoder-attention-heads", 3], ["--decoder-attention-heads", 3, 32]),
    "loss of constants": (
        ["--moe-router", "hash", "--moe-z-loss-wt", 0.1],
        ["--moe-z-loss-wt", 0.1, "hash", "leave it out"],
    ),
    "gate-loss inf": (["--moe-gate-loss-wt", "inf"], ["--moe-gate-loss-wt", "inf", "finite"]),
    "no tokens": (["--tokens-per-sample", 0], ["--tokens-per-sample", 0, 1]),
    "unused start": (["--moe-top-k-start", 4], ["--moe-top-k-start", 4, "constant"]),
    "unknown option": (["--moe-foo", 1], ["--moe-foo"]),
    "width": (["--decoder-embed-dim", -4], ["--decoder-embed-dim", -4, 1]),
    "dropout": (["--dropout", 2], ["--dropout", "2.0", 0, 1]),
    "dropout in experts": (["--relu-dropout", 1], ["--relu-dropout", "1.0", 0, "below 1"]),
    "tied widths": (
        ["--share-decoder-input-output-embed", "--decoder-output-dim", 16],
        ["--decoder-output-dim", 16, "--decoder-input-dim", 32],
    ),
    "kept layers": (["--decoder-layers-to-keep", "0"], ["--decoder-layers-to-keep", 0, "fairseq-eval-lm"]),
    "adaptive softmax": (["--adaptive-softmax-cutoff", "9,5"], ["--adaptive-softmax-cutoff", "9,5", 1]),
    "adaptive input": (["--adaptive-input"], ["--adaptive-input", "--adaptive-input-cutoff"]),
    "tied adaptive": (["--tie-adaptive-weights"], ["--tie-adaptive-weights", "--adaptive-input"]),
    "update-freq": (["--update-freq", 0], ["--update-freq", 0, 1]),
    "batch-size": (["--batch-size", 0], ["--batch-size", 0, 1]),
    "max-tokens": (["--max-tokens", 3], ["--max-tokens", 3, 64]),
    "positions": (["--max-target-positions", 10], ["--tokens-per-sample", 64, "--max-target-positions", 10]),
    "fp16 on a CPU": (["--fp16"], ["--fp16", "--memory-efficient-fp16"]),
    "what fairseq refuses": (["--criterion", "adaptive_loss", "--adaptive-softmax-cutoff", "5,9"], ["legacy_ddp"]),
    "seed": (["--seed", -1], ["--seed", 0]),
    "no valid-top-k": (["--valid-top-k", ""], ["--valid-top-k", "integers"]),
    "schedule updates": (["--moe-top-k-schedule-updates", -5], ["--moe-top-k-schedule-updates", -5, 0]),
    "backend": (["--moe-backend", "fast"], ["--moe-backend", "fast", "auto", "runs", "grouped", "blocks", "loop"]),
    "best metric of another task": (
        ["--task", "language_modeling", "--best-checkpoint-metric", "ppl_k1"],
        ["--best-checkpoint-metric", "ppl_k1", "hyperrouter", "--valid-top-k"],
    ),
    "what is not installed": (["--optimizer", "cpu_adam"], ["install", "DeepSpeed"]),
    "continue once": (["--continue-once", "nope.pt"], ["nope.pt", "no such file"]),
    "router of a dense model": (["--arch", "transformer_lm", "--valid-top-k", 1], ["--valid-top-k", 1, "no experts"]),
}


def test_a_port_in_use(preloaded, data):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        arguments = train_arguments(data, None, *worker_options(2, port), "--distributed-rank", "0")
        assert_explained(preloaded.run("fairseq-train", *arguments), port, "--distributed-port")


@pytest.mark.parametrize("case", TRAINING)
def test_training_options(preloaded, data, case):
    options, words = TRAINING[case]
    arguments = train_arguments(data, None, "--max-update", "5", *options, validate=True)
    if "transformer_lm" in options:  # which has no --moe-expert-count
        stock = [*SIZE, *OPTIMIZER, *LOG, *ON_CPU, "--criterion", "cross_entropy", "--batch-size", "8", "--no-save"]
        arguments = [data, "--user-dir", USER_DIR, *TASK, *stock, "--max-update", "1", *options]
    assert_explained(preloaded.run("fairseq-train", *arguments), *words)


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


DAMAGED = {"train bin": "train.bin", "train idx": "train.idx", "valid bin": "valid.bin", "empty idx": "valid.idx"}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_data(preloaded, tmp_path, data, case):
    shutil.copytree(data, tmp_path / "data")
    damaged = cut(tmp_path / "data" / DAMAGED[case], 0 if case == "empty idx" else 0.5)
    arguments = train_arguments(tmp_path / "data", None, "--max-update", "1", validate=True)
    named = damaged.with_suffix("") if case == "empty idx" else damaged
    assert_explained(preloaded.run("fairseq-train", *arguments), named, "fairseq-preprocess")


@pytest.mark.parametrize("case", ["no folder", "no dictionary", "no split"])
def test_missing_data(preloaded, tmp_path, data, case):
    folder = tmp_path / "data"
    if case == "no split":
        shutil.copytree(data, folder, ignore=shutil.ignore_patterns("train.*"))
    elif case == "no dictionary":
        folder.mkdir()
    named = {"no folder": [folder], "no dictionary": [folder, "dict.txt"], "no split": [folder / "train.idx"]}
    result = preloaded.run("fairseq-train", *train_arguments(folder, None, "--max-update", "1"))
    assert_explained(result, *named[case], "fairseq-preprocess")


OTHER_MODELS = {
    "experts": (["--moe-expert-count", 16], ["--moe-expert-count", 8, 16]),
    "width": (
        ["--decoder-embed-dim", 48, "--decoder-input-dim", 48, "--decoder-output-dim", 48],
        ["--decoder-embed-dim", 32, 48],
    ),
    "expert width": (["--moe-ffn-embed-dim", 96], ["--moe-ffn-embed-dim", 64, 96]),
    "router": (["--moe-router", "smoe"], ["--moe-router", "hyperrouter", "smoe"]),
    "layers": (["--decoder-layers", 4], ["--decoder-layers", 2, 4]),
    "heads": (["--decoder-attention-heads", 4], ["--decoder-attention-heads", 2, 4]),
    "MoE layers": (["--moe-layers", 1], ["--moe-layers", 1]),
    "embeddings": (["--share-decoder-input-output-embed"], ["--share-decoder-input-output-embed"]),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_resume_as_another_model(preloaded, tmp_path, data, trained, case):
    options, words = OTHER_MODELS[case]
    shutil.copy(trained("hyperrouter")[0] / "checkpoint_last.pt", tmp_path)
    result = preloaded.run("fairseq-train", *train_arguments(data, tmp_path, "--max-update", "40", *options))
    assert_explained(result, tmp_path / "checkpoint_last.pt", *words)


@pytest.mark.parametrize("task", ["hyperrouter", "language_modeling"])
@pytest.mark.parametrize("where", ["--restore-file", "--continue-once"])
def test_restore_another_router_of_the_same_shape(preloaded, tmp_path, data, trained, task, where):
    """The tensors have the same names and shapes: only the options tell."""
    other = trained("smoe")[0] / "checkpoint_last.pt"
    options = ["--moe-router", "smoe-dropout", "--task", task, "--reset-optimizer", where, other]
    result = preloaded.run("fairseq-train", *train_arguments(data, tmp_path, *options))
    assert_explained(result, other, "--moe-router", "smoe", "smoe-dropout")


def test_restore_a_dense_checkpoint(preloaded, tmp_path, data, trained):
    dense = trained("dense")[0] / "checkpoint_last.pt"
    result = preloaded.run("fairseq-train", *train_arguments(data, tmp_path, "--restore-file", dense))
    assert_explained(result, dense, "--arch", "transformer_lm", "transformer_lm_hyperrouter")


def test_restore_into_a_dense_model(preloaded, tmp_path, data, trained):
    sparse = trained("hyperrouter")[0] / "checkpoint_last.pt"
    stock = ["--arch", "transformer_lm", *SIZE, *TASK, "--criterion", "cross_entropy", *OPTIMIZER, *LOG, *ON_CPU]
    arguments = [data, "--user-dir", USER_DIR, *stock, "--batch-size", "8", "--save-dir", tmp_path]
    result = preloaded.run("fairseq-train", *arguments, "--disable-validation", "--restore-file", sparse)
    assert_explained(result, sparse, "--arch", "transformer_lm", "transformer_lm_hyperrouter")


@pytest.mark.parametrize("value", ["0", "9", "'two'", "-1", "1.5"])
def test_override_of_k(preloaded, data, trained, value):
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    overrides = f"{{'moe_eval_top_k': {value}}}"
    result = preloaded.run("fairseq-eval-lm", *eval_arguments(data, checkpoint, "--model-overrides", overrides))
    assert_explained(result, "--moe-eval-top-k", value.strip("'"), 1, 8)


@pytest.mark.parametrize("overrides", ["{moe_eval_top_k: 1}", "{'moe_eval_top_k': 1", "1"])
def test_overrides_that_are_no_dict(preloaded, data, trained, overrides):
    """As a shell leaves them when the quotes are forgotten."""
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    result = preloaded.run("fairseq-eval-lm", *eval_arguments(data, checkpoint, "--model-overrides", overrides))
    assert_explained(result, "--model-overrides", overrides)


@pytest.mark.parametrize("command", ["fairseq-eval-lm", "fairseq-validate"])
def test_override_of_an_option_that_does_not_exist(preloaded, data, trained, command):
    """Stock fairseq would evaluate as if nothing had been asked for."""
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    overrides = ["--model-overrides", "{'moe_eval_topk': 1}"]
    result = preloaded.run(command, *eval_arguments(data, checkpoint, *overrides))
    assert_explained(result, "--model-overrides", "moe_eval_topk", "moe_eval_top_k")


def test_validate_at_a_number_that_there_is_not(preloaded, data, trained):
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    result = preloaded.run("fairseq-validate", *eval_arguments(data, checkpoint, "--valid-top-k", "1,99"))
    assert_explained(result, "--valid-top-k", 99, 1, EXPERTS)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("{'moe_expert_count': 16}", ["--moe-expert-count", 8, 16]),
        ("{'moe_router': 'smoe'}", ["--moe-router", "hyperrouter", "smoe"]),
        ("{'moe_layers': '1'}", ["--moe-layers", "0,1", 1]),
        ("{'moe_router_lr_scale': 1.0}", ["--model-overrides", "moe_router_lr_scale", "stored weights"]),
        ("{'decoder_layers_to_keep': '7'}", ["--decoder-layers-to-keep", 7, 0, 1]),
        ("{'decoder_layers_to_keep': 'x'}", ["--decoder-layers-to-keep", "x", "integers"]),
    ],
)
def test_override_that_makes_another_model(preloaded, data, trained, overrides, words):
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    result = preloaded.run("fairseq-eval-lm", *eval_arguments(data, checkpoint, "--model-overrides", overrides))
    assert_explained(result, *words)


def test_restore_a_missing_checkpoint_last(preloaded, tmp_path, data):
    """By its usual name, but not in the folder where a first training finds none either."""
    missing = tmp_path / "other" / "checkpoint_last.pt"
    arguments = train_arguments(data, tmp_path, "--restore-file", missing, "--max-update", "1")
    assert_explained(preloaded.run("fairseq-train", *arguments), missing)


@pytest.mark.parametrize("lines", [20, 20.5])
def test_truncated_dictionary(preloaded, tmp_path, data, lines):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    whole = (folder / "dict.txt").read_text().splitlines(keepends=True)
    (folder / "dict.txt").write_text("".join(whole[: int(lines)]) + ("" if lines == 20 else whole[20][:1] + "\n"))
    result = preloaded.run("fairseq-train", *train_arguments(folder, None, "--max-update", "1"))
    assert_explained(result, "dict.txt")


def test_second_data_folder_is_missing(preloaded, tmp_path, data):
    arguments = train_arguments(f"{data}:{tmp_path / 'nope'}", None, "--max-update", "1")
    assert_explained(preloaded.run("fairseq-train", *arguments), tmp_path / "nope")


@pytest.fixture
def checkpoints(tmp_path, trained):
    """Files that are not what --path needs."""
    good = trained("hyperrouter")[0] / "checkpoint_last.pt"
    truncated = cut(shutil.copy(good, tmp_path / "truncated.pt") and tmp_path / "truncated.pt")
    (tmp_path / "text.pt").write_text("no checkpoint\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weight": torch.ones(2)}, tmp_path / "foreign.pt")
    files = {"missing": tmp_path / "missing.pt", "truncated": truncated}
    return files | {name: tmp_path / f"{name}.pt" for name in ("text", "empty", "foreign")}


BROKEN = ("missing", "truncated", "text", "empty", "foreign")


@pytest.mark.parametrize("kind", BROKEN)
def test_evaluate_a_broken_checkpoint(preloaded, data, checkpoints, kind):
    path = checkpoints[kind]
    assert_explained(preloaded.run("fairseq-eval-lm", *eval_arguments(data, path)), path)


@pytest.mark.parametrize("kind", BROKEN)
def test_sweep_a_broken_checkpoint(preloaded, tmp_path, data, checkpoints, kind):
    path = checkpoints[kind]
    result = preloaded.run(COMMAND, "sweep", path, data, "--top-k", "1", "--cpu", "--out", tmp_path / "out")
    assert_explained(result, path)


@pytest.mark.parametrize("kind", BROKEN)
def test_restore_a_broken_checkpoint(preloaded, tmp_path, data, checkpoints, kind):
    path = checkpoints[kind]
    arguments = train_arguments(data, tmp_path / "save", "--restore-file", path, "--max-update", "1")
    assert_explained(preloaded.run("fairseq-train", *arguments), path)


def test_truncated_checkpoint_last_alone(preloaded, tmp_path, data, checkpoints):
    """Nothing whole beside it: say so, do not start anew over it."""
    last = checkpoints["truncated"].rename(tmp_path / "checkpoint_last.pt")
    for other in BROKEN:
        (tmp_path / f"{other}.pt").unlink(missing_ok=True)
    result = preloaded.run("fairseq-train", *train_arguments(data, tmp_path, "--max-update", "1"))
    assert_explained(result, last)


@pytest.mark.parametrize("command", ["fairseq-eval-lm", "sweep"])
def test_another_vocabulary(preloaded, tmp_path, data, trained, command):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    with open(folder / "dict.txt", "a") as file:
        file.write("one 1\ntwo 1\n")
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    if command == "sweep":
        result = preloaded.run(COMMAND, "sweep", checkpoint, folder, "--top-k", "1", "--cpu", "--out", tmp_path)
    else:
        result = preloaded.run(command, *eval_arguments(folder, checkpoint))
    assert_explained(result, checkpoint, 64, 66, "DATA")


def test_resume_with_another_vocabulary(preloaded, tmp_path, data, trained):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    with open(folder / "dict.txt", "a") as file:
        file.write("one 1\ntwo 1\n")
    shutil.copy(trained("hyperrouter")[0] / "checkpoint_last.pt", tmp_path)
    result = preloaded.run("fairseq-train", *train_arguments(folder, tmp_path, "--max-update", "40"))
    assert_explained(result, tmp_path / "checkpoint_last.pt", 64, 66, "DATA")


def test_evaluation_of_no_checkpoint(preloaded, data):
    assert_explained(preloaded.run("fairseq-eval-lm", data, "--user-dir", USER_DIR, *ON_CPU), "--path")


def test_evaluation_with_longer_samples_than_the_model_takes(preloaded, data, trained):
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    common = [data, "--user-dir", USER_DIR, "--path", checkpoint, *ON_CPU, "--batch-size", "8"]
    assert_explained(preloaded.run("fairseq-eval-lm", *common), "--tokens-per-sample", 1024, 64)


def test_evaluation_of_nothing_but_context(preloaded, data, trained):
    arguments = eval_arguments(data, trained("hyperrouter")[0] / "checkpoint_last.pt", "--context-window", 64)
    assert_explained(preloaded.run("fairseq-eval-lm", *arguments), "--context-window", 1)


SWEEP = {
    "k 0": (["--top-k", "0,1"], ["--top-k", 0, 8]),
    "k 9": (["--top-k", "1,9"], ["--top-k", 9, 8]),
    "k x": (["--top-k", "one"], ["--top-k", "one", "integers"]),
    "split": (["--top-k", "1", "--split", "tset"], ["tset"]),
    "no tokens": (["--top-k", "1", "--tokens-per-sample", 0], ["--tokens-per-sample", 0, 1]),
    "no batch": (["--top-k", "1", "--batch-size", 0], ["--batch-size", 0, 1]),
    "too many tokens": (["--top-k", "1", "--tokens-per-sample", 65], ["--tokens-per-sample", 65, 64]),
    "context too long": (["--top-k", "1", "--context-window", 64], ["--context-window", 64]),
}


@pytest.mark.parametrize("case", SWEEP)
def test_sweep_options(preloaded, tmp_path, data, trained, case):
    options, words = SWEEP[case]
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    result = preloaded.run(COMMAND, "sweep", checkpoint, data, "--cpu", "--out", tmp_path, *options)
    assert_explained(result, *words)


def test_sweep_into_a_file(preloaded, tmp_path, data, trained):
    (tmp_path / "file").write_text("")
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    out = ["--out", tmp_path / "file" / "folder"]
    result = preloaded.run(COMMAND, "sweep", checkpoint, data, "--top-k", "1", "--cpu", *out)
    assert_explained(result, tmp_path / "file" / "folder")


def test_sweep_without_data(preloaded, tmp_path, trained):
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    result = preloaded.run(COMMAND, "sweep", checkpoint, tmp_path / "nothing", "--cpu", "--out", tmp_path)
    assert_explained(result, tmp_path / "nothing", "fairseq-preprocess")


# The same without the preloaded process: what a user's shell starts.


def test_training_in_a_process_of_its_own(data):
    result = train(data, None, "--moe-router", "foo", "--max-update", "1", check=False)
    assert_explained(result, "--moe-router", "foo", "hyperrouter", "smoe", "smoe-dropout")


def test_evaluation_in_a_process_of_its_own(data, trained):
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    overrides = ["--model-overrides", "{'moe_eval_top_k': 9}"]
    result = run("fairseq-eval-lm", *eval_arguments(data, checkpoint, *overrides), check=False)
    assert_explained(result, "--moe-eval-top-k", 9, 8)


def test_module_in_a_process_of_its_own(data):
    """python -m fairseq_cli.train, as several processes are started."""
    arguments = [data, "--user-dir", USER_DIR, *TASK, *MODEL, *CRITERION, *OPTIMIZER, *ON_CPU, "--batch-size", "8"]
    result = run("-m fairseq_cli.train", *arguments, *SAMPLE, "--moe-top-k", "0", check=False)
    assert_explained(result, "--moe-top-k", 0, 8)


def test_hydra_train(tmp_path, data):
    options = {"hydra.run.dir": tmp_path, "model.moe_router": "foo"}
    result = run("fairseq-hydra-train", *hydra_arguments(data, **options), cwd=tmp_path, check=False)
    assert_explained(result, "--moe-router", "foo", "hyperrouter", "smoe", "smoe-dropout")
