"""Experts divided over workers: bytes sent per token, and the share of the time that exchanging tokens takes.

The workers are processes of this machine that talk by gloo. Bytes do not depend on that; times do, and are those of
the wall, since who waits for another takes no CPU time.

python -m benchmarks.communication [--quick]
"""

import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fairseq_hyperrouter.experts import ExpertParallel, parallel

from .harness import parser, progress, report
from .layer import step
from .peers import Ours
from .sizes import EXPERTS, HIDDEN, WIDTH

WORKERS, TOP_KS = (2, 4), (1, 2, 8)
ON_PAPER = (8, 64, 512)


def main() -> None:
    """Measure, print and write the tables."""
    quick = parser(__doc__).parse_args().quick
    tokens, repeats = (128, 1) if quick else (2048, 5)
    rows = [["workers", "k", "bytes sent per token", "on paper", "ms per step", "of it exchanging", "replicated, ms"]]
    details: Dict[str, Any] = {}
    for workers in progress(WORKERS, "workers"):
        measured = _on_workers(workers, tokens, repeats)
        details[str(workers)] = measured
        for number, K in enumerate(TOP_KS):
            sent, exchanging, divided, replicated = _mean([of_worker[number] for of_worker in measured])
            times = divided * 1e3, exchanging / divided, replicated * 1e3
            rows.append([workers, K, round(sent / tokens), round(bytes_per_token(workers, K)), *times])
    paper = [
        ["workers", "k", "tokens, float32", "tokens, bfloat16", "and gradients", "experts on every worker: gradients"]
    ]
    for workers in ON_PAPER:
        for K in TOP_KS:
            size = min(workers, EXPERTS)
            both = (round(bytes_per_token(size, K, bytes_)) for bytes_ in (4, 2))
            groups = round(gradient_bytes_per_token(EXPERTS // size, workers // size, tokens))
            paper.append([workers, K, *both, groups, round(gradient_bytes_per_token(EXPERTS, workers, tokens))])
    shape = f"one MoE layer, forward and backward, {tokens} tokens per worker, d {WIDTH}, F {HIDDEN}, E {EXPERTS}"
    tables = {
        f"Measured: {shape}, float32": rows,
        f"On paper, bytes per token, P = min(W, E): {shape}": paper,
    }
    report("communication", tables, details)


def bytes_per_token(size: int, K: int, bytes_: int = 4) -> float:
    """What a worker sends to others for each of its tokens in one layer, forward and backward, evenly routed.

    K rows there and K results back, and their gradients the other way; K gates (float32) and their gradients. 1 / P
    of it stays.
    """
    return (4 * K * WIDTH * bytes_ + 2 * K * 4) * (size - 1) / size


def gradient_bytes_per_token(experts: int, replicas: int, tokens: int) -> float:
    """What a worker sends of the float32 gradients of its experts, which *replicas* workers add up, once per update."""
    return 2 * experts * (2 * WIDTH * HIDDEN + WIDTH + HIDDEN) * 4 * (replicas - 1) / (replicas * tokens)


def _on_workers(workers: int, tokens: int, repeats: int) -> List[Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (workers, tokens, repeats, folder), nprocs=workers)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(workers)]


def _worker(rank: int, workers: int, tokens: int, repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    exchange = parallel._all_to_all
    exchanges: List[Tuple[int, float]] = []  # bytes sent, seconds taken

    def noted(rows: torch.Tensor, send: List[int], receive: List[int], group: Any) -> torch.Tensor:
        start = time.perf_counter()
        received = exchange(rows, send, receive, group)
        exchanges.append(((sum(send) - send[rank]) * rows[:1].nbytes, time.perf_counter() - start))
        return received

    def per_step(layer: nn.Module) -> float:
        step(layer, x, dy)
        dist.barrier()
        exchanges.clear()
        start = time.perf_counter()
        for _ in range(repeats):
            step(layer, x, dy)
        return (time.perf_counter() - start) / repeats

    parallel._all_to_all = noted
    x, dy = torch.randn(tokens, WIDTH, requires_grad=True), torch.randn(tokens, WIDTH)
    measured = []
    for K in TOP_KS:
        divided = per_step(Ours(WIDTH, HIDDEN, EXPERTS, K, parallel=ExpertParallel(workers)))
        sent, exchanging = (sum(column) / repeats for column in zip(*exchanges))
        measured.append((sent, exchanging, divided, per_step(Ours(WIDTH, HIDDEN, EXPERTS, K))))
    torch.save(measured, Path(folder, f"{rank}.pt"))
    dist.barrier()


def _mean(rows: List[Any]) -> List[float]:
    return [sum(column) / len(column) for column in zip(*rows)]


if __name__ == "__main__":
    main()
