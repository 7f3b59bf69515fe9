"""What a checkpoint of a model holds, whose experts may be divided over workers."""

from typing import Dict

import torch
from torch import Tensor, nn

from .bank import ExpertBank


def saved_tensors(model: nn.Module) -> Dict[str, Tensor]:
    """All that a state dict of this worker would hold, the tensors themselves."""
    tensors: Dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return tensors


def whole_tensors(model: nn.Module) -> Dict[str, Tensor]:
    """All that a checkpoint of *model* holds; experts that are divided over workers without their values."""
    tensors = saved_tensors(model)
    for prefix, module in model.named_modules():
        if isinstance(module, ExpertBank):
            for name, held in module.named_parameters():
                tensors[f"{prefix}.{name}"] = torch.empty(module.num_experts, *held.shape[1:], device="meta")
    return tensors
