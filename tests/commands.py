"""fairseq's own commands in processes of their own, as a user runs them, and what they print and save."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
USER_DIR = REPO / "fairseq_hyperrouter"
TEXT = REPO / "examples" / "quickstart" / "tinyshakespeare.txt"
BIN = Path(sys.executable).parent

EXPERTS = 8
SAMPLE = ["--tokens-per-sample", "64"]
ON_CPU = ["--cpu", "--num-workers", "0"]
SIZE = [
    *("--decoder-layers", "2", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64"),
    *("--decoder-attention-heads", "2", "--decoder-input-dim", "32", "--decoder-output-dim", "32"),
]
MODEL = ["--arch", "transformer_lm_hyperrouter", *SIZE, "--moe-expert-count", str(EXPERTS), "--dropout", "0"]
TASK = ["--task", "hyperrouter", *SAMPLE]
CRITERION = ["--criterion", "moe_cross_entropy"]
OPTIMIZER = ["--optimizer", "adam", "--lr", "0.01", "--clip-norm", "1"]
LOG = ["--log-format", "json", "--log-interval", "1"]


def environment():
    """No GPU, one thread, and nothing that hides a fault."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH_FORCE", "TRITON_"))}
    return {**env, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def log(self):
        return self.out + self.err

    @property
    def last_line(self):
        return (self.err.strip() or self.out.strip()).splitlines()[-1]

    def logged(self, tag):
        """What ``--log-format json`` printed under *tag*, as dicts of floats."""
        lines = re.findall(rf"\b{tag}\b[^{{\n]*(\{{\"epoch\".*\}})$", self.log, re.MULTILINE)
        return [{name: float(v) for name, v in json.loads(line).items() if v is not None} for line in lines]

    def losses(self):
        return [entry["loss"] for entry in self.logged("train_inner")]


def popen(command, *args, **options):
    """Start a command of fairseq, or a Python module when it is named as ``-m module``."""
    program = [sys.executable, *command.split()] if command.startswith("-") else [str(BIN / command)]
    options = {"env": environment(), "stdin": subprocess.DEVNULL, "text": True, **options}
    return subprocess.Popen([*program, *map(str, args)], **options)


def run(command, *args, stdin=None, cwd=None, check=True):
    """Run a command to its end; with *check* it must succeed."""
    given = {"stdin": subprocess.PIPE} if stdin is not None else {}
    process = popen(command, *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, **given)
    out, err = process.communicate(stdin, timeout=240)
    result = Result(process.returncode, out, err)
    assert not check or result.code == 0, f"{command} {' '.join(map(str, args))}\n{result.log[-6000:]}"
    return result


def run_python(code, *args):
    return run("-c", code, *args)


def train_arguments(data, save_dir, *options, batch_size=8, validate=False):
    """A small training; of an option that is given twice fairseq takes the last."""
    where = ["--save-dir", str(save_dir)] if save_dir else ["--no-save"]
    validation = [] if validate else ["--disable-validation"]
    common = [*TASK, *MODEL, *CRITERION, *OPTIMIZER, *LOG, *ON_CPU, "--batch-size", str(batch_size)]
    return [str(data), "--user-dir", str(USER_DIR), *common, *where, *validation, *map(str, options)]


def train(data, save_dir, *options, check=True, **batches):
    return run("fairseq-train", *train_arguments(data, save_dir, *options, **batches), check=check)


def eval_arguments(data, checkpoint, *options):
    common = [*TASK, *ON_CPU, "--batch-size", "8", "--path", str(checkpoint)]
    return [str(data), "--user-dir", str(USER_DIR), *common, *map(str, options)]


def evaluate(data, checkpoint, top_k=None, split="test", options=()):
    """fairseq-eval-lm: its loss in bits, its perplexity, both as printed, and its log."""
    overrides = [] if top_k is None else ["--model-overrides", f"{{'moe_eval_top_k': {top_k}}}"]
    log = run("fairseq-eval-lm", *eval_arguments(data, checkpoint, "--gen-subset", split, *overrides, *options)).log
    loss, perplexity = re.search(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", log).groups()
    return {"loss": float(loss), "printed_perplexity": perplexity, "perplexity": float(perplexity), "log": log}


def sweep(*args, check=True):
    return run("-m fairseq_hyperrouter.commands", "sweep", *args, "--cpu", cwd=REPO, check=check)


HYDRA = REPO / "examples" / "language_model" / "hydra"
TINY = {
    "task.tokens_per_sample": 64,
    "dataset.batch_size": 8,
    "model.decoder_layers": 2,
    "model.decoder_embed_dim": 32,
    "model.decoder_input_dim": 32,
    "model.decoder_output_dim": 32,
    "model.decoder_ffn_embed_dim": 64,
    "model.decoder_attention_heads": 2,
    "optimization.max_update": 4,
    "common.log_interval": 1,
    "common.cpu": "true",
}


def hydra_arguments(data, **overrides):
    """The example's configuration, made small."""
    settings = {"task.data": data, "common.user_dir": USER_DIR, **TINY, **overrides}
    values = [f"{name}={value}" for name, value in settings.items()]
    return ["--config-dir", HYDRA, "--config-name", "hyperrouter", *values]


def load(checkpoint):
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def loss_of(model, task):
    """Of a model in this process on the test split, in bits, sample by sample."""
    task.load_dataset("test")
    dataset = task.dataset("test")
    total, tokens = 0.0, 0
    with torch.no_grad():
        for index in range(len(dataset)):
            sample = dataset.collater([dataset[index]])
            log_probability = model(**sample["net_input"])[0].double().log_softmax(dim=-1)
            total -= log_probability.gather(-1, sample["target"].unsqueeze(-1)).sum().item()
            tokens += sample["target"].numel()
    return total / tokens / math.log(2)


def differing_tensors(first, second, where=""):
    """The places at which two nested states are not equal bit for bit."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [place for key in first for place in differing_tensors(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [p for i, (a, b) in enumerate(zip(first, second)) for p in differing_tensors(a, b, f"{where}/{i}")]
    if torch.is_tensor(first) and torch.is_tensor(second):
        same = first.dtype == second.dtype and torch.equal(first, second)
    else:
        same = first == second
    return [] if same else [where]
