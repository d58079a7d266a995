"""`attention_forward`: one launch in which every (sample, KV head) runs full, streaming or block-sparse attention.

The operator is `torch.ops.elastic.attention_forward`: CUDA kernels on a GPU, the oracle on the CPU. Modes and sample
ranges are read on the device; the host never waits. Legend: B batch rows, N samples, S tokens, H query heads, K KV
heads, D head dim.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from elastic.kernels import jit, operators
from elastic.kernels.attention_sinks import check_sinks, share_with_sinks
from elastic.kernels.checks import check_alignment, check_cuda, check_metadata, check_pattern, check_tensors
from elastic.kernels.devices import LaunchConfig, capability_of, launch_config, processors_of
from elastic.kernels.oracle import attention_oracle
from elastic.kernels.params import (
    HALF_BLOCK,
    MAP_BYTES,
    QUERY_BLOCK,
    WARP_ROWS,
    WHOLE_ROWS,
    Pattern,
    Ranges,
    pack_pointers,
    pack_sizes,
    strides_of,
)
from elastic.kernels.tensor_map import tensor_map


@cache
def _counter(device: torch.device, _stream: int) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


def tile_counter(device: torch.device) -> Tensor:
    """int32 [2] of zeros that no other launch in flight uses; every launch leaves them zero again.

    One per stream; a captured graph gets its own, because graphs captured on one stream may replay on several.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    return _counter(device, jit.current_stream(device.index))


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mode: Tensor, pattern: Pattern, ranges: Ranges = WHOLE_ROWS,
    bits: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal attention of all heads, each in its mode. Not differentiable by itself.

    Args:
        q: [B, Sq, H, D], bf16 or fp16, D 64 or 128, any strides that are multiples of 16 bytes, D contiguous.
        k, v: [B, Sk, K, D] likewise; query head h reads KV head h // (H / K).
        mode: int32 [N, K]: 0 full, 1 streaming, 2 block-sparse by `bits`. A head with another value, or with 2 and no
            bits, answers NaN.
        pattern: sizes of the streaming heads and of the blocks, softmax scale.
        ranges: where the samples lie; by default every row is one.
        bits: int32 [N, H, ceil(Sq / 128), ceil(Sk / (32 * pattern.block))], see `block_bits`.
        sinks: [H], a logit of each query head that joins its softmax's denominator, see `attention_sinks`.

    Returns:
        out [B, Sq, H, D] contiguous, in q's dtype, 0 in rows of no sample; lse [B, H, Sq] fp32 (of fp64 operands
        fp64), the natural logarithm of the softmax denominator, -inf where a query sees no key.

    Raises:
        ValueError: arguments that do not fit, with the way out.
    """
    if operators.is_plain_cuda(q):
        return _forward_cuda(q, k, v, mode, pattern, ranges, bits, sinks)
    flat = operators.flatten(pattern, ranges, q.shape[-1])
    out, lse = torch.ops.elastic.attention_forward(q, k, v, mode, *flat, bits, sinks)
    return out, lse


def _outputs(q: Tensor, ranges: Ranges) -> tuple[Tensor, Tensor]:
    shape, lse_shape = q.shape, (q.shape[0], q.shape[2], q.shape[1])
    if ranges.partial:
        lse = torch.full(lse_shape, float("-inf"), dtype=torch.float32, device=q.device)
        return torch.zeros(shape, dtype=q.dtype, device=q.device), lse
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(lse_shape, dtype=torch.float32)


@dataclass(frozen=True)
class PreparedLaunch:
    """What all calls with the same shapes, strides and pattern share: checked once, then looked up."""

    config: LaunchConfig
    kernel: Any
    sizes: bytes
    strides: tuple[tuple[int, int, int], ...]  # of q, k, v, out
    maps: dict[tuple[int, ...], bytes] = field(default_factory=dict)  # tensor maps of q, k, v, out by their addresses


def prepare_launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, mode: Tensor, pattern: Pattern, bits: Tensor | None,
    config: LaunchConfig | None = None, debug: tuple[str, ...] = (),
) -> PreparedLaunch:  # fmt: skip
    """Choose and load the kernel, and pack everything but the addresses. `config` and `debug` serve the tests."""
    samples, index = mode.shape[0], q.device.index
    if config is None:
        tiles = samples * -(-q.shape[1] // QUERY_BLOCK) * q.shape[2]
        config = launch_config(capability_of(index), processors_of(index), q.shape[3], samples, tiles)
    variant = jit.Variant(config.name, config.arch, q.shape[3], q.dtype == torch.bfloat16, debug)
    sizes = pack_sizes(q, k, v, out, mode, bits, pattern)
    return PreparedLaunch(config, jit.load_kernel(variant, index), sizes, tuple(strides_of(x) for x in (q, k, v, out)))


def _encode_maps(tensors: tuple[Tensor, ...], plan: PreparedLaunch) -> bytes:
    if plan.config.arch != "sm_90a":
        return bytes(4 * MAP_BYTES)  # that kernel reads by address
    boxes = (QUERY_BLOCK, HALF_BLOCK, HALF_BLOCK, WARP_ROWS)
    return b"".join(tensor_map(x, s, rows) for x, s, rows in zip(tensors, plan.strides, boxes, strict=True))


def launch_into(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mode: Tensor, ranges: Ranges, bits: Tensor | None,
    plan: PreparedLaunch,
) -> None:  # fmt: skip
    """Run the kernel on checked CUDA tensors, into tensors the caller owns."""
    device, config = q.device, plan.config
    addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
    maps = plan.maps.get(addresses)
    if maps is None:
        if len(plan.maps) >= _MAX_MAPS:
            plan.maps.clear()
        maps = plan.maps[addresses] = _encode_maps((q, k, v, out), plan)
    params = maps + pack_pointers(q, k, v, out, lse, mode, bits, ranges, tile_counter(device)) + plan.sizes
    jit.launch(plan.kernel, (config.grid,), config.threads, params, config.shared_bytes, device.index)


_PLANS: dict[tuple[Any, ...], PreparedLaunch] = {}
_MAX_PLANS, _MAX_MAPS = 4096, 256


def _traits(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def launch_key(pattern: Pattern, *tensors: Tensor | None) -> tuple[Any, ...]:
    """All that a prepared launch depends on: equal for calls that differ in addresses and values alone."""
    return (pattern, *map(_traits, tensors))


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, mode: Tensor, pattern: Pattern, ranges: Ranges, bits: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    key = launch_key(pattern, q, k, v, mode, *ranges, bits, sinks)
    plan = _PLANS.get(key)
    if plan is None:
        _check(q, k, v, mode, pattern, ranges, bits, sinks)
        check_cuda(q, k, v)
    out, lse = _outputs(q, ranges)
    if k.shape[1] == 0 or out.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if plan is None:
        if len(_PLANS) >= _MAX_PLANS:
            _PLANS.clear()
        plan = _PLANS[key] = prepare_launch(q, k, v, out, mode, pattern, bits)
    check_alignment(q, k, v)
    launch_into(out, lse, q, k, v, mode, ranges, bits, plan)
    return (out, lse) if sinks is None else share_with_sinks(out, lse, sinks)


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, mode: Tensor, pattern: Pattern, ranges: Ranges, bits: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, v, mode, pattern, ranges, bits, sinks)
    out, lse = attention_oracle(q, k, v, mode, pattern, ranges, bits)
    return (out, lse) if sinks is None else share_with_sinks(out, lse, sinks)


def _check(
    q: Tensor, k: Tensor, v: Tensor, mode: Tensor, pattern: Pattern, ranges: Ranges, bits: Tensor | None,
    sinks: Tensor | None,
) -> None:  # fmt: skip
    check_tensors(q, k, v)
    check_pattern(pattern, bits)
    check_metadata(q, k, mode, ranges, bits, pattern.block)
    if sinks is not None:
        check_sinks(sinks, q.shape[2], q.device)


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape, wide = (q.shape[0], q.shape[2], q.shape[1]), torch.promote_types(q.dtype, torch.float32)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(shape, dtype=wide, device=q.device)


operators.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, Tensor mode, {operators.PATTERN}, {operators.RANGES}, "
    "Tensor? bits, Tensor? sinks) -> (Tensor, Tensor)",
    cuda=operators.unflattened(_forward_cuda, 4),
    cpu=operators.unflattened(_forward_cpu, 4),
    fake=_forward_fake,
)
