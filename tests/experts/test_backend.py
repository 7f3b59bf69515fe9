"""Every backend computes what a loop over tokens and experts computes, forward and backward."""

import logging

import pytest
import torch
import torch.nn.functional as F

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.experts import ExpertBank
from fairseq_hyperrouter.experts import backend as backends
from fairseq_hyperrouter.experts.backend import BACKENDS, HAS_GROUPED_MM, HAS_TRITON
from fairseq_hyperrouter.experts.block_products import BLOCK_ROWS
from fairseq_hyperrouter.native import usable
from tests.reference import feed_forward

EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
FLOAT32 = ("grouped", "native", "triton")  # what they are made for
SIZES = {"num_experts": 3, "embed_dim": 4, "ffn_embed_dim": 8}


def bank(backend, dtype=None, **options):
    if backend == "grouped" and not HAS_GROUPED_MM:
        pytest.skip("this torch has no grouped_mm")
    if backend == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    if backend == "triton" and (dtype == torch.bfloat16 or torch.cuda.is_available()):
        pytest.skip("tests/test_on_gpu.py looks at it; Triton's interpreter multiplies bfloat16 as integers")
    if backend == "native" and not usable.has_native():
        pytest.skip("no compiler, or a processor without AVX-512")
    # grouped_mm refuses float64
    return ExpertBank(**{**SIZES, "backend": backend, **options}).to(dtype or widest(backend))


def widest(backend):
    return torch.float32 if backend in FLOAT32 else torch.float64


def run(experts, x, index, gate, kept=None):
    """y and the gradients of x, gate and every weight, for a fixed gradient of y; in float64."""
    x, gate = x.clone().requires_grad_(), gate.clone().requires_grad_()
    y = experts(x, index, gate, kept)
    inputs = {"x": x, "gate": gate, **dict(experts.named_parameters())}
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad((y * weight).sum(), list(inputs.values()))
    assert y.dtype == x.dtype and all(g.dtype == i.dtype for g, i in zip(gradients, inputs.values()))
    return y.double(), {name: gradient.double() for name, gradient in zip(inputs, gradients)}


class SlowBank(torch.nn.Module):
    """One token and one expert at a time, in float64, with the weights of a bank."""

    def __init__(self, experts):
        super().__init__()
        for name, weight in experts.named_parameters():
            self.register_parameter(name, torch.nn.Parameter(weight.detach().double()))

    def forward(self, x, index, gate, kept):
        y = torch.zeros_like(x) + 0 * (x.sum() + gate.sum() + sum(p.sum() for p in self.parameters()))
        for t, (token, experts) in enumerate(zip(x, index.tolist())):
            for k, expert in enumerate(experts):
                if kept is None or kept[t, k]:
                    out = feed_forward(token, *(p[expert] for p in self.parameters()))
                    y = y.index_add(0, torch.tensor([t]), (gate[t, k] * out)[None])
        return y


INDEX = {
    "mixed": torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [0, 2]]),
    "expert 1 unused": torch.tensor([[0, 2], [2, 0], [0, 2]]),
    "all on expert 2": torch.full((7, 1), 2),
    "one token": torch.tensor([[1]]),
    "no token": torch.empty(0, 2, dtype=torch.long),
    "several blocks": torch.cat([torch.zeros(BLOCK_ROWS + 3), torch.ones(2 * BLOCK_ROWS)]).long()[:, None],
}


@EVERY_BACKEND
@pytest.mark.parametrize("index", INDEX.values(), ids=INDEX)
@pytest.mark.parametrize("dropping", ["nothing", "some", "everything"])
def test_outputs_and_gradients(backend, index, dropping):
    experts = bank(backend)
    x = torch.randn(len(index), 4).to(widest(backend))
    gate = torch.rand(index.shape).to(widest(backend))
    places = torch.arange(index.numel()).view_as(index)
    kept = {"nothing": None, "some": places % 3 != 1, "everything": places < 0}[dropping]
    found = run(experts, x, index, gate, kept)
    expected = run(SlowBank(experts), x.double(), index, gate.double(), kept)
    near = {"rtol": 1e-4, "atol": 1e-5 * max(1, len(index) ** 0.5)} if backend in FLOAT32 else {}
    torch.testing.assert_close(found, expected, **near)


