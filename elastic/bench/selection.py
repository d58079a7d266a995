"""`elastic bench selection`: what choosing key blocks costs of a layer, for every method that chooses them.

The layer is one of an 8B model (hidden 4096, MLP 14336, 32 query and 8 KV heads of 128): its norms, projections and MLP
are timed once, its attention under the blocks that a method chose, and the choice alone, bits included, each as a model
runs it. Sizes are those that the methods were published with. Inputs are `structured`.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from elastic.attention.block_selection import with_blocks
from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import batch_layout
from elastic.bench import records, tables, xattention
from elastic.bench.cases import BLOCK
from elastic.bench.options import add_record_options, kernel_device
from elastic.bench.records import Measurement
from elastic.bench.timing import extra_bytes, measure
from elastic.config import SparseConfig
from elastic.console import say
from elastic.kernels import attention_forward, unsupported_reason
from elastic.routing.methods import Method, parse_method

SUMMARY = "choosing key blocks by each method that does, beside the attention to them and the rest of the layer"
METHODS = ("xattention:0.9", "moba:3", "nsa", "infllm", "flexprefill:0.95", "flashprefill:0.12")
HIDDEN, MLP, CHUNK = 4096, 14336, 16384  # CHUNK: tokens that the MLP works on at a time
SIZES = {  # published ones; those of other methods are the defaults
    "nsa": SparseConfig(block=64, sink=64, window=512),
    "infllm": SparseConfig(block=64, sink=64, window=2048),
    "flashprefill": SparseConfig(block=128, sink=256, window=512),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--lengths", type=int, nargs="+", default=(65536,), metavar="S", help="tokens (default 64K)")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME",
                        help=f"methods that choose blocks (default {' '.join(METHODS)})")  # fmt: skip
    add_record_options(parser, "selection")
    parser.set_defaults(dtype="bf16", head_dim=xattention.HEAD_DIM)


def run(args: argparse.Namespace, command: str) -> int:
    """Time every method, show the table, write `<out>/<tag>.json`.

    Returns:
        0.

    Raises:
        ValueError: options that do not fit, or no GPU that runs the kernels.
    """
    methods = [parse_method(name) for name in args.methods]
    for method in methods:
        if not sizes_of(method).chooser:
            raise ValueError(f"method {method.name} chooses no key blocks; use some of {', '.join(METHODS)}")
    for length in args.lengths:
        if length < BLOCK or length % BLOCK:
            raise ValueError(f"length {length} is not a positive multiple of {BLOCK}; use 65536")
    device = kernel_device(args, unsupported_reason)
    stamp, path = records.stamp(command, args.commit, device), args.out / f"{args.tag}.json"
    found: list[Measurement] = []
    for length in args.lengths:
        rest = beside_attention(length, args, str(device))
        found += rest
        for method in methods:
            found += of_method(method, length, rest[0]["value"], args, str(device))
            records.save(path, [{**record, **stamp} for record in found])  # a run that is stopped leaves what it has
            torch.cuda.empty_cache()
    say(f"\n{tables.terminal(found)}\n\nWritten: {path}")
    return 0


def sizes_of(method: Method) -> SparseConfig:
    """The configuration that a method runs on: its published sizes and its own settings."""
    return method.sparse(SIZES.get(method.kind, SparseConfig()))


def beside_attention(length: int, args: argparse.Namespace, device: str) -> list[Measurement]:
    """Times of the layer without attention, and of dense attention by cuDNN."""
    q, k, _ = xattention.operands(length, device)
    v = torch.randn(k.shape, generator=torch.Generator(device).manual_seed(1), device=device).to(k.dtype)

    def cudnn() -> Tensor:
        with sdpa_kernel(xattention.DENSE):
            return scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
            )

    layer = Layer(device, q.dtype)
    hidden = torch.randn(length, HIDDEN, device=device, dtype=q.dtype)
    with torch.inference_mode():
        return [
            _time("rest-of-layer", length, "cublas", partial(layer, hidden), args.budget_ms),
            _time("attention", length, "cudnn", cudnn, args.budget_ms),
        ]


class Layer:
    """A decoder layer but for its attention: norms, projections, MLP, of random weights."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        heads, kv_heads = (n * xattention.HEAD_DIM for n in (xattention.HEADS, xattention.KV_HEADS))
        shapes = ((heads + 2 * kv_heads, HIDDEN), (HIDDEN, heads), (MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP))
        self.qkv, self.out, self.gate, self.up, self.down = (
            torch.randn(shape, device=device, dtype=dtype) * shape[1] ** -0.5 for shape in shapes
        )

    def __call__(self, hidden_SE: Tensor) -> Tensor:
        """What runs beside attention on tokens [S, E]; the queries take the place of its output."""
        normed = rms_norm(hidden_SE, (HIDDEN,))
        heads = self.out.shape[1]
        hidden_SE = hidden_SE + linear(linear(normed, self.qkv)[:, :heads], self.out)
        parts = [
            linear(silu(linear(x, self.gate)) * linear(x, self.up), self.down)
            for x in rms_norm(hidden_SE, (HIDDEN,)).split(CHUNK)
        ]
        return hidden_SE + torch.cat(parts)


def of_method(method: Method, length: int, rest_ms: float, args: argparse.Namespace, device: str) -> list[Measurement]:
    """Times of a method's choice and of attention under it, its density, and what share of the layer the choice is."""
    q, k, _ = xattention.operands(length, device)
    v = torch.randn(k.shape, generator=torch.Generator(device).manual_seed(1), device=device).to(k.dtype)
    sparse, scale = sizes_of(method), q.shape[3] ** -0.5
    ones = torch.ones(1, k.shape[2], device=device)
    plan = HeadPlan.build(ones, sparse, batch_layout(1, length, 0, torch.device(device)))

    def choose() -> Tensor:
        bits = with_blocks(q.transpose(1, 2), k.transpose(1, 2), plan, scale, fused=True, both=False).bits
        assert bits is not None
        return bits

    with torch.inference_mode():
        bits, pattern = choose(), plan.pattern(scale)

        def attend() -> Tensor:
            return attention_forward(q, k, v, plan.mode_NK, pattern, bits=bits)[0]

        found = [
            _time("choice", length, method.name, choose, args.budget_ms),
            _time("attention", length, method.name, attend, args.budget_ms),
        ]
        memory = extra_bytes(lambda: (choose(),))
    choice, attention = (record["value"] for record in found)
    density = xattention.causal_share(bits, length, sparse.block)
    figures = (
        ("density", density, ""),
        ("choice, share of the layer", choice / (choice + attention + rest_ms), ""),
        ("choice, share of its attention", choice / (choice + attention), ""),
        ("extra memory, choice", memory / 1e6, "MB"),
    )
    return [*found, *(_figure("layer", length, method.name, *figure) for figure in figures)]


def _time(case: str, length: int, who: str, call: Callable[[], Tensor], budget_ms: float) -> Measurement:
    timing = measure(call, budget_ms)
    return {**_figure(case, length, who, "time", timing.ms, "ms"), "repeats": timing.repeats}


def _figure(case: str, length: int, who: str, metric: str, value: float, unit: str) -> Measurement:
    name = f"{case}-{length // 1024}k" if length % 1024 == 0 else f"{case}-{length}"
    say(f"{name:20s} {who:18s} {metric}: {value:.4g} {unit}")
    shape = {"heads": xattention.HEADS, "kv_heads": xattention.KV_HEADS, "head_dim": xattention.HEAD_DIM}
    return {"case": name, "who": who, "length": length, **shape, "dtype": "bf16", "metric": metric, "value": value,
            "unit": unit}  # fmt: skip
