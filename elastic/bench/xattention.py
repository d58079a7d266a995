"""`elastic bench xattention`: estimating and choosing key blocks on the GPU, and a whole attention layer that way.

Inputs are `structured`, the shape is that of an 8B model; TFLOP/s of the selection count its product of rows and cells
on and below the diagonal, those of a layer the blocks that it visits.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from elastic.bench import records, tables
from elastic.bench.cases import BLOCK, DTYPES
from elastic.bench.options import add_record_options, kernel_device
from elastic.bench.race import product_ceiling, timed
from elastic.bench.records import Measurement
from elastic.bench.structured import structured
from elastic.bench.timing import extra_bytes
from elastic.console import say
from elastic.kernels import Pattern, attention_forward, select_blocks, unsupported_selection
from elastic.kernels.block_bits import count_bits
from elastic.kernels.params import BLOCK_SPARSE
from elastic.kernels.xattention_oracle import select_oracle

SUMMARY = "XAttention's choice of key blocks beside plain PyTorch; a layer with it beside dense attention"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TORCH_LONGEST = 65536  # beyond, PyTorch's scores take seconds
DENSE = SDPBackend.CUDNN_ATTENTION


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--lengths", type=int, nargs="*", default=(16384, 65536, 131072, 262144), metavar="S",
                        help="tokens of the selections (default 16K 64K 128K 256K)")  # fmt: skip
    parser.add_argument("--strides", type=int, nargs="+", default=(16, 8), metavar="S", help="default 16 8")
    parser.add_argument("--block", type=int, default=BLOCK, metavar="N", help="keys of a block (default 128)")
    parser.add_argument("--threshold", type=float, default=0.9, metavar="T", help="share of the mass (default 0.9)")
    parser.add_argument("--layers", type=int, nargs="*", default=(131072,), metavar="S",
                        help="tokens of the layers: selection and attention beside cuDNN (default 128K)")  # fmt: skip
    parser.add_argument("--memory", type=int, default=262144, metavar="S",
                        help="tokens of the layer whose memory is measured; 0: none (default 256K)")  # fmt: skip
    add_record_options(parser, "xattention")
    parser.set_defaults(dtype="bf16", head_dim=HEAD_DIM)


def run(args: argparse.Namespace, command: str) -> int:
    """Time every case, show the table, write `<out>/<tag>.json`.

    Returns:
        0.

    Raises:
        ValueError: options that do not fit, or no GPU that runs the kernels.
    """
    for length in (*args.lengths, *args.layers, args.memory):
        if length < 0 or length % BLOCK:
            raise ValueError(f"length {length} is not a multiple of {BLOCK}; use {-(-abs(length) // BLOCK) * BLOCK}")
    device = kernel_device(args, unsupported_selection)
    stamp, path = records.stamp(command, args.commit, device), args.out / f"{args.tag}.json"
    stamp["kernel"] = "xattention_select_sm90 (sm_90a)"
    found = [product_ceiling()]
    jobs: list[Callable[[], list[Measurement]]] = []
    for length in args.lengths:
        jobs += [partial(selection_records, length, stride, args, str(device)) for stride in args.strides]
    jobs += [partial(layer_records, length, args, str(device)) for length in args.layers]
    jobs += [partial(memory_records, args.memory, args, str(device))] if args.memory else []
    for job in jobs:
        found += job()
        records.save(path, [{**record, **stamp} for record in found])  # a run that is stopped leaves what it has
        torch.cuda.empty_cache()
    say(f"\n{tables.terminal(found)}\n\nWritten: {path}")
    return 0


def operands(length: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Structured q and k in bf16, and the mode that estimates every head."""
    q, k = structured(length, HEADS, KV_HEADS, HEAD_DIM, device)
    return (
        q.to(DTYPES["bf16"]),
        k.to(DTYPES["bf16"]),
        torch.full((1, KV_HEADS), BLOCK_SPARSE, dtype=torch.int32, device=device),
    )


