"""``--arch transformer_lm_hyperrouter``: stock transformer_lm with Mixture-of-Experts feed-forwards."""

import ast
import copy
import difflib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer_lm import (
    DEFAULT_MAX_TARGET_POSITIONS,
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
)
from fairseq.utils import safe_getattr
from omegaconf import open_dict

from fairseq_hyperrouter.checks.checkpoint_file import check_readable
from fairseq_hyperrouter.checks.data_folder import check_folders
from fairseq_hyperrouter.checks.distributed_options import check_evaluation_workers, check_expert_parallel
from fairseq_hyperrouter.checks.moe_options import (
    check_average,
    check_backend_here,
    check_decoder,
    check_routing_parts,
    warn_of_untaught_routers,
)
from fairseq_hyperrouter.checks.same_model import shape_difference
from fairseq_hyperrouter.checks.stock_options import check_model_options, check_training
from fairseq_hyperrouter.compat import mend_config
from fairseq_hyperrouter.config import NO_LAYERS, MoEConfig, TopK, parse_ints
from fairseq_hyperrouter.errors import UserError, WrongCheckpoint
from fairseq_hyperrouter.experts import ExpertParallel
from fairseq_hyperrouter.experts.backend import AUTO
from fairseq_hyperrouter.experts.memory import keep_freed_memory
from fairseq_hyperrouter.experts.state import whole_tensors
from fairseq_hyperrouter.optim import divide_experts
from fairseq_hyperrouter.routing import ROUTERS
from fairseq_hyperrouter.running import running_command
from fairseq_hyperrouter.upcycling import check_upcycling, upcycle

from .moe_decoder import MoEDecoder

TRAINING_COMMANDS = ("train", "hydra_train")


@dataclass
class HyperRouterLanguageModelConfig(MoEConfig, TransformerLanguageModelConfig):
    """The options of stock transformer_lm and those of its MoE layers."""


