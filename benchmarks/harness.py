"""How everything here is timed and written down.

Machines are shared and noisy, so what is compared runs in turns in one process on one thread, the clock is the
process's own CPU time, and what counts is the ratio of medians.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from tqdm import tqdm

from fairseq_hyperrouter.analysis.machine import machine
from fairseq_hyperrouter.analysis.table import markdown_table

RESULTS = Path(__file__).with_name("results")


def parser(description: Optional[str], data: bool = False) -> argparse.ArgumentParser:
    """The options that every benchmark has; from here on one thread, and the same random numbers at every run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--quick", action="store_true", help="small, to see that it runs")
    if data:
        arguments.add_argument("data", help="folder made by fairseq-preprocess")
    return arguments


class Clock(NamedTuple):
    """What marks a moment, and the seconds between two marks, asked for when everything has been called."""

    mark: Callable[[], Any]
    between: Callable[[Any, Any], float]


CPU_TIME = Clock(time.process_time, lambda begin, end: end - begin)


def interleaved(
    functions: Dict[Any, Callable[[], Any]],
    repeats: int,
    number: int = 1,
    renew: Callable[[], Any] = lambda: None,
    clock: Clock = CPU_TIME,
) -> Dict[Any, List[float]]:
    """Seconds per call of each function: *repeats* rounds of *number* calls of each, in turns.

    *renew* is called, and not timed, before every round.
    """
    marks: Dict[Any, List[Any]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        renew()
        for name, function in functions.items():
            begin = clock.mark()
            for _ in range(number):
                function()
            marks[name].append((begin, clock.mark()))
    return {name: [clock.between(*pair) / number for pair in pairs] for name, pairs in marks.items()}


def medians(seconds: Dict[Any, List[float]]) -> Dict[Any, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(function: Callable[[], Any], forget: Callable[[], Any]) -> int:
    """The most memory that tensors took during a call, above what was there before; *forget* frees what a call left."""
    function()
    forget()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def progress(items: Sequence[Any], label: str) -> Any:
    """*items*, with a progress bar."""
    return tqdm(items, desc=label, file=sys.stderr, leave=False)


def report(name: str, tables: Dict[str, Sequence[Sequence[Any]]], details: Any) -> None:
    """Print the tables, and write them as results/name.md and, with the *details*, as results/name.json."""
    made_on = {
        "machine": machine(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m", f"benchmarks.{name}", *map(_argument, sys.argv[1:])]),
    }
    head = "{machine}, Python {python}, {threads} thread(s); `{command}`".format(**made_on)
    if "--quick" in sys.argv:
        head += "; a trial, too short for its figures to mean something"
    text = "\n\n".join([head, *(f"{title}\n\n{markdown_table(rows)}" for title, rows in tables.items())])
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text + "\n")
    (RESULTS / f"{name}.json").write_text(
        json.dumps({**made_on, "tables": tables, "details": details}, indent=1) + "\n"
    )
    print(f"wrote {RESULTS / name}.md and .json")


def _argument(value: str) -> str:
    """*value*; of a data folder, where it lies on this machine tells nobody anything."""
    return "DATA" if Path(value).is_dir() else value
