"""Mistakes in stock fairseq's own options that it would answer with a traceback, or not at all."""

import re
from itertools import pairwise
from typing import Any, Sequence

from fairseq_hyperrouter.config import parse_ints
from fairseq_hyperrouter.errors import UserError, option_name
from fairseq_hyperrouter.workers import number_of_workers

from .checkpoint_file import repair, restored_checkpoint
from .distributed_options import check_workers
from .same_model import check_same_model


def check_model_options(args: Any, num_symbols: int) -> None:
    """Raise a UserError (a ValueError) for options of stock transformer_lm that cannot make a model.

    Args:
        args: the options of the model.
        num_symbols: in the dictionary.
    """
    for name in ("decoder_embed_dim", "decoder_attention_heads"):
        if getattr(args, name) < 1:
            raise UserError(f"{option_name(name)} {getattr(args, name)}: must be at least 1")
    for name in ("dropout", "attention_dropout", "decoder_layerdrop"):
        if not 0 <= (getattr(args, name) or 0) <= 1:
            raise UserError(f"{option_name(name)} {getattr(args, name)}: must be between 0 and 1")
    for name in ("activation_dropout", "relu_dropout"):  # experts scale by 1 / (1 - p)
        if not 0 <= (getattr(args, name) or 0) < 1:
            raise UserError(f"{option_name(name)} {getattr(args, name)}: must be at least 0 and below 1")
    if args.decoder_embed_dim % args.decoder_attention_heads:
        raise UserError(
            f"--decoder-attention-heads {args.decoder_attention_heads}: "
            f"must divide --decoder-embed-dim ({args.decoder_embed_dim})"
        )
    if args.share_decoder_input_output_embed:
        _check_same("--share-decoder-input-output-embed", args, "decoder_output_dim", "decoder_input_dim")
    if getattr(args, "base_layers", 0) and number_of_workers() == 1:
        raise UserError(f"--base-layers {args.base_layers}: stock's need several workers; --moe-router base needs one")
    if args.decoder_layers < 1:
        raise UserError(f"--decoder-layers {args.decoder_layers}: must be at least 1")
    _check_cutoff("adaptive_softmax_cutoff", args.adaptive_softmax_cutoff, num_symbols)
    if args.adaptive_input:
        if not args.adaptive_input_cutoff:
            raise UserError("--adaptive-input: needs --adaptive-input-cutoff, as in 20000,60000")
        _check_cutoff("adaptive_input_cutoff", args.adaptive_input_cutoff, num_symbols)
    if args.tie_adaptive_weights:
        if not args.adaptive_input:
            raise UserError("--tie-adaptive-weights: needs --adaptive-input")
        for one, other in (
            ("adaptive_input_cutoff", "adaptive_softmax_cutoff"),
            ("adaptive_input_factor", "adaptive_softmax_factor"),
            ("decoder_input_dim", "decoder_output_dim"),
        ):
            _check_same("--tie-adaptive-weights", args, one, other)


def _check_cutoff(name: str, value: Any, num_symbols: int) -> None:
    if not value:
        return
    bounds = (0, *parse_ints(option_name(name), value), num_symbols)
    if not all(low < high for low, high in pairwise(bounds)):
        raise UserError(
            f"{option_name(name)} {value}: must be growing numbers from 1 to below the {num_symbols} symbols "
            "of the dictionary"
        )


def _check_same(reason: str, args: Any, one: str, other: str) -> None:
    if getattr(args, one) != getattr(args, other):
        raise UserError(
            f"{option_name(one)} {getattr(args, one)}: with {reason} it must be {option_name(other)} "
            f"({getattr(args, other)})"
        )


def check_training(cfg: Any, top_ks: Sequence[int] = ()) -> None:
    """Raise a UserError (a ValueError) for options of the whole *cfg* with which a training cannot go well.

    Args:
        top_ks: the numbers of experts that the task validates with.
    """
    _check_trainer(cfg)
    check_workers(cfg)
    name = cfg.checkpoint.best_checkpoint_metric
    match = re.fullmatch(r"(loss|ppl|bpc)_k(\d+)", name)
    if match and int(match[2]) not in top_ks:
        raise UserError(f"--best-checkpoint-metric {name}: needs --task hyperrouter --valid-top-k {int(match[2])}")
    if cfg.distributed_training.distributed_rank == 0:  # the others get what rank 0 reads
        restored = restored_checkpoint(cfg.checkpoint)
        if restored is not None:
            repair(restored)
            check_same_model(restored, cfg.model)


def _check_trainer(cfg: Any) -> None:
    if min(cfg.optimization.update_freq, default=1) < 1:
        raise UserError(f"--update-freq {min(cfg.optimization.update_freq)}: must be at least 1")
    for name in ("batch_size", "max_tokens"):
        value = cfg.dataset[name]
        if value is not None and value < 1:
            raise UserError(f"{option_name(name)} {value}: must be at least 1")
    longest = cfg.task.tokens_per_sample
    if cfg.model.max_target_positions is not None and cfg.model.max_target_positions < longest:
        raise UserError(f"--tokens-per-sample {longest}: --max-target-positions is {cfg.model.max_target_positions}")
    full = getattr(cfg.task, "sample_break_mode", None) in (None, "none")  # else samples may be shorter
    if full and cfg.dataset.max_tokens is not None and cfg.dataset.max_tokens < longest:
        raise UserError(f"--max-tokens {cfg.dataset.max_tokens}: must be at least --tokens-per-sample ({longest})")
    flattens = not (cfg.common.fp16_no_flatten_grads or cfg.common.memory_efficient_fp16)
    if cfg.common.fp16 and cfg.common.cpu and flattens:
        raise UserError("--fp16: with --cpu it needs --fp16-no-flatten-grads or --memory-efficient-fp16")
