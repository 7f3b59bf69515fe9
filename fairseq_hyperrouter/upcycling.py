"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): start experts from a trained dense model.

Dimensions: D model, F hidden, E experts.
"""

import logging
import re
from pathlib import Path
from typing import Any, Dict

import torch
from fairseq import checkpoint_utils
from torch import Tensor, nn

from .checks.checkpoint_file import read_model_cfg, restored_checkpoint
from .config import NO_LAYERS
from .errors import UserError, option_name
from .experts.state import saved_tensors
from .moe_layer import MoELayer

logger = logging.getLogger(__name__)
OPTION = "--moe-upcycle-from"
MEANING = (
    *("activation_fn", "decoder_attention_heads", "decoder_normalize_before", "no_decoder_final_norm"),
    *("no_scale_embedding", "no_token_positional_embeddings", "decoder_learned_pos", "layernorm_embedding"),
    *("decoder_xformers_att_config", "scale_attn", "scale_heads", "scale_resids"),
)
"""Stock options that change what the same tensors compute."""


def check_upcycling(cfg: Any) -> bool:
    """Whether a training with this whole config starts from a dense model; not when it resumes one of its own.

    Raises:
        UserError (a ValueError): an option with which the first output would not be the dense model's.
    """
    path, model = cfg.model.moe_upcycle_from, cfg.model
    if cfg.checkpoint.finetune_from_model:
        raise UserError(f"{OPTION} {path}: not together with --finetune-from-model, which would replace it")
    if restored_checkpoint(cfg.checkpoint) is not None:
        return False
    if model.moe_shared_experts:
        raise UserError(f"{OPTION} {path}: not together with --moe-shared-experts, they would come on top")
    if not Path(path).is_file():
        raise UserError(f"{OPTION} {path}: no such file" if not Path(path).exists() else f"{OPTION} {path}: no file")
    if model.moe_layers == NO_LAYERS:
        raise UserError(f"{OPTION} {path}: --moe-layers {NO_LAYERS} leaves no expert to start from it")
    dense = read_model_cfg(Path(path))
    if "encoder_layers" in dense:
        raise UserError(f"{OPTION} {path}: has an encoder, give a language model's checkpoint")
    for name in MEANING:
        here = getattr(model, name, None)
        if name in dense and (dense[name] or None) != (here or None):
            raise UserError(f"{option_name(name)} {here}: {OPTION} {path} was trained with {dense[name]}, give that")
    return True


def upcycle(model: nn.Module, path: str) -> None:
    """Load a dense checkpoint of the same shape into *model*, whose decoder has MoE layers.

    1. The checkpoint is brought to the names of today's fairseq, as stock does when it loads one.
    2. Every expert of a MoE layer becomes a copy of the dense layer's feed-forward: W1_i = fc1^T (D, F), W2_i = fc2^T
       (F, D), i = 1 .. E; the router stays as it was drawn.
    3. Everything else is loaded as it is.

    Gates g_i that sum to 1 then make the model compute what the dense one computes, sum_i g_i FFN(x) = FFN(x), for
    every k; in training as long as no capacity drops tokens.

    Raises:
        UserError (a ValueError): a checkpoint whose tensors do not fit, the first of which is named.
    """
    dense: Dict[str, Tensor] = dict(checkpoint_utils.load_checkpoint_to_cpu(path)["model"])
    model.upgrade_state_dict(dense)
    if not all(layer.router.gates_sum_to_1 for layer in model.modules() if isinstance(layer, MoELayer)):
        gates = "--moe-gate-softmax selected, and no router with gates of its own"
        raise UserError(f"{OPTION} {path}: needs gates that sum to 1, give {gates}")
    if any(".moe." in name for name in dense):
        raise UserError(f"{OPTION} {path}: has experts already, give a dense model's checkpoint")
    wanted = saved_tensors(model)
    if any("_fsdp_wrapped_module" in name for name in wanted):  # one flat tensor per layer
        options = "--checkpoint-activations, or with --min-params-to-wrap as low as this"
        raise UserError(f"{OPTION} {path}: not with --ddp-backend fully_sharded and {options}")
    found: Dict[str, Tensor] = {}
    for name, value in wanted.items():
        source = re.sub(r"\.moe\.experts\.(weight|bias)([12])$", r".fc\2.\1", name)
        if source != name and source in dense:
            # nn.Linear holds the transpose
            one = dense[source].t() if source.endswith("weight") else dense[source]
            found[name] = one.expand(len(value), *one.shape)
        elif ".moe." in name:
            found[name] = value
        elif name in dense:
            found[name] = dense[name]
        elif value.numel() <= 3 and name.endswith(("version", "_float_tensor")):
            found[name] = value
        else:
            raise UserError(f"{OPTION} {path}: has no {source}, it is of another architecture")
        if found[name].shape != value.shape:
            shapes = f"{tuple(dense[source].shape)} there, {tuple(value.shape)} for {name} here"
            raise UserError(f"{OPTION} {path}: {source} is of another size, {shapes}")
    extra = {name for name in dense if name not in wanted and not re.search(r"\.fc[12]\.(weight|bias)$", name)}
    extra = {name for name in extra if not name.endswith(("version", "_float_tensor"))}
    if extra:
        raise UserError(f"{OPTION} {path}: has {min(extra)}, which this model lacks")
    first_name: Dict[int, str] = {}
    for name, value in wanted.items():
        other = first_name.setdefault(value.data_ptr(), name)
        if value.numel() and not torch.equal(found[name], found[other]):
            tied = f"{other} and {name} are one tensor here and two there"
            raise UserError(f"{OPTION} {path}: {tied}, leave out the option that ties them")
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(found[name])
    logger.info(f"every expert starts as a copy of the feed-forward of {path}")
