"""Timing calls too short for the host: several of them in a CUDA graph, replayed, so that no launch is waited for."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from elastic.bench.records import Measurement
from elastic.bench.timing import Timing, measure
from elastic.console import say

CALLS = 20  # in one graph
L2_BYTES = 200_000_000  # operands that rotate through this much do not find themselves in the L2 cache of any GPU


def copies_beyond_cache(nbytes: int) -> int:
    """How many copies of operands of this size must take turns for each to be read from memory."""
    return max(1, -(-L2_BYTES // max(nbytes, 1)))


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One call that makes the next of `calls` every time; the same computation on copies of its operands."""
    order = itertools.cycle(calls)
    return lambda: next(order)()


def captured(call: Callable[[], Any], calls: int = CALLS) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls, after one that compiles what they need."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def measure_replayed(call: Callable[[], Any], budget_ms: float) -> Timing:
    """Median device time of one call among CALLS in a graph."""
    graph = captured(call)
    timing = measure(graph.replay, budget_ms)
    return Timing(timing.ms / CALLS, timing.repeats * CALLS)


def replayed(
    case: str, properties: Measurement, who: str, call: Callable[[], Any], budget_ms: float, moved: float = 0.0
) -> list[Measurement]:
    """Records of a call: its `time` in ms and, if it moves bytes, `eff` in TB/s; `properties` go into both."""
    timing = measure_replayed(call, budget_ms)
    shared = {"case": case, "who": who, "repeats": timing.repeats, **properties}
    found: list[Measurement] = [{**shared, "metric": "time", "value": timing.ms, "unit": "ms"}]
    if moved:
        found.append({**shared, "metric": "eff", "value": moved / timing.ms / 1e9, "unit": "TB/s"})
    rate = f"  {found[-1]['value']:6.2f} TB/s" if moved else ""
    say(f"{case:28s} {who:8s} {timing.ms:9.4f} ms{rate}  {timing.repeats} repeats")
    return found
