"""TMA tensor maps of strided [B, S, heads, D] tensors, through the driver API."""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from elastic.kernels import jit
from elastic.kernels.params import MAP_BYTES

_DTYPE = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_*
_SWIZZLE_128B, _L2_PROMOTION_256B = 3, 3
_BOX_COLUMNS = 64  # 128 bytes: the widest box under the 128-byte swizzle


@cache
def _encoder() -> Any:
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, u32, u64 = ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint64)
    encode.argtypes = [pointer, ctypes.c_int, ctypes.c_uint32, pointer, u64, u64, u32, u32, *[ctypes.c_int] * 4]
    encode.restype = ctypes.c_int
    return encode


def _encode(tensor: Tensor, first: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> bytes:
    """Map of `sizes` elements from element `first` on; `strides` in elements, of all dimensions but the innermost."""
    jit.bind_thread(tensor.device.index)
    storage = ctypes.create_string_buffer(MAP_BYTES + 64)
    aligned = (ctypes.addressof(storage) + 63) // 64 * 64  # the driver wants the map on a 64-byte boundary
    rank = len(sizes)
    code = _encoder()(
        aligned,
        _DTYPE[tensor.dtype],
        rank,
        tensor.data_ptr() + 2 * first,
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*(2 * s for s in strides)),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,  # not interleaved
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        0,  # zeros beyond the bounds
    )
    if code:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled refused shape {list(tensor.shape)}, element strides {list(tensor.stride())} at "
            f"{tensor.data_ptr():#x} (CUresult {code}); make the tensor contiguous"
        )
    return ctypes.string_at(aligned, MAP_BYTES)


def tensor_map(tensor: Tensor, strides: tuple[int, int, int], rows: int) -> bytes:
    """The 128 bytes of a map of [B, S, heads, D] with boxes of `rows` tokens by 64 columns.

    Raises:
        RuntimeError: the driver refused the layout.
    """
    batch, tokens, heads, dim = tensor.shape
    row, token, head = strides
    return _encode(tensor, 0, (dim, tokens, heads, batch), (token, head, row), (_BOX_COLUMNS, rows, 1, 1))


def phase_maps(tensor: Tensor, strides: tuple[int, int, int], stride: int, cells: int) -> tuple[bytes, bytes]:
    """Two maps of [B, S, heads, D] as (D, phase, cell, heads, B) with token = stride * cell + phase, boxes of one phase
    of `cells` cells. The first holds the phases from S % stride on, the second those before, which have one cell more.
    Where a map would be empty it describes some other tokens; what lies past a tensor's end is never used.

    Raises:
        RuntimeError: the driver refused the layout.
    """
    batch, tokens, heads, dim = tensor.shape
    row, token, head = strides
    tail, box = tokens % stride, (_BOX_COLUMNS, 1, cells, 1, 1)
    steps = (token, stride * token, head, row)
    whole = max(1, tokens // stride)
    first = tail if tokens >= stride else 0  # a tensor shorter than a cell has no whole one
    phases = stride - tail if tokens >= stride else 1
    main = _encode(tensor, first * token, (dim, phases, whole, heads, batch), steps, box)
    rest = _encode(tensor, 0, (dim, tail, tokens // stride + 1, heads, batch), steps, box) if tail else main
    return main, rest
