"""Where stock fairseq needs help on today's Python and PyTorch. None of its files or functions is replaced."""

import argparse
import collections
import importlib.util
import types
import typing
from typing import Any

import numpy
import torch
from omegaconf import OmegaConf


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


def mend_config(section: Any) -> None:
    """Change what stock fairseq's command line does to the config, before anything is built from it.

    - ``fairseq-train --bf16`` means a TPU to it. Where torch_xla is not installed there is none.
    - Its argparse components (``--optimizer sgd`` and others) put an argparse.Namespace into the config and so into
      every checkpoint, which torch.load(weights_only=True) then cannot read. A plain section does as well.

    Args:
        section: any section of the full config; the others are reached from it.
    """
    cfg = section._get_parent() if hasattr(section, "_get_parent") else None
    if cfg is None:
        return
    no_tpu = "common" in cfg and cfg.common.bf16 and not importlib.util.find_spec("torch_xla")
    for name, part in list(cfg.items()):
        if isinstance(part, argparse.Namespace):
            cfg[name] = OmegaConf.create(vars(part))
        elif no_tpu and hasattr(part, "keys") and "tpu" in part:
            part.tpu = False