def causal_share(bits: Tensor, length: int, block: int) -> float:
    """Chosen key blocks over those at or below the diagonal, of all query heads."""
    query = torch.arange(length // BLOCK, device=bits.device)
    causal = ((query + 1) * BLOCK // block).sum().item() * bits.shape[1]
    return count_bits(bits).sum().item() / causal


def selection_records(length: int, stride: int, args: argparse.Namespace, device: str) -> list[Measurement]:
    """Time of one selection, its density, and where PyTorch can follow its time and the agreement of the two."""
    q, k, mode = operands(length, device)
    given = q, k, mode, Pattern.without_streaming(args.block)
    sizes: dict[str, Any] = {"stride": stride, "threshold": args.threshold}
    cells = length // stride
    work = 2.0 * HEADS * stride * HEAD_DIM * cells * (cells + 1) / 2
    name = _name(f"select-s{stride}-b{args.block}", length)
    bits = select_blocks(*given, **sizes)
    found = _timed(name, length, {"ours": partial(select_blocks, *given, **sizes)}, {"ours": work}, args, device)
    found.append(_figure(name, length, "density", causal_share(bits, length, args.block), ""))
    if length <= TORCH_LONGEST:
        oracle = partial(select_oracle, *given, **sizes)
        found += _timed(name, length, {"torch": oracle}, {"torch": work}, args, device)  # far slower: not in turn
        counts, wanted = count_bits(bits), count_bits(oracle())
        close = ((counts - wanted).abs() <= 1).double().mean().item()
        found.append(_figure(name, length, "rows within 1 block of the oracle", close, ""))
    return found


def layer_call(
    length: int, args: argparse.Namespace, device: str
) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """q, k, v of a layer, its selection, and its attention under given bits."""
    q, k, mode = operands(length, device)
    v = torch.randn(k.shape, generator=torch.Generator(device).manual_seed(1), device=device).to(k.dtype)
    pattern = Pattern.without_streaming(args.block)
    select = partial(select_blocks, q, k, mode, pattern, stride=16, threshold=args.threshold)

    def attend(bits: Tensor) -> Tensor:
        return attention_forward(q, k, v, mode, pattern, bits=bits)[0]

    return (q, k, v), select, attend


def layer_records(length: int, args: argparse.Namespace, device: str) -> list[Measurement]:
    """A layer whose heads all choose their blocks, stride 16, beside dense attention of cuDNN."""
    (q, k, v), select, attend = layer_call(length, args, device)
    bits, name = select(), _name(f"layer-s16-b{args.block}", length)
    density = causal_share(bits, length, args.block)
    dense = 2.0 * HEADS * length * length * HEAD_DIM

    def cudnn() -> Tensor:
        with sdpa_kernel(DENSE):
            return scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
            )

    work = {"ours": density * dense, "cudnn": dense}
    found = _timed(name, length, {"ours": lambda: attend(select()), "cudnn": cudnn}, work, args, device)
    found += _timed(f"{name}-attention-alone", length, {"ours": lambda: attend(bits)}, work, args, device)
    ms = {r["who"]: r["value"] for r in found if r["metric"] == "time" and r["case"] == name}
    found.append(_figure(name, length, "density", density, ""))
    return [*found, _figure(name, length, "speed over cudnn", ms["cudnn"] / ms["ours"], "x")]


def memory_records(length: int, args: argparse.Namespace, device: str) -> list[Measurement]:
    """Device memory beyond q, k, v and the output: of the selection with its bits, and of the attention with them. The
    selection's scratch is free again when the output is allocated, so the larger of the two counts.
    """
    _, select, attend = layer_call(length, args, device)
    bits = select()
    chosen = bits.untyped_storage().nbytes()
    found = {"selection": extra_bytes(lambda: (select(),)) + chosen}
    found["attention"] = extra_bytes(lambda: (attend(bits),)) + chosen
    name = _name(f"layer-s16-b{args.block}", length)
    return [_figure(name, length, f"extra memory, {part}", size / 1e6, "MB") for part, size in found.items()]


def _timed(
    case: str, length: int, calls: Mapping[str, Callable[[], Tensor]], work: Mapping[str, float],
    args: argparse.Namespace, device: str,
) -> list[Measurement]:  # fmt: skip
    return timed(case, _properties(length), calls, work, args.budget_ms, torch.device(device))


def _name(kind: str, length: int) -> str:
    return f"{kind}-{length // 1024}k" if length % 1024 == 0 else f"{kind}-{length}"


def _properties(length: int) -> Measurement:
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bf16"}
    return {"length": length, **shape}


def _figure(case: str, length: int, metric: str, value: float, unit: str) -> Measurement:
    say(f"{case:24s} {metric}: {value:.4g} {unit}")
    return {"case": case, "who": "ours", **_properties(length), "metric": metric, "value": value, "unit": unit}
