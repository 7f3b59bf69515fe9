"""What cannot work on several workers is refused, with a way out."""

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.checks import distributed_options
from fairseq_hyperrouter.checks.distributed_options import check_expert_parallel, check_workers


@pytest.fixture
def cfg(monkeypatch):
    """The config of a training on 4 workers."""
    monkeypatch.setattr(distributed_options, "number_of_workers", lambda: 4)
    cfg = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(FairseqConfig)))
    cfg.model = {"decoder_layerdrop": 0.0, "moe_layers": None, "base_layers": 0, "moe_top_k_schedule": "constant"}
    cfg.model.update({"moe_router": "smoe", "moe_similarity_wt": 0.0})
    cfg.criterion = {"moe_distill_wt": None}
    cfg.distributed_training.ddp_backend = "legacy_ddp"
    return cfg


def message(check, *args):
    with pytest.raises(UserError) as caught:
        check(*args)
    return str(caught.value)


def test_what_works(cfg):
    for options in ({}, {"common.bf16": True}, {"common.fp16": True, "common.memory_efficient_fp16": True}):
        for name, value in options.items():
            OmegaConf.update(cfg, name, value)
        check_expert_parallel(cfg, 2)
        check_workers(cfg)


@pytest.mark.parametrize(
    "option, value, expected",
    [
        (
            "distributed_training.ddp_backend",
            "fully_sharded",
            "--ddp-backend fully_sharded: not together with --moe-expert-parallel-size 2: it shards parameters itself",
        ),
        ("distributed_training.zero_sharding", "os", "--zero-sharding os: not together with"),
        ("optimization.use_bmuf", True, "--use-bmuf: not together with"),
        ("ema.store_ema", True, "--store-ema: not together with"),
        ("common.fp16", True, "--fp16: not together with --moe-expert-parallel-size 2: add --memory-efficient-fp16 or"),
        ("common.amp", True, "--amp: not together with"),
        ("checkpoint.no_save_optimizer_state", True, "--no-save-optimizer-state: not together with"),
        ("model.moe_layers", "none", "--moe-expert-parallel-size 2: with --moe-layers none there are no experts"),
        ("model.decoder_layerdrop", 0.1, "--decoder-layerdrop 0.1: not together with"),
        ("model.base_layers", 1, "--base-layers 1: not together with"),
        ("model.moe_similarity_wt", 0.1, "--moe-similarity-wt 0.1: not together with"),
    ],
)
def test_refused_with_divided_experts(cfg, option, value, expected):
    OmegaConf.update(cfg, option, value)
    assert message(check_expert_parallel, cfg, 2).startswith(expected)


def test_workers_must_be_a_multiple(cfg):
    expected = "--moe-expert-parallel-size 3: this training has 4 worker(s), must be a multiple of it"
    assert message(check_expert_parallel, cfg, 3) == expected


@pytest.mark.parametrize("backend", ["pytorch_ddp", "fully_sharded"])
def test_gpu_only_backends(cfg, monkeypatch, backend):
    cfg.distributed_training.ddp_backend = backend
    expected = f"--ddp-backend {backend}: stock fairseq needs GPUs for it; on CPUs choose legacy_ddp"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_workers(cfg)
    cfg.common.cpu = True
    assert message(check_workers, cfg) == expected
    monkeypatch.setattr(distributed_options, "number_of_workers", lambda: 1)
    check_workers(cfg)


def test_layers_that_share_parameters_are_not_sharded(cfg):
    cfg.distributed_training.ddp_backend, cfg.model.moe_router = "fully_sharded", "recurrent"
    expected = "--ddp-backend fully_sharded: not with --moe-router recurrent, whose layers share parameters"
    assert message(check_workers, cfg).startswith(expected)


@pytest.fixture
def on_gpus(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg.distributed_training.ddp_backend = "pytorch_ddp"
    return cfg


def test_layerdrop_leaves_parameters_without_gradients(on_gpus):
    on_gpus.model.decoder_layerdrop = 0.5
    expected = "--decoder-layerdrop 0.5: with several workers add --find-unused-parameters or give --ddp-backend legacy"
    assert message(check_workers, on_gpus).startswith(expected)
    on_gpus.distributed_training.find_unused_parameters = True
    check_workers(on_gpus)
    on_gpus.model.moe_top_k_schedule = "elastic"
    expected = "--decoder-layerdrop 0.5: with several workers give --ddp-backend legacy_ddp"
    assert message(check_workers, on_gpus) == expected
    on_gpus.distributed_training.ddp_backend = "fully_sharded"
    expected = "--decoder-layerdrop 0.5: not with --ddp-backend fully_sharded; choose legacy_ddp"
    assert message(check_workers, on_gpus) == expected


@pytest.mark.parametrize("option", ["checkpoint_activations", "offload_activations"])
def test_two_gradients_of_one_parameter(on_gpus, option):
    on_gpus.model[option] = True
    check_workers(on_gpus)
    on_gpus.criterion.moe_distill_wt = 0.5
    expected = "--checkpoint-activations: with --moe-distill-wt (by default with an elastic schedule), which computes"
    assert message(check_workers, on_gpus).startswith(expected)
    on_gpus.criterion.moe_distill_wt = None
    on_gpus.model.moe_top_k_schedule = "elastic"
    assert message(check_workers, on_gpus).startswith(expected)
    on_gpus.criterion.moe_distill_wt = 0.0
    check_workers(on_gpus)
    on_gpus.criterion.moe_distill_wt = None
    del on_gpus.model.moe_top_k_schedule  # a dense model
    OmegaConf.set_struct(on_gpus.model, True)
    check_workers(on_gpus)
    OmegaConf.set_struct(on_gpus.model, False)
    on_gpus.model.moe_router = "recurrent"
    expected = "--checkpoint-activations: with --moe-router recurrent, whose layers share parameters, several workers"
    assert message(check_workers, on_gpus).startswith(expected)
    on_gpus.distributed_training.ddp_backend = "legacy_ddp"
    check_workers(on_gpus)


def test_slowmo(cfg):
    cfg.distributed_training.ddp_backend = "slowmo"
    assert message(check_workers, cfg).startswith("--ddp-backend slowmo: nobody has tried it with experts")
