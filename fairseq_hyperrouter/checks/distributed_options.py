"""Options of a training on several workers that cannot work, found before it starts."""

from typing import Any

import torch

from fairseq_hyperrouter.config import NO_LAYERS, distill_weight
from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.routing import ROUTERS
from fairseq_hyperrouter.running import running_command
from fairseq_hyperrouter.workers import number_of_workers

OPTION = "--moe-expert-parallel-size"
PYTORCH_DDP = ("pytorch_ddp", "c10d")


def check_workers(cfg: Any) -> None:
    """Raise a UserError for a way to use several workers that stock fairseq would end with a traceback.

    Args:
        cfg: the whole config.
    """
    backend = cfg.distributed_training.ddp_backend
    if backend == "slowmo":
        raise UserError("--ddp-backend slowmo: nobody has tried it with experts; choose pytorch_ddp or legacy_ddp")
    shares = getattr(ROUTERS.get(getattr(cfg.model, "moe_router", "")), "shares_parameters", False)
    if shares and backend == "fully_sharded":
        raise UserError(
            f"--ddp-backend fully_sharded: not with --moe-router {cfg.model.moe_router}, whose layers share "
            "parameters; choose pytorch_ddp or legacy_ddp"
        )
    if number_of_workers() > 1 and backend in PYTORCH_DDP:
        _check_pytorch_ddp(cfg, shares)
    layerdrop = getattr(cfg.model, "decoder_layerdrop", 0)
    if number_of_workers() > 1 and backend == "fully_sharded" and layerdrop:
        raise UserError(f"--decoder-layerdrop {layerdrop}: not with --ddp-backend fully_sharded; choose legacy_ddp")
    on_cpu = cfg.common.cpu or not torch.cuda.is_available()
    if on_cpu and number_of_workers() > 1 and backend not in ("legacy_ddp", "no_c10d"):
        raise UserError(f"--ddp-backend {backend}: stock fairseq needs GPUs for it; on CPUs choose legacy_ddp")


def _check_pytorch_ddp(cfg: Any, layers_share_parameters: bool) -> None:
    """torch's DDP wants the gradient of every parameter, and once: what computes none or two is refused."""
    distills = distill_weight(cfg.criterion, cfg.model) > 0
    layerdrop = getattr(cfg.model, "decoder_layerdrop", 0)
    if layerdrop and (distills or not cfg.distributed_training.find_unused_parameters):
        way_out = "" if distills else "add --find-unused-parameters or "
        raise UserError(f"--decoder-layerdrop {layerdrop}: with several workers {way_out}give --ddp-backend legacy_ddp")
    if not (getattr(cfg.model, "checkpoint_activations", 0) or getattr(cfg.model, "offload_activations", 0)):
        return
    router = getattr(cfg.model, "moe_router", "")
    for is_given, what in (
        (layers_share_parameters, f"--moe-router {router}, whose layers share parameters"),
        (distills, "--moe-distill-wt (by default with an elastic schedule), which computes every batch twice"),
    ):
        if is_given:
            raise UserError(f"--checkpoint-activations: with {what}, several workers need --ddp-backend legacy_ddp")


def check_evaluation_workers(task: str) -> None:
    """Raise a UserError where several workers would print the loss of a share of the set, or could not add theirs up.

    Args:
        task: its name in the registry.
    """
    command = running_command()
    if number_of_workers() > 1 and command == "eval_lm" and task != "hyperrouter":
        raise UserError(f"--task {task}: each of several workers would print the loss of its share, give hyperrouter")
    if number_of_workers() > 1 and command == "validate" and not torch.cuda.is_available():
        raise UserError("fairseq-validate: stock fairseq adds up over GPUs only, use one process on CPUs")


def check_expert_parallel(cfg: Any, size: int) -> None:
    """Raise a UserError for what does not go together with experts that are divided over *size* workers.

    Args:
        cfg: the whole config.
    """
    workers = number_of_workers()
    if cfg.model.moe_layers == NO_LAYERS:
        raise UserError(f"{OPTION} {size}: with --moe-layers {NO_LAYERS} there are no experts to divide")
    if workers % size:
        raise UserError(f"{OPTION} {size}: this training has {workers} worker(s), must be a multiple of it")
    training, common = cfg.distributed_training, cfg.common
    keeps_fp16 = common.fp16_no_flatten_grads or common.memory_efficient_fp16
    for is_given, what, way_out in (
        (training.ddp_backend == "fully_sharded", "--ddp-backend fully_sharded", "it shards parameters itself"),
        (training.zero_sharding != "none", f"--zero-sharding {training.zero_sharding}", "leave it out"),
        (cfg.optimization.use_bmuf, "--use-bmuf", "it averages parameters, leave it out"),
        (cfg.ema.store_ema, "--store-ema", "its copy would hold one worker's experts, leave it out"),
        (common.fp16 and not keeps_fp16, "--fp16", "add --memory-efficient-fp16 or --fp16-no-flatten-grads"),
        (common.amp, "--amp", "workers would skip different updates, give --bf16 or --memory-efficient-fp16"),
        (
            cfg.checkpoint.no_save_optimizer_state,
            "--no-save-optimizer-state",
            "the trainer then does not ask the workers for their experts, leave it out",
        ),
        (
            cfg.model.decoder_layerdrop > 0,
            f"--decoder-layerdrop {cfg.model.decoder_layerdrop}",
            "workers would leave out different layers, give 0",
        ),
        (
            cfg.model.moe_similarity_wt > 0,
            f"--moe-similarity-wt {cfg.model.moe_similarity_wt}",
            "workers would compare other pairs, give 0",
        ),
        (cfg.model.base_layers > 0, f"--base-layers {cfg.model.base_layers}", "each worker would keep its own, give 0"),
    ):
        if is_given:
            raise UserError(f"{what}: not together with {OPTION} {size}: {way_out}")
