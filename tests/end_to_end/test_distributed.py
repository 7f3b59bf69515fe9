"""Two processes with replicated experts compute what one computes, and resume without help."""

import shutil
import socket
import subprocess

import torch

import fairseq_hyperrouter  # noqa: F401  (stock --optimizer sgd saves an argparse.Namespace, which this lets load)
from tests.commands import load, popen, train, train_arguments

OPTIONS = [
    *("--optimizer", "sgd", "--lr", "0.5", "--lr-scheduler", "fixed", "--clip-norm", "0.5"),
    *("--moe-top-k-schedule", "elastic", "--moe-top-k", "8", "--moe-gate-loss-wt", "0.01"),
    *("--save-interval-updates", "4"),
]


def train_on_two(data, folder, *options):
    """fairseq does not start processes on a CPU, so start each rank; both must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = ["--distributed-world-size", "2", "--distributed-init-method", f"tcp://127.0.0.1:{port}"]
    shared += ["--distributed-no-spawn", "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"]
    arguments = train_arguments(data, folder, *OPTIONS, *options)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ranks = [popen("fairseq-train", *arguments, *shared, "--distributed-rank", rank, **pipes) for rank in (0, 1)]
    try:
        logs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (process, log) in enumerate(zip(ranks, logs)):
        assert process.returncode == 0, f"rank {rank}\n{log[-6000:]}"
    return logs[0]


def test_two_processes_and_their_resume_equal_one(tmp_path, data):
    """The same global batch: two workers, or two micro-batches of one. Stopped after 4 of 8 updates and resumed."""
    one, two, then_one = (tmp_path / name for name in ("one", "two", "then_one"))
    train(data, one, *OPTIONS, "--update-freq", "2", "--max-update", "8")
    train_on_two(data, two, "--max-update", "4")
    shutil.copytree(two, then_one)
    log = train_on_two(data, two, "--max-update", "8")
    assert "Loaded checkpoint" in log and "training on 2 devices" in log
    for name in ("checkpoint_1_4.pt", "checkpoint_last.pt"):
        expected, found = (load(folder / name)["model"] for folder in (one, two))
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")

    # Another number of workers goes on too. (Stock fairseq counts the place in the data in batches per worker, so not
    # with the same batches.)
    entries = train(data, then_one, *OPTIONS, "--update-freq", "2", "--max-update", "8").logged("train_inner")
    assert [entry["num_updates"] for entry in entries] == [5, 6, 7, 8]
