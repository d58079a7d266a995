"""Timers: CUDA events for device time, the host's clock for the launch path, the allocator for memory."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

FEWEST, MOST = 3, 50  # repeats


class Timing(NamedTuple):
    """Median milliseconds of a call, and over how many repeats."""

    ms: float
    repeats: int


def repeats_within(once_ms: float, budget_ms: float) -> int:
    """How often a call of `once_ms` is repeated: what fits the budget, 3 to 50 times."""
    return int(min(MOST, max(FEWEST, budget_ms / max(once_ms, 1e-3))))


def measure(call: Callable[[], Any], budget_ms: float = 400.0) -> Timing:
    """Time a call on the current GPU after a warm-up; one extra call estimates how many repeats fit `budget_ms`."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = repeats_within((time.perf_counter() - start) * 1e3, budget_ms)
    for _ in range(repeats // 5):
        call()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for first, last in pairs:
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return Timing(statistics.median(first.elapsed_time(last) for first, last in pairs), repeats)


def measure_in_turn(calls: Mapping[str, Callable[[], Any]], budget_ms: float = 400.0) -> dict[str, list[float]]:
    """Milliseconds of each call in each of 3 to 50 rounds, in which all run one after the other in an order drawn anew:
    what the GPU's clock does meanwhile, and what a call leaves to the next one, meets them alike. `budget_ms` is for
    each call.
    """
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    rounds = repeats_within((time.perf_counter() - start) * 1e3 / len(calls), budget_ms)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    drawn = random.Random(0)
    for _ in range(rounds):
        for name in drawn.sample(list(calls), len(calls)):
            call = calls[name]
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            marks[name].append((first, last))
    torch.cuda.synchronize()
    return {name: [first.elapsed_time(last) for first, last in pairs] for name, pairs in marks.items()}


def host_microseconds(call: Callable[[], Any], rounds: int = 75) -> float:
    """Host time of one call while the GPU is busy with earlier ones: the launch path alone, everything cached."""
    calls, times = 20, []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[rounds // 3 :])


def extra_bytes(call: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Device memory that a call takes beyond its inputs and the tensors that it returns."""
    call()  # compiled, tile counter allocated
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    peak = torch.cuda.max_memory_allocated()
    return peak - before - sum(x.untyped_storage().nbytes() for x in results)


def matmul_tflops(size: int = 8192) -> float:
    """TFLOP/s of a square bf16 matrix product, the ceiling that a table is read against."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / measure(lambda: a @ b).ms / 1e9
