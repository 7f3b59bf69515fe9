import pytest
import torch
import torch.distributed as dist

from fairseq_hyperrouter.criterions.auxiliary_loss import AuxiliaryLossConfig, auxiliary_loss
from fairseq_hyperrouter.criterions.routing_metrics import routing_sums
from fairseq_hyperrouter.routing import Routing, losses
from tests.workers import on_workers


def balance_on_a_worker(task):
    """The auxiliary loss of this worker's part of the tokens, and its gradient."""
    cfg = AuxiliaryLossConfig(**{task["weight"]: 1.0}, moe_balance_batch=task["batch"])
    logits = task["logits"][dist.get_rank()].requires_grad_()
    routing = routing_of(logits)
    loss = auxiliary_loss([routing, None], routing_sums([routing, None], 4, torch.device("cpu")), cfg)
    loss.backward()
    return loss.detach(), logits.grad


def routing_of(logits):
    index = logits.detach().topk(2).indices
    return Routing(logits, index, torch.ones(index.shape))


@pytest.mark.parametrize("weight", ["moe_gate_loss_wt", "moe_mi_loss_wt"])
@pytest.mark.parametrize("batch", ["local", "global"])
def test_balance_over_the_batch_of_all_workers(preloaded, tmp_path, batch, weight):
    """Weighted by tokens, the global losses add up to that of all tokens together, and so do their gradients."""
    torch.manual_seed(0)
    parts = [torch.randn(5, 4) + torch.arange(4), torch.randn(8, 4)]
    found = on_workers(
        preloaded, balance_on_a_worker, 2, tmp_path / "job", {"batch": batch, "weight": weight, "logits": parts}
    )
    whole = torch.cat(parts).requires_grad_()
    loss_of = losses.balance_loss if weight == "moe_gate_loss_wt" else losses.mutual_information_loss
    expected = loss_of(routing_of(whole))
    expected.backward()
    total = sum(len(part) / 13 * loss for part, (loss, _) in zip(parts, found))
    gradient = torch.cat([len(part) / 13 * gradient for part, (_, gradient) in zip(parts, found)])
    assert torch.allclose(total, expected) == torch.allclose(gradient, whole.grad) == (batch == "global")