@EVERY_BACKEND
@pytest.mark.parametrize("activation", [F.relu, F.gelu, F.silu, torch.tanh, lambda x: x, lambda x: F.gelu(x) ** 2])
def test_activations(backend, activation):
    experts = bank(backend, activation=activation)
    x, gate = torch.randn(5, 4).to(widest(backend)), torch.rand(5, 2).to(widest(backend))
    reference = bank("loop", activation=activation)
    reference.load_state_dict(experts.state_dict())
    expected = run(reference, x.double(), INDEX["mixed"], gate.double())
    near = {"rtol": 1e-4, "atol": 1e-5} if backend in FLOAT32 else {}
    torch.testing.assert_close(run(experts, x, INDEX["mixed"], gate), expected, **near)


@EVERY_BACKEND
def test_gradcheck(backend):
    if backend in ("native", "grouped", "triton"):
        pytest.skip("no float64, which gradcheck needs; runs, or the blocks, share the autograd function")
    experts = bank(backend, activation=F.silu, dtype=torch.float64)
    names, weights = zip(*experts.named_parameters())
    index, kept = INDEX["mixed"], torch.ones(5, 2, dtype=torch.bool)
    kept[1, 0] = False

    def forward(x, gate, *weights):
        return torch.func.functional_call(experts, dict(zip(names, weights)), (x, index, gate, kept))

    x, gate = torch.randn(5, 4).double().requires_grad_(), torch.rand(5, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, gate, *weights))


@EVERY_BACKEND
@pytest.mark.parametrize("activation", [F.relu, F.gelu])
def test_dropout(backend, activation):
    """Two tokens through an expert whose hidden units are all activation(1), and whose outputs are their sum."""
    experts = bank(backend, num_experts=1, ffn_embed_dim=4000, activation=activation, dropout=0.25)
    with torch.no_grad():
        for name, value in (("weight1", 0), ("bias1", 1), ("weight2", 1), ("bias2", 0)):
            experts.get_parameter(name).fill_(value)
    x, gate = torch.ones(2, 4).to(widest(backend)), torch.ones(2, 1).to(widest(backend))
    both = torch.zeros(2, 1, dtype=torch.long)
    value = activation(torch.ones(())).double()
    y, gradients = run(experts, x, both, gate)
    torch.testing.assert_close(y / value, torch.full_like(y, 4000), rtol=0.05, atol=0)  # as many as without
    kinds = gradients["weight2"][0, :, 0].round(decimals=4).unique()
    assert len(kinds) == 4  # a unit is kept in both rows, in one, the other, or none
    # The masks of the backward pass are those of the forward pass: units that were kept, weighted as run() does.
    weight = torch.linspace(-1, 2, 8).double().view(2, 4)
    near = {"rtol": 1e-4, "atol": 1e-2}
    torch.testing.assert_close(gradients["weight2"][0].sum(0), weight.t() @ y[:, 0], **near)
    slope = torch.autograd.functional.jacobian(activation, torch.ones(())).double()
    torch.testing.assert_close(gradients["bias1"].sum(), weight.sum(1) @ y[:, 0] / value * slope, **near)
    torch.testing.assert_close(gradients["gate"][:, 0], y[:, 0] * weight.sum(1), **near)
    experts.eval()
    torch.testing.assert_close(run(experts, x, both, gate)[0] / value, torch.full_like(y, 4000), **near)


