"""Where stock fairseq needs help on today's Python and PyTorch; public hooks only, no patch."""

import argparse
import collections
import importlib.util
import types
import typing
from typing import Any

import numpy
import torch


def allow_fairseq_checkpoints() -> None:
    """Let torch.load(weights_only=True), the default since torch 2.6, read what stock fairseq sends and saves.

    Its distributed resume broadcasts an omegaconf config, and checkpoints of argparse architectures hold a
    Namespace. These types hold data only.
    """
    if not hasattr(torch.serialization, "add_safe_globals"):
        return  # before torch 2.4 everything is read
    from fairseq.distributed.utils import _TensorPlaceholder
    from omegaconf import DictConfig, ListConfig, nodes
    from omegaconf.base import ContainerMetadata, Metadata

    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            DictConfig,
            ListConfig,
            nodes.AnyNode,
            ContainerMetadata,
            Metadata,
            _TensorPlaceholder,
            typing.Any,
            collections.defaultdict,
            dict,
            list,
            int,
        ]
    )


def numpy_compat() -> None:
    """Give numpy 2 the one name of numpy 1 that fairseq asks for, ``numpy.compat.long``, in its sentence-wise batches.

    Python 3.13 has no numpy 1. Without it ``fairseq-interactive`` and ``--sample-break-mode eos`` stop.
    """
    if not hasattr(numpy, "compat"):
        numpy.compat = types.SimpleNamespace(long=int)


def bf16_without_tpu(section: Any) -> None:
    """Let ``fairseq-train --bf16`` train on a GPU or CPU.

    Stock fairseq's command line takes --bf16 to mean a TPU. Where torch_xla is not installed there is none.

    Args:
        section: any section of the full config; the others are reached from it.
    """
    cfg = section._get_parent() if hasattr(section, "_get_parent") else None
    if cfg is None or "common" not in cfg or not cfg.common.bf16 or importlib.util.find_spec("torch_xla"):
        return
    for part in cfg.values():
        if hasattr(part, "keys") and "tpu" in part:
            part.tpu = False
