"""`select_blocks`: the key blocks that XAttention heads visit, as the bits that `attention_forward` takes.

The operator is `torch.ops.elastic.xattention_select`; `xattention_oracle` states what it computes. On compute
capability 9.0 one kernel estimates and chooses: modes and sample ranges are read on the device, the host never waits.
Other GPUs and the CPU run the oracle, which does wait. Legend: B batch rows, N samples, S tokens, H query heads, K KV
heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from elastic.kernels import jit, operators
from elastic.kernels.attention_forward import tile_counter
from elastic.kernels.block_bits import query_block
from elastic.kernels.checks import check_alignment, check_cuda, check_metadata, check_scale, check_tensors
from elastic.kernels.devices import SelectionConfig, capability_of, processors_of, selection_config
from elastic.kernels.params import (
    KEY_CELLS,
    QUERY_BLOCK,
    ROW_TILE,
    WHOLE_ROWS,
    Pattern,
    Ranges,
    pack_pointers,
    pack_selection,
    pack_sizes,
    strides_of,
)
from elastic.kernels.tensor_map import phase_maps
from elastic.kernels.xattention_oracle import select_oracle

STRIDES, BLOCKS = (8, 16), (64, 128)


def select_blocks(
    q: Tensor, k: Tensor, mode: Tensor, pattern: Pattern, ranges: Ranges = WHOLE_ROWS, *, stride: int, threshold: float
) -> Tensor:
    """Key blocks of the heads in mode 2; other heads are not estimated. A constant for autograd.

    Args:
        q: [B, Sq, H, D] after RoPE; k: [B, Sk, K, D]; query head h reads KV head h // (H / K).
        mode: int32 [N, K], as for `attention_forward`.
        pattern: only its block and its scale count. The block has 64 or 128 keys; the CPU also takes smaller powers of
            two (see `query_block`).
        ranges: where the samples lie; by default every row is one.
        stride: tokens of an antidiagonal cell, a divisor of the block; the CUDA kernel takes 8 and 16.
        threshold: share of the estimated mass that the visited blocks hold, in (0, 1].

    Returns:
        bits, int32 [N, H, ceil(Sq / 128), ceil(Sk / (32 * pattern.block))], see `block_bits`.

    Raises:
        ValueError: arguments that do not fit, with the way out.
    """
    scale = pattern.scale_for(q.shape[-1])
    with torch.no_grad():
        bits: Tensor = torch.ops.elastic.xattention_select(q, k, mode, stride, threshold, pattern.block, scale, *ranges)
    return bits


def check_selection(
    q: Tensor, k: Tensor, mode: Tensor, pattern: Pattern, ranges: Ranges, stride: int, threshold: float
) -> None:
    """What every implementation needs of its arguments; reads shapes and types only."""
    block = pattern.block
    check_tensors(q, k, k)
    check_metadata(q, k, mode, ranges, None, block)
    if block < 1 or block > QUERY_BLOCK or block & (block - 1):
        raise ValueError(f"block={block}; expected a power of two up to {QUERY_BLOCK}, and 64 or 128 on a GPU")
    if stride < 1 or block % stride:
        raise ValueError(f"stride={stride} does not divide block={block}; use {min(16, block)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is not in (0, 1]; 0.9 is usual")
    check_scale(pattern.scale)


def mass_shape(q: Tensor, k: Tensor, mode: Tensor, stride: int, block: int) -> tuple[int, int, int, int]:
    """[N, H, query blocks, key blocks of whole key tiles]: the shape of `launch_selection`'s masses."""
    columns = -(-k.shape[1] // (KEY_CELLS * stride)) * (KEY_CELLS * stride // block)
    return mode.shape[0], q.shape[2], -(-q.shape[1] // QUERY_BLOCK), columns


def config_for(q: Tensor, k: Tensor, mode: Tensor, stride: int, block: int) -> SelectionConfig:
    """Launch choices for such tensors on their GPU."""
    tiles = mode.shape[0] * q.shape[2] * -(-q.shape[1] // (ROW_TILE * stride))
    return selection_config(processors_of(q.device.index), mode.shape[0], tiles, -(-k.shape[1] // block))


def launch_selection(
    q: Tensor, k: Tensor, mode: Tensor, pattern: Pattern, ranges: Ranges, *, stride: int, threshold: float,
    mass: Tensor | None = None, debug: tuple[str, ...] = (),
) -> Tensor:  # fmt: skip
    """Bits of checked CUDA tensors, 0 for the heads in other modes.

    Args:
        mass: fp32 of `mass_shape`, takes the estimated mass of every key block that a query block may visit; for the
            tests, as `debug` is.
    """
    block = pattern.block
    config = config_for(q, k, mode, stride, block)
    columns = mass_shape(q, k, mode, stride, block)[3]
    words = -(-k.shape[1] // (32 * block))
    bits = torch.zeros(
        mode.shape[0], q.shape[2], -(-q.shape[1] // QUERY_BLOCK), words, dtype=torch.int32, device=q.device
    )
    if bits.numel() == 0:
        return bits
    scratch = torch.empty(config.grid * ROW_TILE * columns, dtype=torch.float32, device=q.device)
    macros = (f"ELASTIC_STRIDE={stride}", f"ELASTIC_BLOCK={block}", *debug)
    variant = jit.Variant("xattention_select_sm90", "sm_90a", q.shape[3], q.dtype == torch.bfloat16, macros)
    kernel = jit.load_kernel(variant, q.device.index)
    maps_q = phase_maps(q, strides_of(q), stride, ROW_TILE)
    maps_k = phase_maps(k, strides_of(k), stride, KEY_CELLS)
    params = b"".join(
        (
            maps_q[0], maps_k[0], maps_q[1], maps_k[1],
            pack_pointers(q, k, k, q, scratch, mode, bits, ranges, tile_counter(q.device)),
            pack_sizes(q, k, k, q, mode, bits, pattern),
            pack_selection(threshold, mass, q.shape[1] % stride, k.shape[1] % stride, columns, config.shared_units),
        )
    )  # fmt: skip
    jit.launch(kernel, (config.grid,), config.threads, params, config.shared_bytes, q.device.index)
    return bits


def _select_torch(
    q: Tensor, k: Tensor, mode: Tensor, stride: int, threshold: float, block: int, scale: float, *spans: Tensor | None
) -> Tensor:
    pattern, ranges = Pattern.without_streaming(block, scale), Ranges(*spans)
    check_selection(q, k, mode, pattern, ranges, stride, threshold)
    return select_oracle(q, k, mode, pattern, ranges, stride=stride, threshold=threshold)


def _select_cuda(
    q: Tensor, k: Tensor, mode: Tensor, stride: int, threshold: float, block: int, scale: float, *spans: Tensor | None
) -> Tensor:
    if capability_of(q.device.index) != (9, 0):
        return _select_torch(q, k, mode, stride, threshold, block, scale, *spans)
    pattern, ranges = Pattern.without_streaming(block, scale), Ranges(*spans)
    check_selection(q, k, mode, pattern, ranges, stride, threshold)
    if stride not in STRIDES or block not in BLOCKS:
        raise ValueError(f"stride={stride}, block={block}; the CUDA kernel takes strides {STRIDES} and blocks {BLOCKS}")
    check_cuda(q, k, k)
    check_alignment(q, k, k)
    return launch_selection(q, k, mode, pattern, ranges, stride=stride, threshold=threshold)


def _select_fake(q: Tensor, k: Tensor, mode: Tensor, _stride: int, _threshold: float, block: int, *_: Any) -> Tensor:
    shape = (mode.shape[0], q.shape[2], -(-q.shape[1] // query_block(block)), -(-k.shape[1] // (32 * block)))
    return torch.empty(shape, dtype=torch.int32, device=q.device)


operators.define(
    "xattention_select(Tensor q, Tensor k, Tensor mode, int stride, float threshold, int block, float scale, "
    f"{operators.RANGES}) -> Tensor",
    cuda=_select_cuda,
    cpu=_select_torch,
    fake=_select_fake,
)
