"""Options of the MoE layers beside those of the rest: stock model, task and criterion.

What the options say by themselves is checked by ``MoEConfig.check`` in config.py.
"""

import logging
from typing import Any

import torch

from fairseq_hyperrouter.config import NO_LAYERS, MoEConfig, default_distill_weight
from fairseq_hyperrouter.errors import UserError, option_name
from fairseq_hyperrouter.experts.backend import check_device
from fairseq_hyperrouter.experts.state import saved_tensors
from fairseq_hyperrouter.routing import ROUTERS, Router

logger = logging.getLogger(__name__)


def check_decoder(args: Any) -> None:
    """Raise a UserError (a ValueError) for what does not go together with MoE layers in a decoder.

    Args:
        args: the options of the model.
    """
    if getattr(ROUTERS.get(args.moe_router), "looks_ahead", False):
        raise UserError(f"--moe-router {args.moe_router}: looks at later tokens, which a decoder must not")
    for name in ("scale_fc", "quant_noise_pq", "quant_noise_scalar"):
        if getattr(args, name, 0):
            raise UserError(f"{option_name(name)} {getattr(args, name)}: does not reach inside experts, leave it out")


def check_routing_parts(cfg: Any, task: Any) -> None:
    """Raise a UserError where a part of the training that the routers need is missing.

    The criterion must add their losses and log their loads; the task must tell them the loads. And where an option is
    about a part of the training that there is not.
    """
    moe, router = cfg.model, ROUTERS.get(cfg.model.moe_router)
    if router is None:  # the decoder's to refuse
        return
    hears_load = moe.moe_loss_free_rate or router.learns_from_load
    for option, is_needed in (
        (f"--moe-loss-free-rate {moe.moe_loss_free_rate}", moe.moe_loss_free_rate),
        (f"--moe-similarity-wt {moe.moe_similarity_wt}", moe.moe_similarity_wt),
        (f"--moe-router {moe.moe_router}", router.has_loss or router.learns_from_load),
    ):
        if is_needed and hears_load and not hasattr(task, "update_load"):
            raise UserError(f"{option}: needs --task hyperrouter")
        if is_needed and cfg.criterion._name != "moe_cross_entropy":
            raise UserError(f"{option}: needs --criterion moe_cross_entropy")
    if router.ignores_x:
        for name in ("moe_gate_loss_wt", "moe_z_loss_wt", "moe_mi_loss_wt"):
            if getattr(cfg.criterion, name, 0):
                weight = getattr(cfg.criterion, name)
                raise UserError(f"{option_name(name)} {weight}: {moe.moe_router} has nothing that learns; leave it out")
    _check_schedule(cfg, MoEConfig.from_namespace(moe))
    _check_distillation(cfg, MoEConfig.from_namespace(moe))
    stage1, updates = moe.moe_stage1_updates, cfg.optimization.max_update
    if "moe_stage1_updates" in router.takes:
        if stage1 is None and not updates:
            raise UserError("--moe-stage1-updates: is required when --max-update is not set")
        if stage1 is not None and 0 < updates <= stage1:
            logger.warning(f"--moe-stage1-updates {stage1}: --max-update {updates} ends before the second stage")


def _check_schedule(cfg: Any, moe: MoEConfig) -> None:
    """Options about a k that changes, where it does not."""
    length = moe.moe_top_k_schedule_updates
    if length > 0 and length != cfg.optimization.max_update and not moe.schedule.needs_updates:  # max_update: default
        raise UserError(
            f"--moe-top-k-schedule-updates {length}: means nothing to {moe.moe_top_k_schedule}; leave it out, "
            "or give --moe-top-k-schedule linear, cosine, exponential or steps, or --moe-top-k-start with elastic"
        )


def _check_distillation(cfg: Any, moe: MoEConfig) -> None:
    """It needs a k that changes, and a criterion that distils."""
    given = getattr(cfg.criterion, "moe_distill_wt", None)
    if given and moe.moe_top_k_schedule == "constant":
        raise UserError(f"--moe-distill-wt {given}: with a constant k there is nothing larger to learn from; give 0")
    if given and not ROUTERS[moe.moe_router].can_distill:
        raise UserError(f"--moe-distill-wt {given}: {moe.moe_router} trains with as many experts at every k; give 0")
    can_distill = hasattr(cfg.criterion, "moe_distill_wt")
    if not can_distill and moe.moe_layers != NO_LAYERS and default_distill_weight(moe) > 0:
        logger.warning(
            f"--moe-top-k-schedule {moe.moe_top_k_schedule}: --criterion {cfg.criterion._name} trains without "
            "distillation, which this schedule has by default with --criterion moe_cross_entropy"
        )


def check_backend_here(cfg: Any) -> None:
    """Raise a UserError for a backend that cannot compute where this training will."""
    check_device(cfg.model.moe_backend, "cuda" if torch.cuda.is_available() and not cfg.common.cpu else "cpu")


def check_average(cfg: Any, model: Any) -> None:
    """Raise a UserError for an average of weights where *model* has tensors that have none.

    Stock's --store-ema multiplies every tensor of a checkpoint by a decay, and stops at whole numbers.
    """
    if not cfg.ema.store_ema:
        return
    for name, value in saved_tensors(model).items():
        if not value.is_floating_point():
            option = f"--moe-router {cfg.model.moe_router}"
            if name.endswith("balancing_steps"):
                option = f"--moe-loss-free-rate {cfg.model.moe_loss_free_rate}"
            elif ".moe." not in name:
                option = "adaptive softmax"
            raise UserError(f"--store-ema: not together with {option}, whose {name.rpartition('.')[2]} has no average")


def warn_of_untaught_routers(model: Any) -> None:
    """Say so where the text can teach trained routers of *model* nothing: a single gate that is always 1."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    trained = any(parameter.requires_grad for router in routers for parameter in router.parameters())
    untaught = all(router.gates_sum_to_1 and not router.has_loss for router in routers)
    if model.decoder.schedule.largest == 1 and trained and untaught:
        logger.warning(
            "--moe-top-k 1: the only gate is always 1, so no gradient of the text reaches the router; "
            "--moe-gate-softmax all or sigmoid lets one through"
        )
