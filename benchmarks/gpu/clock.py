"""Time and memory on a GPU; on a CPU, for trying out, by the wall clock.

Work on a GPU is queued, so it is timed by events in the queue. What is compared runs in turns.
"""

import statistics
import time
from typing import Any, Callable, Dict, List, Optional

import torch

WARM_UP = 3


def device() -> torch.device:
    """Where everything runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interleaved(functions: Dict[Any, Callable[[], Any]], repeats: int) -> Dict[Any, float]:
    """Median seconds per call of each function, in turns, after a few calls of each that do not count."""
    for function in functions.values():
        for _ in range(WARM_UP):
            function()
    times: Dict[Any, List[Callable[[], float]]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(_timed(function))
    _wait()
    return {name: statistics.median(seconds() for seconds in calls) for name, calls in times.items()}


def _timed(function: Callable[[], Any]) -> Callable[[], float]:
    if device().type == "cpu":
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
        return lambda: seconds
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    return lambda: begin.elapsed_time(end) / 1e3


def seconds_of(function: Callable[[], Any]) -> float:
    """Of one call, from the host's side."""
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], Any]) -> Optional[int]:
    """The most memory that tensors took during a call, above what was there before; None on a CPU."""
    if device().type == "cpu":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    _wait()
    return torch.cuda.max_memory_allocated() - before


def graphed(function: Callable[[], Any]) -> Optional[Callable[[], None]]:
    """*function* as a CUDA graph, whose kernels start without the host; None where it cannot be one.

    It cannot when it waits for the GPU, as for a count of tokens.
    """
    if device().type == "cpu":
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def limits(size: int = 8192) -> Dict[str, float]:
    """What this machine reaches: TFLOP/s of a large product of random numbers, TB/s of a copy, read and written."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
        seconds = interleaved({"product": lambda a=a, b=b: a @ b}, repeats=10)["product"]
        found[f"{str(dtype)[6:]} TFLOP/s"] = 2 * size**3 / seconds / 1e12
    source = torch.randn(size, size, 4, device=device())
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, repeats=10)["copy"]
    found["copy TB/s"] = 2 * source.numel() * source.itemsize / seconds / 1e12
    return found


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