@EVERY_BACKEND
def test_deterministic(backend):
    experts = bank(backend, num_experts=8, embed_dim=16, ffn_embed_dim=16, dtype=torch.float32)
    x, gate = torch.randn(300, 16), torch.rand(300, 4)
    index = torch.rand(300, 8).topk(4).indices
    first, second = (run(experts, x, index, gate) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@EVERY_BACKEND
def test_bfloat16(backend):
    """Outputs of many experts are added up in float32: the error does not grow with k."""
    options = {"num_experts": 8, "embed_dim": 16, "ffn_embed_dim": 32, "activation": torch.tanh}
    experts = bank(backend, dtype=torch.bfloat16, **options)
    exact = ExpertBank(**options, backend="loop").double()
    exact.load_state_dict(experts.state_dict())
    x, gate = torch.randn(30, 16).bfloat16(), torch.rand(30, 8)
    index = torch.rand(30, 8).argsort()
    (y, found), (expected_y, expected) = run(experts, x, index, gate), run(exact, x.double(), index, gate.double())
    torch.testing.assert_close(y, expected_y, rtol=0.02, atol=0.02)
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 0.02, (name, error)


@EVERY_BACKEND
@pytest.mark.parametrize("already", [False, True])
def test_autocast(backend, already):
    """As without it, but for the dtype of the products; parameters and their gradients stay float32.

    A layer before this one may have made x what autocast makes of it already.
    """
    experts = bank(backend, num_experts=8, embed_dim=16, ffn_embed_dim=32, dtype=torch.float32)
    x, gate = torch.randn(30, 16, requires_grad=True), torch.rand(30, 2)
    index = torch.rand(30, 8).topk(2).indices
    short = torch.float16 if backend == "triton" else torch.bfloat16  # which its interpreter takes for integers
    with torch.autocast("cpu", short):
        y = experts(x.to(short) if already else x, index, gate)
    assert y.dtype == short
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in experts.parameters())
    torch.testing.assert_close(y.float(), experts(x, index, gate), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_gates_of_another_dtype(backend):
    """C code, which reads addresses, must not take them for its own."""
    if backend == "native" and not usable.has_native():
        pytest.skip("no C code here")
    experts = bank(backend, dtype=torch.float32)
    x, gate = torch.randn(5, 4), torch.rand(5, 2)
    y = experts(x, INDEX["mixed"], gate.double())
    torch.testing.assert_close(y, experts(x, INDEX["mixed"], gate))


@EVERY_BACKEND
def test_without_gradients(backend):
    experts = bank(backend)
    x, gate = torch.randn(5, 4).to(widest(backend)), torch.rand(5, 2).to(widest(backend))
    trained = experts(x, INDEX["mixed"], gate)
    with torch.no_grad():
        y = experts(x, INDEX["mixed"], gate)
    assert trained.requires_grad and not y.requires_grad
    assert torch.equal(trained, y)


@pytest.mark.parametrize("backend", ["grouped", "blocks"])
@pytest.mark.parametrize("dropping", [False, True])
def test_nothing_is_copied_to_the_host(backend, dropping):
    """Tensors of the device "meta" have no values: whoever asks for one, as a copy from a GPU would, fails."""
    experts = bank(backend, dtype=torch.bfloat16, embed_dim=8, dropout=0.1).to("meta")
    x = torch.empty(20, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    gate = torch.empty(20, 2, device="meta", requires_grad=True)
    index = torch.empty(20, 2, dtype=torch.long, device="meta")
    kept = torch.empty(20, 2, dtype=torch.bool, device="meta") if dropping else None
    experts(x, index, gate, kept).sum().backward()
    assert x.grad.shape == x.shape and experts.weight1.grad.shape == experts.weight1.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        bank("runs", dtype=torch.bfloat16, embed_dim=8).to("meta")(x, index, gate)


@EVERY_BACKEND
@pytest.mark.parametrize("activation", [F.relu, F.gelu])
def test_a_retained_graph(backend, activation):
    """Goes backward as often as one likes; without it nothing is kept after the first time."""
    experts = bank(backend, activation=activation, dropout=0.3)
    x, gate = torch.randn(5, 4).to(widest(backend)).requires_grad_(), torch.rand(5, 2).to(widest(backend))
    y = experts(x, INDEX["mixed"], gate).sum()
    inputs = [x, *experts.parameters()]
    first, second = (torch.autograd.grad(y, inputs, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, torch.autograd.grad(y, inputs), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, inputs)


@EVERY_BACKEND
def test_differentiated_twice(backend):
    """Right, or refused: never without its second derivative."""
    experts = bank(backend)
    x, gate = torch.randn(5, 4).to(widest(backend)).requires_grad_(), torch.rand(5, 2).to(widest(backend))
    y = experts(x, INDEX["mixed"], gate).sum()
    if backend == "loop":
        assert torch.autograd.grad(y, x, create_graph=True)[0].requires_grad
    else:
        with pytest.raises(RuntimeError, match="experts can be differentiated once"):
            torch.autograd.grad(y, x, create_graph=True)


def test_grouped_refuses_odd_widths():
    with pytest.raises(UserError, match="--moe-backend grouped: experts of width 4 and 6, must be multiples of 4"):
        bank("grouped", ffn_embed_dim=6)(torch.randn(5, 4), INDEX["mixed"], torch.rand(5, 2))


def test_grouped_refuses_float64():
    with pytest.raises(UserError, match="--moe-backend grouped: torch's grouped_mm has no float64; choose auto"):
        bank("grouped", torch.float64)(torch.randn(5, 4).double(), INDEX["mixed"], torch.rand(5, 2).double())


def test_triton_refuses_what_it_cannot(monkeypatch):
    inputs = torch.randn(5, 4), INDEX["mixed"], torch.rand(5, 2)
    with pytest.raises(UserError, match="--moe-backend triton: adds up in float32, and gets float64; choose blocks"):
        bank("triton", torch.float64)(inputs[0].double(), *inputs[1:])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="--moe-backend triton: needs a GPU, and computes on a cpu here"):
        bank("triton")(*inputs)
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(UserError, match="--moe-backend triton: needs the package triton"):
        backends.check_backend("--moe-backend", "triton")


def test_unknown_backend():
    with pytest.raises(UserError, match=r"'fast': choose from auto, runs, native, grouped, blocks, triton, loop"):
        ExpertBank(**SIZES, backend="fast")


def test_grouped_needs_a_new_torch(monkeypatch):
    monkeypatch.setattr(backends, "HAS_GROUPED_MM", False)
    with pytest.raises(UserError, match=r"--moe-backend grouped: needs torch 2\.10 or later"):
        backends.check_backend("--moe-backend", "grouped")


def test_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_logged", set())
    experts = ExpertBank(**SIZES)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            experts(torch.randn(5, 4), INDEX["mixed"], torch.rand(5, 2))
    name = "native" if usable.has_native() else "runs"
    assert [record.message for record in caplog.records] == [
        f"experts are computed by the backend {name} (cpu, float32)"
    ]


@pytest.mark.parametrize("compiled, name", [(False, "runs"), (True, "native")])
def test_choice_on_a_cpu(monkeypatch, compiled, name):
    """Many small experts with few rows are computed together, where ``grouped_mm`` can; else one after the other."""
    if compiled:
        bank(name)  # skips where there is none
    names = []
    monkeypatch.setattr(backends, "has_native", lambda: compiled)
    monkeypatch.setattr(backends, "_log_once", lambda name, x: names.append(name))

    def chosen(tokens, used=16, num_experts=16, embed_dim=64, ffn_embed_dim=128, dtype=torch.float32):
        experts = ExpertBank(num_experts, embed_dim, ffn_embed_dim).to(dtype)
        index = torch.arange(tokens)[:, None] % used
        experts(torch.randn(tokens, embed_dim, dtype=dtype), index, torch.ones(tokens, 1, dtype=dtype))
        return names.pop()

    together = "grouped" if backends.HAS_GROUPED_MM else name
    assert chosen(8 * 16) == together
    assert chosen(8 * 16 + 1) == name  # work of an expert
    assert chosen(16 * 16, embed_dim=32) == together
    assert chosen(16 * 16 + 1, embed_dim=32) == name  # rows of an expert
    assert chosen(8 * 16, used=15) == chosen(8 * 16, used=1, num_experts=32) == name
    assert chosen(0) == name
    assert chosen(16, embed_dim=63) == chosen(16, ffn_embed_dim=192) == name
    assert chosen(16, dtype=torch.float64) == "runs"


def test_grouped_takes_weights_in_any_layout():
    experts, x, gate = bank("grouped"), torch.randn(5, 4), torch.rand(5, 2)
    wide = torch.zeros(3, 4, 9)
    wide[:, :, 1:] = experts.weight1.detach()
    y = torch.func.functional_call(experts, {"weight1": wide[:, :, 1:]}, (x, INDEX["mixed"], gate))
    assert torch.equal(y, experts(x, INDEX["mixed"], gate))
