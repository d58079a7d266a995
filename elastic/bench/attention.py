"""`elastic bench attention`: the fused forward kernel beside its competitors, in one run.

Building block lists and compiling are not timed.
"""

import argparse
from dataclasses import replace

from elastic.bench import records
from elastic.bench.cases import Case, Inputs
from elastic.bench.contestants import COMPETITORS, Call, forward
from elastic.bench.options import add_options, cases_of, chosen, kernel_device
from elastic.bench.race import product_ceiling, race
from elastic.bench.records import Measurement
from elastic.bench.timing import extra_bytes, host_microseconds
from elastic.kernels import unsupported_reason

SUMMARY = "the fused forward kernel beside SDPA, FlexAttention, serial dispatch and flash-attn-4"


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
    cases, contestants = cases_of(args), chosen(args, COMPETITORS)
    device = kernel_device(args, unsupported_reason)
    stamp = records.stamp(command, args.commit, device)
    return race(args, cases, {"ours": ours}, contestants, machine_records(cases), stamp, device)


def ours(inputs: Inputs) -> Call:
    """Our operator."""
    return lambda: forward(inputs)[:1]


def machine_records(cases: list[Case]) -> list[Measurement]:
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
        product_ceiling(),
    ]
