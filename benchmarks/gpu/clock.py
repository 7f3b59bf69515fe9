"""Time and memory on a GPU; where there is none, for trying out, those of the CPU.

Work on a GPU is queued, so it is timed by events in the queue.
"""

import time
from typing import Any, Callable, Dict, Optional

import torch

from .. import harness
from ..harness import CPU_TIME, Clock, interleaved, medians

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


CLOCK = Clock(_event, _between) if ON_GPU else CPU_TIME


def seconds_of(function: Callable[[], Any]) -> float:
    """Of one call, from the host's side."""
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], Any], forget: Callable[[], Any]) -> int:
    """As the harness's, of the GPU's memory."""
    if not ON_GPU:
        return harness.peak_bytes(function, forget)
    function()
    forget()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def graphed(function: Callable[[], Any]) -> Optional[Callable[[], None]]:
    """*function* as a CUDA graph, whose kernels start without the host; None where it cannot be one.

    It cannot when it waits for the GPU, as for a count of tokens.
    """
    if not ON_GPU:
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is chosen or allocated at the first calls must not be captured
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


def limits(size: int) -> Dict[str, float]:
    """What this machine reaches: TFLOP/s of a large product of random numbers, TB/s of a copy, read and written."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        found[f"{str(dtype)[6:]} TFLOP/s"] = 2 * size**3 / _median(lambda a=a, b=b: a @ b) / 1e12
    source = torch.randn(size, size, 4, device=DEVICE)
    target = torch.empty_like(source)
    found["copy TB/s"] = 2 * source.nbytes / _median(lambda: target.copy_(source)) / 1e12
    return found


def _median(function: Callable[[], Any]) -> float:
    return medians(interleaved({"": function}, repeats=10, clock=CLOCK))[""]


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
