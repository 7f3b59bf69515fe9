"""A worker that is killed ends the others, and what was saved before goes on."""

import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from tests.commands import BIN, USER_DIR, environment, hydra_arguments, load, run, train_arguments

OPTIONS = ["--moe-expert-parallel-size", "2", "--save-interval-updates", "1", "--keep-interval-updates", "2"]
TIMES = 20


def wait_for(preloaded, process, text, seconds=60):
    until = time.monotonic() + seconds
    while text not in preloaded.log(process):
        assert time.monotonic() < until, preloaded.log(process)[-3000:]
        time.sleep(0.02)


def newest(folder):
    """How many updates the newest whole checkpoint has; 0 when there is none."""
    whole = [path for path in folder.glob("checkpoint*.pt") if zipfile.is_zipfile(path)]
    return max((load(path)["optimizer_history"][-1]["num_updates"] for path in whole), default=0)


def resumes_at(folder):
    """Where fairseq goes on: at checkpoint_last.pt; at the newest checkpoint where the kill cut that one short."""
    last = folder / "checkpoint_last.pt"
    if zipfile.is_zipfile(last):
        return load(last)["optimizer_history"][-1]["num_updates"]
    return newest(folder)


def test_killed_at_random_times(preloaded, data, tmp_path):
    """Twenty times, in updates and in saves; each training goes on where the one before was saved last."""
    chance = random.Random(1)
    arguments = train_arguments(data, tmp_path, *OPTIONS, "--max-update", "100000", batch_size=2)
    saved = completed = 0
    for turn in range(TIMES):
        workers = preloaded.start_workers(2, "fairseq-train", *arguments)
        wait_for(preloaded, workers[0], "Start iterating" if turn % 4 else "initialized host")
        time.sleep(chance.uniform(0, 1.5))
        victim = chance.randrange(2)
        os.kill(workers[victim], signal.SIGKILL)
        killed = time.monotonic()
        results = [preloaded.wait(process) for process in workers]
        assert time.monotonic() - killed < 30
        survivor = results[1 - victim]
        assert results[victim].code == -signal.SIGKILL and survivor.code == 1
        assert "another worker of this training has ended" in survivor.last_line
        log = results[0].log
        if saved and "Loaded checkpoint" in log:
            assert int(re.search(r"Loaded checkpoint .* @ (\d+) updates", log)[1]) == saved
        said = [int(number) for number in re.findall(r"Saved checkpoint .* @ (\d+) updates", log)]
        completed = max(said, default=completed)
        saved = resumes_at(tmp_path)
        # A checkpoint whose save was not over may be there under its first name already.
        assert newest(tmp_path) >= saved >= completed
    assert saved > TIMES // 2
    preloaded.run_workers(2, "fairseq-train", *arguments, "--max-update", saved + 2)
    assert resumes_at(tmp_path) == newest(tmp_path) == saved + 2


OUT_OF_MEMORY = """
import torch.distributed as dist
from torch import nn
import fairseq_hyperrouter
from fairseq_hyperrouter import MoELayer
from fairseq_hyperrouter.models import *

stock = MoELayer.forward

def fail(*_):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

def forward(self, x, *, update=0, **options):
    y, routing = stock(self, x, update=update, **options)
    if dist.get_rank() == 1 and self.training == {training} and (update == 2 or not self.training):
        {fails}
    return y, routing

MoELayer.forward = forward
"""


@pytest.mark.parametrize(
    "training, fails, size",
    [(True, "fail()", 2), (True, "y.register_hook(fail)", 2), (False, "fail()", 2), (True, "fail()", 1)],
    ids=str,
)
def test_a_worker_out_of_memory_ends_all(preloaded, data, tmp_path, training, fails, size):
    """In a forward pass, a backward pass and a validation: fairseq would go on with the next batch on that worker."""
    plugin = tmp_path / "out_of_memory"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(OUT_OF_MEMORY.format(training=training, fails=fails))
    options = ["--moe-expert-parallel-size", size, "--max-update", "9", "--validate-interval-updates", "2"]
    arguments = train_arguments(data, tmp_path, *options, "--user-dir", plugin, validate=True)
    workers = preloaded.start_workers(2, "fairseq-train", *arguments)
    results = [preloaded.wait(process) for process in workers]
    assert [result.code for result in results] == [1, 1], [result.log[-1500:] for result in results]
    said = "a worker is out of memory, give less (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    assert results[1].last_line.endswith(f"--batch-size or --max-tokens: {said}")
    assert "another worker of this training has ended" in results[0].last_line


