"""What only a GPU can show: the same numbers, nothing copied to the host, and training in every precision."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch

from fairseq_hyperrouter import HyperRouter, LinearRouter, MoELayer
from fairseq_hyperrouter.experts import ExpertBank
from fairseq_hyperrouter.experts.backend import HAS_GROUPED_MM, HAS_TRITON
from tests.commands import REPO, eval_arguments, train_arguments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BACKENDS = ["blocks", "loop", *["grouped"] * HAS_GROUPED_MM, *["triton"] * HAS_TRITON]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("drops", [False, True])
def test_experts_compute_what_float64_on_the_cpu_does(backend, dtype, top_k, drops):
    """Outputs and all gradients, by the norm of the difference over the norm; an expert without tokens among them."""
    tokens, D, hidden, E = 1000, 64, 96, 9
    bank = ExpertBank(E, D, hidden, backend=backend).to("cuda", dtype)
    x, dy = (torch.randn(tokens, D, device="cuda").to(dtype) for _ in range(2))
    index = torch.rand(tokens, E - 1, device="cuda").argsort(-1)[:, :top_k]
    gate = torch.rand(tokens, top_k, device="cuda")
    kept = torch.rand(tokens, top_k, device="cuda") < 0.8 if drops else None
    reference = copy.deepcopy(bank).cpu().double()
    reference.backend = "loop"
    found = _with_gradients(bank, x, index, gate, kept, dy)
    kept = None if kept is None else kept.cpu()
    expected = _with_gradients(reference, x.cpu().double(), index.cpu(), gate.cpu().double(), kept, dy.cpu().double())
    for one, other in zip(found, expected):
        error = (one.cpu().double() - other).norm() / other.norm()
        assert error < TOLERANCE[dtype], error.item()


def _with_gradients(bank, x, index, gate, kept, dy):
    x, gate = (tensor.detach().requires_grad_() for tensor in (x, gate))
    y = bank(x, index, gate, kept)
    return [y, *torch.autograd.grad(y, [x, gate, *bank.parameters()], dy)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("router", [LinearRouter, HyperRouter])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_nothing_is_copied_to_the_host(router, dtype, capacity_factor):
    """And so a step can be a CUDA graph, which computes the same."""
    layer = MoELayer(router(64, 8), 128, top_k=2, capacity_factor=capacity_factor).to("cuda", dtype)
    x, dy = (torch.randn(512, 64, device="cuda").to(dtype) for _ in range(2))
    padding = torch.rand(512, device="cuda") < 0.1

    def step():
        inputs = x.detach().requires_grad_()
        y, _ = layer(inputs, padding)
        trained = [p for p in layer.parameters() if p.requires_grad]
        return [y, *torch.autograd.grad(y, [inputs, *trained], dy, allow_unused=True)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, expected):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)  # the same numbers at every run, too


def _fairseq(command, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", f"fairseq_cli.{command}", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(text, tmp_path_factory):
    """As the fixture of all tests, of a fairseq whose commands need not be installed."""
    folder = tmp_path_factory.mktemp("data")
    prefixes = [part for split in ("train", "valid", "test") for part in (f"--{split}pref", text / f"{split}.txt")]
    _fairseq("preprocess", "--only-source", *prefixes, "--destdir", folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ["--bf16"],
        ["--amp"],
        ["--fp16", "--memory-efficient-fp16"],
        ["--ddp-backend", "fully_sharded"],
        ["--ddp-backend", "fully_sharded", "--min-params-to-wrap", "1000", "--bf16"],
        ["--ddp-backend", "pytorch_ddp"],
        ["--moe-top-k", "8", "--moe-top-k-schedule", "elastic", "--bf16"],
    ],
    ids="".join,
)
def test_training(data, tmp_path, options):
    """Starts, trains, saves, resumes, evaluates; by CPU too."""
    losses = []
    for updates in (20, 40):
        arguments = train_arguments(data, tmp_path, *options, "--max-update", updates, "--log-interval", 10)
        log = _fairseq("train", *(argument for argument in arguments if argument != "--cpu"))
        losses += [float(loss) for loss in re.findall(r'train_inner.*?"loss": "([\d.]+)"', log)]
    assert "Loaded checkpoint" in log
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    evaluations = [eval_arguments(data, tmp_path / "checkpoint_last.pt")]
    evaluations.append([argument for argument in evaluations[0] if argument != "--cpu"])
    found = [re.search(r"Loss \(base 2\): ([\d.]+)", _fairseq("eval_lm", *arguments))[1] for arguments in evaluations]
    assert float(found[0]) == pytest.approx(float(found[1]), abs=0.01)
