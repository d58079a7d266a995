"""Launches the kernel that estimates and chooses the key blocks of XAttention heads, on compute capability 9.0.

Legend: B batch rows, N samples, S tokens, H query heads, K KV heads, D head dim.
"""

import torch
from torch import Tensor

from elastic.kernels import jit
from elastic.kernels.block_sparse import tile_counter
from elastic.kernels.devices import SelectionConfig, device_facts, selection_config
from elastic.kernels.params import (
    KEY_CELLS,
    QUERY_BLOCK,
    ROW_TILE,
    Pattern,
    Ranges,
    pack_pointers,
    pack_selection,
    pack_sizes,
    strides_of,
)
from elastic.kernels.tensor_map import phase_maps

STRIDES, BLOCKS = (8, 16), (64, 128)


def mass_shape(q: Tensor, k: Tensor, mode: Tensor, stride: int, block: int) -> tuple[int, int, int, int]:
    """[N, H, query blocks, key blocks of whole key tiles]: the shape of `launch_selection`'s masses."""
    columns = -(-k.shape[1] // (KEY_CELLS * stride)) * (KEY_CELLS * stride // block)
    return mode.shape[0], q.shape[2], -(-q.shape[1] // QUERY_BLOCK), columns


def config_for(q: Tensor, k: Tensor, mode: Tensor, stride: int, block: int) -> SelectionConfig:
    """Launch choices for such tensors on their GPU."""
    processors = device_facts(q.device.index)[1]
    tiles = mode.shape[0] * q.shape[2] * -(-q.shape[1] // (ROW_TILE * stride))
    return selection_config(processors, mode.shape[0], tiles, -(-k.shape[1] // block))


def launch_selection(
    q: Tensor, k: Tensor, mode: Tensor, stride: int, threshold: float, block: int, scale: float, ranges: Ranges,
    mass: Tensor | None = None, debug: tuple[str, ...] = (),
) -> Tensor:  # fmt: skip
    """Bits of checked CUDA tensors, 0 for the heads in other modes.

    Args:
        mass: fp32 of `mass_shape`, takes the estimated mass of every key block that a query block may visit; for the
            tests, as `debug` is.
    """
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
            pack_sizes(q, k, k, q, mode, bits, Pattern(0, 1, "token", block, scale)),
            pack_selection(threshold, mass, q.shape[1] % stride, k.shape[1] % stride, columns, config.shared_units),
        )
    )  # fmt: skip
    jit.launch(kernel, (config.grid,), config.threads, params, config.shared_bytes, q.device.index)
    return bits
