"""Session fixtures: real text and checkpoints, made once for all pytest-xdist workers together."""

import fcntl
import json
import os
import shutil

import numpy as np
import pytest
import torch

from tests import commands
from tests.preloaded import Preloaded

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # looked at when Triton is imported, by whomever


def pytest_collection_modifyitems(items):
    """Fast ones first."""
    items.sort(key=lambda item: "end_to_end" in item.path.parts)


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers in every run, whichever others ran before it."""
    torch.manual_seed(1)
    np.random.seed(1)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): the folder that make(folder) filled, and what it returned (JSON), whoever came first."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def once(name, make):
        folder, done = root / "shared" / name, root / "shared" / f"{name}.json"
        folder.parent.mkdir(exist_ok=True)
        with open(root / "shared" / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                done.write_text(json.dumps(make(folder)))
        return folder, json.loads(done.read_text())

    return once


@pytest.fixture(scope="session")
def text(once):
    """train.txt, valid.txt, test.txt: the first 60,000 characters of Tiny Shakespeare, a character per token."""

    def make(folder):
        lines = commands.TEXT.read_text()[:60_000].splitlines()
        bounds = [0, int(0.9 * len(lines)), int(0.95 * len(lines)), len(lines)]
        for split, start, end in zip(("train", "valid", "test"), bounds, bounds[1:]):
            spaced = [" ".join(line.replace(" ", "\u2581")) + "\n" for line in lines[start:end]]
            (folder / f"{split}.txt").write_text("".join(spaced))

    return once("text", make)[0]


@pytest.fixture(scope="session")
def data(once, text):
    """The folder that fairseq-preprocess made."""

    def make(folder):
        prefixes = [part for split in ("train", "valid", "test") for part in (f"--{split}pref", text / f"{split}.txt")]
        commands.run("fairseq-preprocess", "--only-source", *prefixes, "--destdir", folder, "--workers", "1")

    return once("data", make)[0]


@pytest.fixture(scope="session")
def trained(once, data):
    """trained(router): a folder with checkpoint_last.pt after 30 updates, and the losses of the updates in bits.

    The router "dense" is stock transformer_lm with the stock task and criterion.
    """

    def trained(router):
        if router == "dense":
            stock = ["--arch", "transformer_lm", "--task", "language_modeling", "--criterion", "cross_entropy"]
            options = [*stock, *commands.SIZE, "--dropout", "0", *commands.SAMPLE, *commands.OPTIMIZER, *commands.LOG]
            options += [*commands.ON_CPU, "--batch-size", "8", "--disable-validation"]

            def make(folder):
                return commands.run(
                    "fairseq-train", data, *options, "--max-update", "30", "--save-dir", folder
                ).losses()
        else:

            def make(folder):
                return commands.train(data, folder, "--moe-router", router, "--max-update", "30").losses()

        return once(router, make)

    return trained


@pytest.fixture(scope="session")
def evaluated(once, data, trained):
    """evaluated(router, top_k): fairseq-eval-lm of trained(router) on the test split."""

    def evaluated(router, top_k=None):
        checkpoint = trained(router)[0] / "checkpoint_last.pt"
        return once(f"eval-{router}-{top_k}", lambda _: commands.evaluate(data, checkpoint, top_k))[1]

    return evaluated


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory):
    """preloaded.run(command, ...): a command that need not import PyTorch and fairseq again."""
    server = Preloaded(tmp_path_factory.mktemp("preloaded"))
    yield server
    server.close()
