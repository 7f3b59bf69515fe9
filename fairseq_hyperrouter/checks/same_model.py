"""Whether a checkpoint is of this model: by the options that it was made with, and by its tensors."""

import argparse
import inspect
import logging
import re
from pathlib import Path
from typing import Any, Dict, Optional

from fairseq_hyperrouter.config import MoEConfig
from fairseq_hyperrouter.errors import UserError, option_name
from fairseq_hyperrouter.routing import ROUTERS, Place

from .checkpoint_file import read_model_cfg

logger = logging.getLogger(__name__)
_BIAS = "balancing_steps"
"""Of loss-free balancing, which goes with many routers."""


def check_same_model(path: Path, model_cfg: Any) -> None:
    """Raise a UserError, which names both values, when the checkpoint is of another model than *model_cfg* says."""
    saved = read_model_cfg(path)
    sparse = hasattr(model_cfg, "moe_router")
    if sparse != ("moe_router" in saved):
        arch = saved.get("_name", "another architecture")
        raise UserError(f"--arch {model_cfg._name}: checkpoint {path} is of --arch {arch}")
    if not sparse:
        return
    MoEConfig.from_namespace(model_cfg).check(model_cfg.decoder_layers)
    before = argparse.Namespace(**saved)
    # First, since that of the checkpoint may be one that nobody knows here.
    _check_equal(path, {"--moe-router": before.moe_router}, {"--moe-router": model_cfg.moe_router})
    _check_equal(path, _shape(before), _shape(model_cfg))
    rates = [MoEConfig.from_namespace(cfg).moe_loss_free_rate for cfg in (before, model_cfg)]
    if (rates[0] > 0) != (rates[1] > 0):  # a rate's bias is in the checkpoint
        _check_equal(path, *({"--moe-loss-free-rate": rate} for rate in rates))
    for name in ("moe_gate_softmax", "activation_fn"):  # what such tensors mean changes, but can be learned anew
        one, other = getattr(before, name, None), getattr(model_cfg, name)
        if one not in (None, other):
            logger.warning(f"{option_name(name)}: checkpoint {path} was made with {one}, it goes on with {other}")


def _check_equal(path: Path, found: Dict[str, Any], said: Dict[str, Any]) -> None:
    for option, value in said.items():
        if value != found[option]:
            raise UserError(
                f"{option}: checkpoint {path} was made with {found[option]}, this command says {value}; "
                "give the same option, or another --save-dir"
            )


def _shape(cfg: Any) -> Dict[str, Any]:
    """The options that give the tensors of a checkpoint their shape, defaults filled in."""
    moe = MoEConfig.from_namespace(cfg)
    layers = moe.layer_numbers(cfg.decoder_layers)
    shape = {
        "--decoder-embed-dim": cfg.decoder_embed_dim,
        "--decoder-layers": cfg.decoder_layers,
        "--decoder-attention-heads": cfg.decoder_attention_heads,
        "--share-decoder-input-output-embed": cfg.share_decoder_input_output_embed,
        "--moe-expert-count": moe.moe_expert_count,
        "--moe-layers": ",".join(map(str, sorted(layers))),
        "--moe-ffn-embed-dim": moe.moe_ffn_embed_dim or cfg.decoder_ffn_embed_dim,
        "--moe-shared-experts": moe.moe_shared_experts,
        "--moe-router-dim": _router_dim(moe),
        "--moe-router-lr-scale": moe.router_lr_scale,
        "--moe-adapter-dim": moe.moe_adapter_dim,
        "--decoder-ffn-embed-dim": None if len(layers) == cfg.decoder_layers else cfg.decoder_ffn_embed_dim,
    }
    if moe.moe_router == "hyperrouter":
        shape["--moe-hyper-embed-dim"] = moe.moe_hyper_embed_dim or cfg.decoder_embed_dim
        shape["--moe-hyper-hidden-dim"] = moe.moe_hyper_hidden_dim
        shape["--moe-hyper-shared"] = moe.moe_hyper_shared
    return shape


def _router_dim(moe: MoEConfig) -> Optional[int]:
    router = ROUTERS[moe.moe_router]
    if moe.moe_router_dim is not None or "moe_router_dim" not in router.takes:
        return moe.moe_router_dim
    for kind in router.__mro__:  # a router may hand it on to the one that it is made from
        argument = inspect.signature(kind).parameters.get(router.takes["moe_router_dim"])
        if argument is not None:
            return argument.default
    return None


def shape_difference(found: Dict[str, Any], wanted: Dict[str, Any]) -> Optional[str]:
    """Which option made the tensors of a checkpoint (*found*) and of a model differ, and its two values.

    None when it is none of those that are looked for.
    """
    described = [
        (
            "embed_tokens.weight",
            ("symbols in the dictionary (is DATA the folder it was trained on?)", "--decoder-embed-dim"),
        ),
        ("moe.experts.weight1", ("--moe-expert-count", "--decoder-embed-dim", "--moe-ffn-embed-dim")),
        ("moe.router.hypernetwork.weight1", ("--moe-hyper-hidden-dim", "--moe-hyper-embed-dim")),
    ]
    for ending, options in described:
        for name in found.keys() & wanted.keys():
            if name.endswith(ending):
                for option, one, other in zip(options, found[name].shape, wanted[name].shape):
                    if one != other:
                        return f"{option}: {one} in the checkpoint, {other} in the model"
    layers = [{int(name) for name in re.findall(r"layers\.(\d+)\.moe\.", " ".join(state))} for state in (found, wanted)]
    if layers[0] != layers[1]:
        one, other = (",".join(map(str, sorted(numbers))) or "none" for numbers in layers)
        return f"--moe-layers: {one} in the checkpoint, {other} in the model"
    rates = ["above 0" if any(name.endswith(_BIAS) for name in state) else "0" for state in (found, wanted)]
    if rates[0] != rates[1]:
        return f"--moe-loss-free-rate: {rates[0]} in the checkpoint, {rates[1]} in the model"
    routers = [_routers_of(state) for state in (found, wanted)]
    if routers[0] != routers[1]:
        return f"--moe-router: {routers[0]} in the checkpoint, {routers[1]} in the model"
    return None


def _routers_of(state: Dict[str, Any]) -> str:
    """The routers whose tensors have the names of those in *state*; these names, if there is none."""
    inside = "moe.router."
    tensors = {name.rpartition(inside)[2] for name in state if inside in name} - {_BIAS}
    fitting = []
    for name in sorted(ROUTERS):
        router = ROUTERS[name].from_config(MoEConfig(moe_router=name, moe_expert_count=2), Place(2, vocabulary=2))
        if router.state_dict().keys() == tensors:
            fitting.append(name)
    return " or ".join(fitting) or ", ".join(sorted(tensors)) or "none"
