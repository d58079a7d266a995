"""`elastic bench attention`: the fused forward kernel beside its competitors, in one run; with a head dim that it does
not take, what runs instead of it.

Building block lists and compiling are not timed.
"""

import argparse
from dataclasses import replace

import torch

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import batch_layout
from elastic.attention.routed import backend_for
from elastic.attention.torch_path import attend
from elastic.bench import records
from elastic.bench.cases import BLOCK, DTYPES, SINK, WINDOW, Case, Inputs
from elastic.bench.contestants import COMPETITORS, Call, forward
from elastic.bench.options import add_options, cases_of, chosen, kernel_device
from elastic.bench.race import product_ceiling, race
from elastic.bench.records import Measurement
from elastic.bench.timing import extra_bytes, host_microseconds
from elastic.config import SparseConfig
from elastic.console import say
from elastic.kernels import unsupported_reason
from elastic.kernels.checks import HEAD_DIMS

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
    taken = args.head_dim in HEAD_DIMS
    device = kernel_device(args, unsupported_reason if taken else no_gpu)
    stamp = records.stamp(command, args.commit, device)
    if taken:
        return race(args, cases, {"ours": ours}, contestants, machine_records(cases), stamp, device)
    say(f"the kernels take no head dim {args.head_dim}; timed is PyTorch, which runs such layers")
    stamp["kernel"] = backend_for(device, DTYPES[args.dtype], args.head_dim)
    return race(args, cases, {"torch": in_torch}, contestants, [product_ceiling()], stamp, device)


def ours(inputs: Inputs) -> Call:
    """Our operator."""
    return lambda: forward(inputs)[:1]


def in_torch(inputs: Inputs) -> Call:
    """PyTorch's path of a routed layer."""
    (q, k, v), device = (x.transpose(1, 2) for x in inputs[:3]), inputs.q.device
    layout = batch_layout(1, inputs.q.shape[1], 0, device)
    sparse = SparseConfig(sink=SINK, window=WINDOW, block=BLOCK, granule="block")
    plan = HeadPlan(inputs.mode, sparse, layout, bits=inputs.bits)
    return lambda: (attend(q, k, v, plan, inputs.q.shape[3] ** -0.5),)


def no_gpu(device: torch.device, _dtype: torch.dtype, _head_dim: int) -> str | None:
    """Why PyTorch's path cannot be timed here, as `unsupported_reason` says it of the kernels."""
    return None if device.type == "cuda" else "no CUDA device"


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
