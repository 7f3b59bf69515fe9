"""What an optimizer does over all workers when the experts are divided over them."""

import pytest
import torch
import torch.distributed as dist
from fairseq import optim
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fairseq_hyperrouter import LinearRouter, MoELayer, UserError
from fairseq_hyperrouter.experts import ExpertParallel
from fairseq_hyperrouter.optim import divide_experts
from tests.workers import on_workers

ARGPARSE = {
    "momentum": 0.0,
    "weight_decay": 0.0,
    "adafactor_eps": "(1e-30, 1e-3)",
    "clip_threshold": 1.0,
    "decay_rate": -0.8,
    "beta1": None,
    "scale_parameter": False,
    "relative_step": False,
    "warmup_init": False,
}
"""What stock's optimizers without a dataclass expect."""


def config(name="adam", **common):
    cfg = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(FairseqConfig)))
    cfg.optimizer = {"_name": name, "lr": [0.1], **(ARGPARSE if name in ("sgd", "adagrad", "adafactor") else {})}
    cfg.optimization.update_freq = [1]
    cfg.common.update(common)
    return cfg


class Model(nn.Module):
    """A MoE layer between two others; 4 experts, divided over *size* workers."""

    def __init__(self, size=None):
        super().__init__()
        parallel = ExpertParallel(size) if size else None
        self.embed = nn.Linear(5, 6)
        self.moe = MoELayer(LinearRouter(6, 4), 8, top_k=2, parallel=parallel)
        self.out = nn.Linear(6, 1)

    def forward(self, x):
        return self.out(self.moe(self.embed(x))[0]).mean()


def whole_model():
    torch.manual_seed(0)
    return Model()


def batches():
    return torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(3))


def clip(_):
    """The norm that each worker finds, and what is left of the gradients; every gradient is its parameter."""
    cfg, model = config("sgd"), Model(size=2)
    model.load_state_dict(whole_model().state_dict())
    divide_experts(cfg, model)
    optimizer = optim.build_optimizer(cfg.optimizer, list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
        if hasattr(parameter, "expert"):
            parameter.grad /= dist.get_world_size() / 2  # two replicas add up to it
    norm = optimizer.clip_grad_norm(0.5)
    return norm, {name: parameter.grad for name, parameter in model.named_parameters()}, type(optimizer).__name__


@pytest.mark.parametrize("workers", [2, 4])
def test_one_norm_for_all_and_each_expert_once(preloaded, tmp_path, workers):
    model = whole_model()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()]).norm()
    for rank, (norm, gradients, name) in enumerate(on_workers(preloaded, clip, workers, tmp_path / "job", None)):
        torch.testing.assert_close(norm, expected)
        assert name == "SGD"
        for key, parameter in model.named_parameters():
            mine = parameter.detach().chunk(2)[rank % 2] if "experts" in key else parameter.detach()
            torch.testing.assert_close(gradients[key], mine * 0.5 / expected, rtol=1e-5, atol=1e-6)


def overflow(_):
    """One worker's experts have an infinite gradient: which error each worker's optimizer ends with."""
    cfg, model = config(fp16=True, fp16_no_flatten_grads=True, fp16_init_scale=4), Model(size=2).half()
    divide_experts(cfg, model)
    optimizer = optim.FP16Optimizer.build_optimizer(cfg, list(model.parameters()))
    optimizer.backward(sum(p.float().sum() for p in model.parameters()))
    if dist.get_rank() == 1:
        model.moe.experts.weight1.grad[0, 0, 0] = float("inf")
    with pytest.raises(OverflowError):
        optimizer.clip_grad_norm(1.0)
    return optimizer.scaler.loss_scale


def test_an_overflow_is_everybodys(preloaded, tmp_path):
    assert on_workers(preloaded, overflow, 2, tmp_path / "job", None) == [2, 2]


def torch_ddp(size):
    """Gradients of the mean over the workers' batches, by torch's DistributedDataParallel."""
    model = Model(size=size)
    model.load_state_dict(whole_model().state_dict())
    if size:
        divide_experts(config(), model)
    ddp = DistributedDataParallel(model)
    ddp(batches()[dist.get_rank()]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("size", [None, 2], ids=["replicated", "divided"])
def test_torch_ddp(preloaded, tmp_path, size):
    model = whole_model()
    (sum(model(batch) for batch in batches()) / 2).backward()
    for rank, gradients in enumerate(on_workers(preloaded, torch_ddp, 2, tmp_path / "job", size)):
        for name, parameter in model.named_parameters():
            mine = parameter.grad.chunk(2)[rank] if size and "experts" in name else parameter.grad
            torch.testing.assert_close(gradients[name], mine, rtol=1e-5, atol=1e-7, msg=f"{rank} {name}")


def crash_path(_):
    """An error of one worker alone must not wait for the others; one that all have may."""
    cfg, model = config(), Model(size=2)
    divide_experts(cfg, model)
    optimizer = optim.build_optimizer(cfg.optimizer, list(model.parameters()))
    with pytest.raises(RuntimeError, match="consolidate_state_dict"):
        optimizer.state_dict()
    if dist.get_rank() == 0:
        try:
            raise KeyError("only here")
        except KeyError as error:
            with pytest.raises(KeyError) as caught:
                optimizer.optimizer.consolidate_state_dict()
            assert caught.value is error
    try:
        raise FloatingPointError("everywhere")
    except FloatingPointError:
        optimizer.optimizer.consolidate_state_dict()
    return None


def test_the_crash_path_does_not_hang(preloaded, tmp_path):
    on_workers(preloaded, crash_path, 2, tmp_path / "job", None)


def refused(_):
    for name in ("adafactor", "adagrad", "composite", "lamb"):
        cfg, model = config(name), Model(size=1)
        divide_experts(cfg, model)
        with pytest.raises(UserError, match=f"--optimizer {name}: not together with --moe-expert-parallel-size"):
            optim.build_optimizer(cfg.optimizer, list(model.parameters()))


def test_optimizers_that_look_at_whole_tensors(preloaded, tmp_path):
    on_workers(preloaded, refused, 1, tmp_path / "job", None)


def test_it_is_not_an_option_of_its_own():
    with pytest.raises(UserError, match="--optimizer expert_parallel: is what --moe-expert-parallel-size makes"):
        optim.build_optimizer(OmegaConf.create({"_name": "expert_parallel"}), [nn.Parameter(torch.zeros(1))])