@register_model("transformer_lm_hyperrouter", dataclass=HyperRouterLanguageModelConfig)
class HyperRouterLanguageModel(TransformerLanguageModel):
    """A transformer language model some of whose feed-forwards are Mixtures of Experts."""

    decoder: MoEDecoder

    @classmethod
    def hub_models(cls) -> Dict[str, Any]:
        return {}  # stock transformer_lm's checkpoints are not ours

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "HyperRouterLanguageModel":
        mend_config(args)
        keep_freed_memory()
        is_training = _is_training(task)
        moe = _check(args, task, is_training)
        if running_command() == "validate":  # which asks for nothing that is refused in prepare_for_inference_
            check_override_names("--model-overrides", ast.literal_eval(args._get_parent().common_eval.model_overrides))
        divides = is_training and moe.moe_expert_parallel_size > 1  # else every process holds all experts
        if args.decoder_layers_to_keep:
            _keep_layers(args, is_training)
        if safe_getattr(args, "max_target_positions", None) is None:
            args.max_target_positions = safe_getattr(args, "tokens_per_sample", DEFAULT_MAX_TARGET_POSITIONS)
        # The stock builder makes the embeddings, of whatever kind; it always makes a decoder too, so it is
        # asked for one without layers, and that one is replaced.
        without_layers = copy.deepcopy(args)
        without_layers.decoder_layers = without_layers.base_layers = 0
        without_layers.decoder_layers_to_keep = None
        model = super().build_model(without_layers, task)
        model.decoder = MoEDecoder(
            TransformerConfig.from_namespace(args),
            HyperRouterLanguageModelConfig.from_namespace(args),
            task.target_dictionary,
            model.decoder.embed_tokens,
            parallel=ExpertParallel(moe.moe_expert_parallel_size) if divides else None,
        )
        if is_training:
            check_average(args._get_parent(), model)
            warn_of_untaught_routers(model)
            _settle(args._get_parent().model, moe)
        if divides:
            divide_experts(args._get_parent(), model)
        if is_training and moe.moe_upcycle_from is not None and check_upcycling(args._get_parent()):
            upcycle(model, moe.moe_upcycle_from)
        return model

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str, checkpoint_file: str = "model.pt", data_name_or_path: str = ".", **kwargs: Any
    ) -> Any:
        """Stock: a hub interface to the checkpoint(s) in a folder; ``moe_eval_top_k`` is one of the options it takes.

        Raises:
            UserError (a ValueError): a file or folder that is missing, a truncated checkpoint, an unknown MoE option.
        """
        check_override_names("from_pretrained", kwargs)
        # An archive is stock's to unpack.
        for file in checkpoint_file.split(os.pathsep) if os.path.isdir(model_name_or_path) else ():
            check_readable(Path(model_name_or_path, file))
        if not data_name_or_path.startswith("."):
            check_folders(data_name_or_path)
        return super().from_pretrained(model_name_or_path, checkpoint_file, data_name_or_path, **kwargs)

    def load_state_dict(self, state_dict: Dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Stock; a checkpoint of another model is a UserError that names an option and both its values."""
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading"):
                raise
            _, *problems = str(error).splitlines()
            difference = shape_difference(state_dict, whole_tensors(self)) or problems[0].strip()
            raise WrongCheckpoint(f"is of another model, {len(problems)} tensors differ: {difference}") from None

    def prepare_for_inference_(self, cfg: Any) -> None:
        """Stock, after a look at two mistakes that stock fairseq's evaluation is silent about.

        Samples longer than the model takes are skipped (fairseq-eval-lm then prints a perplexity of 1 for no token),
        and overrides with an unknown name do nothing.
        """
        length, longest = safe_getattr(cfg.task, "tokens_per_sample", 0), self.max_positions()
        if running_command() == "eval_lm" and length > longest:
            raise UserError(f"--tokens-per-sample {length}: this model takes at most {longest}, give that")
        check_evaluation_workers(cfg.task._name)
        check_override_names("--model-overrides", ast.literal_eval(cfg.common_eval.model_overrides))
        super().prepare_for_inference_(cfg)

    def at_top_k(
        self, top_k: TopK, *, threshold: Optional[float] = None, top_p: Optional[float] = None
    ) -> "AbstractContextManager[None]":
        """Evaluate with exactly *top_k* experts per token inside the ``with`` block: see ``MoEDecoder.at_top_k``."""
        return self.decoder.at_top_k(top_k, threshold=threshold, top_p=top_p)


def _is_training(task: Any) -> bool:
    if hasattr(task, "builds_for_training"):
        return task.builds_for_training
    return running_command() in TRAINING_COMMANDS  # a stock task does not say


def _settle(saved: Any, moe: MoEConfig) -> None:
    """What the checkpoints of a training shall say of its options.

    Args:
        saved: the model's part of the config that the trainer saves, of which fairseq may have given us a copy.
    """
    router = ROUTERS[moe.moe_router]
    with open_dict(saved):
        if "moe_router_lr_scale" in router.takes:
            # Stored numbers are divided by it: what a checkpoint means must not change with a default.
            saved.moe_router_lr_scale = moe.router_lr_scale
        saved.moe_backend = AUTO  # no property of the weights, and perhaps none of the machine that evaluates


def _check(args: Any, task: Any, is_training: bool) -> MoEConfig:
    """The MoE options, after a look at all that can be wrong before anything is built."""
    check_model_options(args, len(task.source_dictionary))
    check_decoder(args)
    if is_training and not getattr(task, "checks_training", False):
        check_training(args._get_parent())
    moe = HyperRouterLanguageModelConfig.from_namespace(args)
    if is_training:
        check_routing_parts(args._get_parent(), task)
        check_backend_here(args._get_parent())
        if moe.moe_expert_parallel_size > 1:
            check_expert_parallel(args._get_parent(), moe.moe_expert_parallel_size)
    return moe


def check_override_names(where: str, overrides: Dict[str, Any]) -> None:
    """Raise a UserError for a ``moe_`` option that does not exist, or that says what stored tensors mean.

    Stock fairseq would do nothing about the one, and evaluate some other model with the other.
    """
    known = HyperRouterLanguageModelConfig.__dataclass_fields__
    for name in overrides:
        if name in ("moe_hyper_shared", "moe_router_lr_scale"):
            raise UserError(f"{where} {name}: belongs to the stored weights, and cannot be another for them")
        if name.startswith("moe_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"{where} {name}: no such option" + (f", {near[0]}?" if near else ""))


def _keep_layers(args: Any, is_training: bool) -> None:
    """As stock, leave ``decoder_layers_to_keep`` alone; the MoE layers are numbered anew like all layers."""
    said = f"--decoder-layers-to-keep {args.decoder_layers_to_keep}"
    if is_training:  # stock would number the layers of its checkpoints anew once more, and could not load them
        raise UserError(f"{said}: is for a trained model, give decoder_layers_to_keep in fairseq-eval-lm's overrides")
    kept = sorted(set(parse_ints("--decoder-layers-to-keep", args.decoder_layers_to_keep)))
    if kept[0] < 0 or kept[-1] >= args.decoder_layers:
        raise UserError(f"{said}: layers are numbered 0 to {args.decoder_layers - 1}")
    moe = HyperRouterLanguageModelConfig.from_namespace(args).layer_numbers(args.decoder_layers)
    args.decoder_layers = len(kept)
    args.moe_freq = 1
    args.moe_layers = ",".join(str(new) for new, old in enumerate(kept) if old in moe) or NO_LAYERS


def _paper_size(args: Any, layers: int) -> None:
    """The sizes of the HyperRouter paper's scripts: MoE in layers 0 to 3, whatever the depth.

    Its attention has 8 heads of 64 at width 256; fairseq's heads divide the width, so ours are 8 of 32.
    """
    args.decoder_layers = safe_getattr(args, "decoder_layers", layers)
    args.decoder_embed_dim = safe_getattr(args, "decoder_embed_dim", 256)
    args.decoder_input_dim = safe_getattr(args, "decoder_input_dim", args.decoder_embed_dim)
    args.decoder_output_dim = safe_getattr(args, "decoder_output_dim", args.decoder_embed_dim)
    args.decoder_ffn_embed_dim = safe_getattr(args, "decoder_ffn_embed_dim", 512)
    args.decoder_attention_heads = safe_getattr(args, "decoder_attention_heads", 8)
    args.moe_expert_count = safe_getattr(args, "moe_expert_count", 16)
    if safe_getattr(args, "moe_freq", None) is None:
        first_four = ",".join(str(layer) for layer in range(min(4, args.decoder_layers)))
        args.moe_layers = safe_getattr(args, "moe_layers", first_four)


@register_model_architecture("transformer_lm_hyperrouter", "transformer_lm_hyperrouter_small")
def small(args: Any) -> None:
    """The paper's small model: 4 layers of width 256, 16 experts of width 512."""
    _paper_size(args, 4)


@register_model_architecture("transformer_lm_hyperrouter", "transformer_lm_hyperrouter_medium")
def medium(args: Any) -> None:
    """The paper's medium model: 8 layers of width 256, 16 experts of width 512."""
    _paper_size(args, 8)


@register_model_architecture("transformer_lm_hyperrouter", "transformer_lm_hyperrouter_large")
def large(args: Any) -> None:
    """The paper's large model: 18 layers of width 256, 16 experts of width 512."""
    _paper_size(args, 18)
