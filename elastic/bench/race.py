"""One case, all its contestants: outputs are compared with ours first, then all are timed in turn, so that they share
what the GPU's clock and heat do. A competitor that cannot run or disagrees is a record too, with the reason.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.bench import drawing, tables
from elastic.bench.cases import Case, Inputs
from elastic.bench.contestants import Call, Contestant
from elastic.bench.gpu_state import watched
from elastic.bench.records import LEFT_OUT, Measurement, save
from elastic.bench.timing import matmul_tflops, measure_in_turn
from elastic.console import say

TOLERANCE = 0.05  # of the largest value, at least of 1: N(0, 1) operands in bf16, a few roundings
CHUNK = 16384  # tokens compared at a time
DISAGREED = "its output differs from ours"


def race(
    args: argparse.Namespace,
    cases: Sequence[Case],
    ours: Mapping[str, Callable[[Inputs], Call]],
    contestants: Mapping[str, Contestant],
    machine: Sequence[Measurement],
    stamp: Measurement,
    device: torch.device,
    forwards: float = 1.0,
) -> int:
    """Run all cases, show their table, write `<out>/<tag>.json` and the picture beside it.

    Args:
        args: parsed options of `add_options`.
        machine: what was measured once, before the cases.
        stamp: what every record of the run shares.
        forwards: operations that the rate counts, in those of a forward pass.

    Returns:
        0, or 1 where a contestant's output differed from ours.
    """
    path = args.out / f"{args.tag}.json"
    found = [{**record, **stamp} for record in machine]
    for case in cases:
        work = forwards * case.flops()
        timed = run_case(case, ours, contestants, work, args.budget_ms, args.flex_max_length, str(device))
        found += [{**record, **stamp} for record in timed]
        save(path, found)  # after every case: a long run that is stopped leaves what it has
        torch.cuda.empty_cache()
    say(f"\n{tables.terminal(found)}\n")
    say(f"Written: {', '.join(map(str, [path, *drawing.draw(path, found)]))}")
    return int(any(r["metric"] == LEFT_OUT and r["why"].startswith(DISAGREED) for r in found))


def product_ceiling() -> Measurement:
    """Rate of a large matrix product, the ceiling of any kernel on this GPU."""
    return {"case": "matmul-8192", "who": "cublas", "metric": "eff", "value": matmul_tflops(), "unit": "TFLOP/s"}


def run_case(
    case: Case,
    ours: Mapping[str, Callable[[Inputs], Call]],
    contestants: Mapping[str, Contestant],
    work: float,
    budget_ms: float,
    flex_max_length: int,
    device: str,
) -> list[Measurement]:
    """Records of our kernels (the first one is the reference) and of every contestant that takes the case: `time` in ms
    and `eff` in TFLOP/s.

    Args:
        work: floating-point operations that the rate counts.
    """
    inputs = case.inputs(device)
    calls = {name: build(inputs) for name, build in ours.items()}
    reference = next(iter(calls.values()))()
    left_out = []
    for name, contestant in contestants.items():
        if not contestant.takes(case):
            continue
        if contestant.flex and case.length > flex_max_length:
            left_out.append(_left_out(case, name, f"longer than --flex-max-length {flex_max_length}"))
            continue
        try:
            calls[name] = _checked(contestant, case, inputs, reference)
        except Exception as error:  # noqa: BLE001 - a competitor that cannot run is a result, stated in the table
            reason = " ".join(str(error).split())[:200]
            why = reason if isinstance(error, DisagreementError) else f"{type(error).__name__}: {reason}"
            left_out.append(_left_out(case, name, why))
    del reference
    rates = dict.fromkeys(calls, work)
    return [*timed(case.name, case.properties(), calls, rates, budget_ms, torch.device(device)), *left_out]


class DisagreementError(ValueError):
    """A contestant's output differs from ours."""


def _checked(contestant: Contestant, case: Case, inputs: Inputs, reference: tuple[Tensor, ...]) -> Call:
    call = contestant.build(case, inputs)
    difference = largest_difference(call(), reference)
    if not difference <= TOLERANCE:
        raise DisagreementError(f"{DISAGREED} by {difference:.3g}, allowed is {TOLERANCE}")
    return call


def largest_difference(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> float:
    """Largest difference of two results, tensors [1, S, heads, D], over the second one's largest value (at least 1);
    infinite where either holds a NaN.
    """
    worst = 0.0
    for one, other in zip(some, others, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"outputs of shape {list(one.shape)} and {list(other.shape)} cannot be compared")
        pieces = zip(one.split(CHUNK, dim=1), other.split(CHUNK, dim=1), strict=True)
        largest = torch.stack([(a.float() - b.float()).abs().amax() for a, b in pieces]).amax()
        found = (largest / other.abs().amax().float().clamp(min=1.0)).item()
        worst = math.inf if math.isnan(found) else max(worst, found)
    return worst


def timed(
    case: str, properties: Measurement, calls: Mapping[str, Callable[[], object]], work: Mapping[str, float],
    budget_ms: float, device: torch.device,
) -> list[Measurement]:  # fmt: skip
    """Time calls of so many floating-point operations in turn: each one's `time` in ms and `eff` in TFLOP/s, and the
    GPU's state meanwhile, with `properties`.
    """
    with watched(device) as state:
        times = measure_in_turn(calls, budget_ms)
    found: list[Measurement] = []
    for who, rounds in times.items():
        ms = statistics.median(rounds)
        rate = work[who] / ms / 1e9
        say(f"{case:24s} {who:7s} {ms:10.4f} ms  {rate:6.1f} TFLOP/s  {len(rounds)} rounds")
        shared = {"case": case, "who": who, "repeats": len(rounds), **properties}
        found += [
            {**shared, "metric": "time", "value": ms, "unit": "ms"},
            {**shared, "metric": "eff", "value": rate, "unit": "TFLOP/s"},
        ]
    for record in state:
        say(f"{case:24s} {record['metric']} {record['value']:.0f} {record['unit']}")
    return [*found, *({"case": case, **properties, **record} for record in state)]


def _left_out(case: Case, who: str, why: str) -> Measurement:
    say(f"{case.name:24s} {who:7s} left out: {why}")
    shared = {"case": case.name, "who": who, **case.properties()}
    return {**shared, "metric": LEFT_OUT, "value": None, "unit": "", "why": why}


def measure_cases(
    cases: Iterable[Any], run_case: Callable[[Any], Iterable[Measurement]], found: list[Measurement],
    stamp: Measurement, path: Path,
) -> int:  # fmt: skip
    """Add the stamped records of every case to `found`, write them to `path` and show the table.

    Returns:
        0, or 1 where a rival's output differs from ours.
    """
    for case in cases:
        found += [{**record, **stamp} for record in run_case(case)]
        save(path, found)  # after every case: a long run that is stopped leaves what it has
        torch.cuda.empty_cache()
    say(f"\n{tables.terminal(found)}\n\nWritten: {path}")
    return int(any(r["metric"] == LEFT_OUT and r["why"].startswith(DISAGREED) for r in found))
