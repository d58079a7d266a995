"""`elastic bench attention`: the fused forward kernel beside its competitors, in one run.

Before a contestant is timed, its output is compared with ours. Building block lists and compiling are not timed.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from elastic.bench import records, tables
from elastic.bench.cases import DTYPES, Case, Inputs
from elastic.bench.contestants import COMPETITORS, Contestant, forward
from elastic.bench.options import add_options, cases_of, chosen
from elastic.bench.pictures import attention_figure
from elastic.bench.records import LEFT_OUT, Record
from elastic.bench.timing import extra_bytes, host_microseconds, matmul_tflops, measure
from elastic.console import say
from elastic.kernels import why_not
from elastic.plots import save_png

SUMMARY = "the fused forward kernel beside SDPA, FlexAttention, serial dispatch and flash-attn-4"
TOLERANCE = 0.05  # N(0, 1) operands in bf16: a few roundings of outputs up to 4
CHUNK = 16384  # tokens compared at a time
DISAGREED = "its output differs from ours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add_options(parser, COMPETITORS, "attention")


def run(args: argparse.Namespace, command: str) -> int:
    """Time every case, show the table, write `<out>/<tag>.json` and `.png`.

    Returns:
        0, or 1 where a contestant's output differs from ours.

    Raises:
        ValueError: options that do not fit, or no GPU that runs the kernels.
    """
    cases, (contestants, absent) = cases_of(args), chosen(args, COMPETITORS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why = why_not(device, DTYPES[args.dtype], args.head_dim)
    if why is not None:
        raise ValueError(
            f"timing the kernels needs an NVIDIA GPU that runs them: {why}; `elastic doctor` shows what this machine "
            "can run, `elastic bench table DIR` shows the records of another one"
        )
    for name in absent:
        say(f"{name} left out: {COMPETITORS[name].package} is not installed")
    stamp, path = records.stamp(command, args.commit, device), args.out / f"{args.tag}.json"
    found = [{**record, **stamp} for record in machine_records(cases)]
    for case in cases:
        timed = run_case(case, contestants, args.budget_ms, args.flex_max_length, str(device))
        found += [{**record, **stamp} for record in timed]
        records.save(path, found)  # after every case: a long run that is stopped leaves what it has
        torch.cuda.empty_cache()
    say(f"\n{tables.terminal(found)}\n")
    written = [path]
    if any(case.msr is not None for case in cases):
        written.append(save_png(attention_figure(found), path.with_suffix(".png")))
    say(f"Written: {', '.join(map(str, written))}")
    return int(any(r["metric"] == LEFT_OUT and r["why"].startswith(DISAGREED) for r in found))


def run_case(
    case: Case, contestants: Mapping[str, Contestant], budget_ms: float, flex_max_length: int, device: str
) -> list[Record]:
    """Records of our kernel and of every contestant that takes the case: `time` in ms and `eff` in TFLOP/s."""
    inputs, work = case.inputs(device), case.flops()
    reference = forward(inputs)[0]
    found = _timed(case, "ours", lambda: forward(inputs)[0], work, budget_ms)
    for name, contestant in contestants.items():
        if not contestant.takes(case):
            continue
        if contestant.flex and case.length > flex_max_length:
            found.append(_left_out(case, name, f"longer than --flex-max-length {flex_max_length}"))
            continue
        try:
            found += _checked(case, name, contestant, inputs, reference, work, budget_ms)
        except Exception as error:  # noqa: BLE001 - a competitor that cannot run is a result, stated in the table
            reason = " ".join(str(error).split())[:200]
            found.append(_left_out(case, name, f"{type(error).__name__}: {reason}"))
    return found


def _checked(
    case: Case, name: str, contestant: Contestant, inputs: Inputs, reference: Tensor, work: float, budget_ms: float
) -> list[Record]:
    call = contestant.build(case, inputs)
    difference = largest_difference(call(), reference)
    if not difference <= TOLERANCE:
        return [_left_out(case, name, f"{DISAGREED} by {difference:.3g}, allowed is {TOLERANCE}")]
    return _timed(case, name, call, work, budget_ms)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference of two [1, S, H, D] outputs; infinite where either holds a NaN."""
    if one.shape != other.shape:
        raise ValueError(f"outputs of shape {list(one.shape)} and {list(other.shape)} cannot be compared")
    pieces = zip(one.split(CHUNK, dim=1), other.split(CHUNK, dim=1), strict=True)
    worst = torch.stack([(a.float() - b.float()).abs().amax() for a, b in pieces]).amax().item()
    return math.inf if math.isnan(worst) else worst


def _timed(case: Case, who: str, call: Callable[[], Tensor], work: float, budget_ms: float) -> list[Record]:
    timing = measure(call, budget_ms)
    rate = work / timing.ms / 1e9
    say(f"{case.name:24s} {who:7s} {timing.ms:10.4f} ms  {rate:6.1f} TFLOP/s  {timing.repeats} repeats")
    shared = {"case": case.name, "who": who, "repeats": timing.repeats, **case.facts()}
    return [
        {**shared, "metric": "time", "value": timing.ms, "unit": "ms"},
        {**shared, "metric": "eff", "value": rate, "unit": "TFLOP/s"},
    ]


def _left_out(case: Case, who: str, why: str) -> Record:
    say(f"{case.name:24s} {who:7s} left out: {why}")
    facts = {"case": case.name, "who": who, **case.facts()}
    return {**facts, "metric": LEFT_OUT, "value": None, "unit": "", "why": why}


def machine_records(cases: list[Case]) -> list[Record]:
    """What is measured once a run: host time of a call, memory beyond its outputs at the longest case, a matrix
    product as the ceiling.
    """
    shape, kv_heads = replace(cases[0], density=None), cases[0].kv_heads
    small = replace(shape, length=1024, streaming=kv_heads // 2).inputs("cuda")
    longest = replace(shape, length=max(case.length for case in cases), streaming=kv_heads - kv_heads // 4)
    inputs = longest.inputs("cuda")
    host, extra = host_microseconds(lambda: forward(small)), extra_bytes(lambda: forward(inputs))
    return [
        {"case": "host", "who": "ours", "metric": "host time", "value": host, "unit": "us"},
        {"case": f"memory-{longest.name}", "who": "ours", "metric": "extra memory", "value": extra, "unit": "bytes"},
        {"case": "matmul-8192", "who": "cublas", "metric": "eff", "value": matmul_tflops(), "unit": "TFLOP/s"},
    ]
