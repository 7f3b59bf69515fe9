"""Tokens per second of incremental decoding on a GPU, beside the dense model with as many active FLOPs.

python -m benchmarks.gpu.generation DATA [--quick]      (DATA: a folder made by fairseq-preprocess)
"""

from functools import partial
from typing import Any, Dict, List

import torch
from fairseq import options as fairseq_options
from fairseq import tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import nn

from ..harness import parser, progress, report
from ..models import SMALL, experts, stock
from ..sizes import EXPERTS
from .clock import DEVICE, ON_GPU, seconds_of

BATCHES = (1, 64)
TOP_KS = (1, EXPERTS)


def main() -> None:
    """Measure, print and write the table."""
    args = parser(__doc__, data=True).parse_args()
    length, repeats = (3, 1) if args.quick else (256, 3)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    rows: List[List[Any]] = [["batch", "k", "dense, tokens/s", "hyperrouter, tokens/s", "hyperrouter / dense"]]
    details = {}
    for batch in progress(BATCHES, "batches"):
        for k in TOP_KS:
            models = {"dense": stock(SMALL, k), "hyperrouter": experts(SMALL, k)}
            found: Dict[str, float] = {}
            for name, arguments in models.items():
                model = _build([args.data, *arguments], dtype)
                run = partial(generate, model, batch, length)
                run()
                found[name] = batch * length / min(seconds_of(run) for _ in range(repeats))
            rows.append(
                [batch, k, *(f"{speed:,.0f}" for speed in found.values()), found["hyperrouter"] / found["dense"]]
            )
            details[f"batch {batch}, k {k}"] = found
    title = f"Incremental decoding of {length} tokens, {SMALL.size} (dense: k F), {str(dtype)[6:]}"
    report("gpu.generation", {title: rows}, details)


def _build(arguments: List[str], dtype: torch.dtype) -> nn.Module:
    args = fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser(), arguments)
    cfg = convert_namespace_to_omegaconf(args)
    model = tasks.setup_task(cfg.task).build_model(cfg.model).to(DEVICE, dtype)
    model.make_generation_fast_()  # as fairseq-generate does
    return model


@torch.no_grad()
def generate(model: Any, batch: int, length: int) -> torch.Tensor:
    """(batch, length) the likeliest token after the other, from fairseq's end-of-sentence symbol on."""
    tokens = torch.full((batch, 1), model.decoder.dictionary.eos(), device=DEVICE)
    state: Dict[str, Any] = {}
    for _ in range(length):
        logits, _ = model.decoder(tokens, incremental_state=state)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens[:, 1:]


if __name__ == "__main__":
    main()
