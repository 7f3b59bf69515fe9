"""Any of fairseq's pointwise optimizers, for a model whose experts are divided over workers.

What stock fairseq's trainer asks of an optimizer is what has to be done over all workers: clip the gradients, collect
what a checkpoint holds, take over what a checkpoint held.
"""

import sys
from typing import Any, Dict, List, Optional

import torch
import torch.distributed as dist
from fairseq import optim
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.experts import ExpertBank
from fairseq_hyperrouter.experts.parallel import ExpertParallel, gather_experts

NAME = "expert_parallel"


def divide_experts(cfg: Any, model: nn.Module) -> None:
    """Let the trainer build its optimizer for *model*, whose experts are divided; *cfg* is the whole config."""
    _DividedExperts.banks = [module for module in model.modules() if isinstance(module, ExpertBank)]
    # torch's DistributedDataParallel would average, and at the start overwrite, what differs from worker to worker.
    model._ddp_params_and_buffers_to_ignore = [name for name, p in model.named_parameters() if hasattr(p, "expert")]
    if cfg.optimizer._name == NAME:
        return  # a second model of the same training
    with open_dict(cfg):
        cfg.optimizer = OmegaConf.create({"_name": NAME, "wrapped": OmegaConf.to_container(cfg.optimizer)})


@register_optimizer(NAME)
class ExpertParallelOptimizer(FairseqOptimizer):
    """The optimizer that the user named, with ``_DividedExperts`` before it. Not an option of its own."""

    @classmethod
    def build_optimizer(cls, cfg: Any, params: Any, **kwargs: Any) -> FairseqOptimizer:
        if not OmegaConf.is_config(cfg) or "wrapped" not in cfg:
            raise UserError(f"--optimizer {NAME}: is what --moe-expert-parallel-size makes of another, name that one")
        refusal = UserError(
            f"--optimizer {cfg.wrapped._name}: not together with --moe-expert-parallel-size, it would look at each "
            "worker's experts alone; choose from adam, sgd, nag, adamax, adadelta"
        )
        if cfg.wrapped._name in ("composite", "lamb"):  # some cannot even be built without more
            raise refusal
        optimizer = optim.build_optimizer(cfg.wrapped, params, **kwargs)
        if not optimizer.supports_flat_params:
            raise refusal
        kind = type(optimizer)
        # The same name: a checkpoint can be resumed only with an optimizer of the name that it was made with.
        optimizer.__class__ = type(kind.__name__, (_DividedExperts, kind), {})
        optimizer.optimizer.consolidate_state_dict = optimizer.consolidate_state_dict
        return optimizer


class _DividedExperts:
    """Placed before a FairseqOptimizer; every method is called on all workers unless it says otherwise.

    - ``clip_grad_norm``: add up experts' gradients over replicas; one norm for all workers, each expert once.
    - ``consolidate_state_dict``: before a checkpoint is written, collect experts and their moments on rank 0.
    - ``state_dict`` (rank 0): with these moments, so that the checkpoint is that of one process.
    - ``load_state_dict``: take this worker's part of the moments of all experts.
    """

    banks: List[ExpertBank] = []
    _gathered: Optional[Dict[int, Dict[str, Any]]] = None

    @property
    def parallel(self) -> ExpertParallel:
        return self.banks[0].parallel

    def _experts(self) -> Dict[int, Tensor]:
        """The parameters that are experts, by their number in the state dict."""
        return {number: p for number, p in enumerate(self.params) if hasattr(p, "expert")}

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        gradients = [p.grad for p in self._experts().values() if p.grad is not None]
        if self.parallel.workers > self.parallel.size:
            for gradient in gradients:
                dist.all_reduce(gradient, group=self.parallel.replicas)
        squares = torch.stack([gradient.norm(dtype=torch.float32) ** 2 for gradient in gradients]).sum()
        dist.all_reduce(squares, group=self.parallel.group)
        return super().clip_grad_norm(max_norm, lambda norm: (norm**2 + squares.to(norm)).sqrt())

    def consolidate_state_dict(self) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, FloatingPointError):
            # The trainer writes crash.pt where something failed. The other workers know nothing of it and would not
            # answer. (That gradients are not finite all find out together.)
            raise error
        for bank in self.banks:
            bank.gather()
        self._gathered = {
            number: {
                name: gather_experts(moment, self.parallel)
                for name, moment in self.optimizer.state.get(parameter, {}).items()
                if torch.is_tensor(moment) and moment.shape == parameter.shape
            }
            for number, parameter in self._experts().items()
        }

    def state_dict(self) -> Dict[str, Any]:
        if self._gathered is None:
            raise RuntimeError("the experts are divided over workers: call consolidate_state_dict() on all of them")
        state = super().state_dict()
        for number, moments in self._gathered.items():
            if moments:
                state["state"][number] = {**state["state"][number], **moments}
        self._gathered = None
        return state

    def load_state_dict(self, state_dict: Dict[str, Any], optimizer_overrides: Any = None) -> None:
        count = self.banks[0].num_experts
        for number, parameter in self._experts().items():
            state = state_dict["state"].get(number, {})
            for name, moment in state.items():
                if torch.is_tensor(moment) and moment.dim() and moment.shape == (count, *parameter.shape[1:]):
                    # in place: stock's --memory-efficient-fp16 copies from this same dict once more
                    local = self.banks[0].local_experts
                    state[name] = moment[local.start : local.stop]
        super().load_state_dict(state_dict, optimizer_overrides)
