"""Experts divided over workers: bytes sent per token, and the share of the time that exchanging tokens takes.

The workers are processes of this machine that talk by gloo. Bytes do not depend on that; times do.

python -m benchmarks.communication [--quick]
"""

import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fairseq_hyperrouter import LinearRouter, MoELayer
from fairseq_hyperrouter.experts import ExpertParallel, parallel

from .harness import parser, progress, report
from .peers import Ours

D, HIDDEN, EXPERTS = 256, 512, 16
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
            sent, exchanging, step, replicated = _mean([of_worker[number] for of_worker in measured])
            on_paper = bytes_per_token(workers, K, D)
            rows.append(
                [workers, K, round(sent / tokens), round(on_paper), step * 1e3, exchanging / step, replicated * 1e3]
            )
    paper = [
        ["workers", "k", "tokens, float32", "tokens, bfloat16", "and gradients", "experts on every worker: gradients"]
    ]
    for workers in ON_PAPER:
        for K in TOP_KS:
            size = min(workers, EXPERTS)
            both = (round(bytes_per_token(size, K, D, bytes_)) for bytes_ in (4, 2))
            groups = round(gradient_bytes_per_token(EXPERTS // size, workers // size, tokens))
            paper.append([workers, K, *both, groups, round(gradient_bytes_per_token(EXPERTS, workers, tokens))])
    shape = f"one MoE layer, forward and backward, {tokens} tokens per worker, d {D}, F {HIDDEN}, E {EXPERTS}"
    tables = {
        f"Measured: {shape}, float32": rows,
        f"On paper, bytes per token, P = min(W, E): {shape}": paper,
    }
    report("communication", tables, details)


def bytes_per_token(size: int, K: int, width: int, bytes_: int = 4) -> float:
    """What a worker sends to others for each of its tokens in one layer, forward and backward, evenly routed.

    K rows there and K results back, and their gradients the other way; K gates (float32) and their gradients. 1 / P
    of it stays.
    """
    return (4 * K * width * bytes_ + 2 * K * 4) * (size - 1) / size


def gradient_bytes_per_token(experts: int, replicas: int, tokens: int) -> float:
    """What a worker sends of the float32 gradients of its experts, which *replicas* workers add up, once per update."""
    return 2 * experts * (2 * D * HIDDEN + D + HIDDEN) * 4 * (replicas - 1) / (replicas * tokens)


def _on_workers(workers: int, tokens: int, repeats: int) -> List[Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (workers, tokens, repeats, folder), nprocs=workers)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(workers)]


def _worker(rank: int, workers: int, tokens: int, repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    exchange = parallel._all_to_all
    sent, seconds = [0], [0.0]

    def counted(rows: torch.Tensor, send: List[int], receive: List[int], group: Any) -> torch.Tensor:
        start = time.perf_counter()
        received = exchange(rows, send, receive, group)
        seconds[0] += time.perf_counter() - start
        sent[0] += (sum(send) - send[rank]) * rows[:1].nbytes
        return received

    parallel._all_to_all = counted
    measured = []
    for K in TOP_KS:
        layer = MoELayer(LinearRouter(D, EXPERTS), HIDDEN, top_k=K, parallel=ExpertParallel(workers))
        x, dy = torch.randn(tokens, D, requires_grad=True), torch.randn(tokens, D)
        layer(x)[0].backward(dy)
        dist.barrier()
        sent[0], seconds[0], start = 0, 0.0, time.perf_counter()
        for _ in range(repeats):
            layer(x)[0].backward(dy)
        step = (time.perf_counter() - start) / repeats
        replicated = Ours(D, HIDDEN, EXPERTS, K)
        replicated(x).backward(dy)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(repeats):
            replicated(x).backward(dy)
        alone = (time.perf_counter() - start) / repeats
        measured.append((sent[0] / repeats, seconds[0] / repeats, step, alone))
    torch.save(measured, Path(folder, f"{rank}.pt"))
    dist.barrier()


def _mean(rows: List[Any]) -> List[float]:
    return [sum(column) / len(column) for column in zip(*rows)]


if __name__ == "__main__":
    main()