@pytest.fixture
def launched(data, tmp_path):
    """Start ``fairseq-hyperrouter launch``; stopped at the end, whatever happens."""
    started = []

    def launched(*options):
        arguments = train_arguments(data, tmp_path / "checkpoints", *options)
        command = [BIN / "fairseq-hyperrouter", "launch", "2", "fairseq-train", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment(), text=True, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield launched
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def training_workers(launcher):
    """The process numbers of the workers, when they have trained two updates."""
    log = ""
    while '"num_updates": "2"' not in log:
        log += launcher.stdout.readline()
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in children]


def test_the_launcher_says_who_ended(launched):
    process = launched(*OPTIONS, "--max-update", "100000")
    children = training_workers(process)
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "another worker of this training has ended" in rest
    assert rest.strip().splitlines()[-1] == "worker 1 of 2 ended first, with signal 9 (SIGKILL)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=str)
def test_nothing_stays_behind_when_the_launcher_is_ended(launched, number):
    process = launched(*OPTIONS, "--max-update", "100000")
    children = training_workers(process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of what is killed")
def test_nothing_stays_behind_when_the_launcher_is_killed(launched):
    process = launched(*OPTIONS, "--max-update", "100000")
    children = training_workers(process)
    process.kill()
    process.communicate(timeout=60)  # until all who write to its output have ended
    assert process.returncode == -signal.SIGKILL
    until = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize(
    "command, message",
    [
        (["fairseq-train", "nowhere", "--user-dir", USER_DIR, "--arch", ""], "ended first, with exit status"),
        ([""], ": no such command beside"),
        (["./fairseq-train"], "./fairseq-train: no such file"),
        ([BIN / "fairseq-generate", "DATA"], "each worker would print the sentences of its share; start one process"),
    ],
    ids=str,
)
def test_what_cannot_be_launched(tmp_path, command, message):
    result = run("fairseq-hyperrouter", "launch", "2", *command, cwd=tmp_path, check=False)
    assert result.code and message in result.last_line and "Traceback" not in result.log


def test_the_launcher_keeps_the_users_backend(launched):
    log, _ = launched("--ddp-backend", "slowmo", "--max-update", "1").communicate(timeout=120)
    assert "--ddp-backend slowmo: nobody has tried it with experts" in log


def test_bfloat16_on_two_workers_through_hydra(data, tmp_path):
    """fairseq-train takes --bf16 on several workers for a TPU, and says what does not."""
    settings = {"common.bf16": "true", "checkpoint.save_dir": tmp_path, "optimization.max_update": 2}
    arguments = hydra_arguments(data, **settings, **{"+model.moe_expert_parallel_size": 2})
    result = run("fairseq-hyperrouter", "launch", "2", "fairseq-hydra-train", *arguments, cwd=tmp_path)
    assert "training on 2 devices" in result.log
    assert (tmp_path / "checkpoint_last.pt").exists()
    arguments = train_arguments(data, None, "--bf16", "--max-update", "1")
    refused = run("fairseq-hyperrouter", "launch", "2", "fairseq-train", *arguments, check=False)
    assert "use fairseq-hydra-train with common.bf16=true" in refused.log and "Traceback" not in refused.log


def test_the_launcher_shows_a_mistake(launched):
    process = launched("--moe-expert-parallel-size", "4")
    log, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert (
        "fairseq-train: error: --moe-expert-parallel-size 4: this training has 2 worker(s), must be a multiple of it"
        in log
    )
    assert "Traceback" not in log


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["0", "fairseq-train"], "launch 0: must be at least 1 worker"),
        (["2"], "launch: needs a command, as in fairseq-train DATA ..."),
        (["2", "fairseq-train", "--distributed-rank", "1"], "launch: gives distributed-rank itself, leave it out"),
        (["2", "fairseq-hydra-train", "distributed_training.distributed_rank=1"], "gives distributed_training.distrib"),
        (["2", "--", "fairseq-trian"], "fairseq-trian: no such command beside"),
        (["2", "fairseq-trian"], "fairseq-trian: no such command beside"),
    ],
)
def test_mistakes(arguments, message):
    result = run("fairseq-hyperrouter", "launch", *arguments, check=False)
    assert result.code == 1 and message in result.last_line
