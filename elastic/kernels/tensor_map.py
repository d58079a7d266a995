"""TMA tensor maps of strided [B, S, heads, D] tensors, through the driver API."""

import ctypes
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


def tensor_map(tensor: Tensor, strides: tuple[int, int, int], rows: int) -> bytes:
    """The 128 bytes of a map of [B, S, heads, D] with boxes of `rows` tokens by 64 columns.

    Raises:
        RuntimeError: the driver refused the layout.
    """
    jit.bind_thread(tensor.device.index)
    batch, tokens, heads, dim = tensor.shape
    row, token, head = strides
    storage = ctypes.create_string_buffer(MAP_BYTES + 64)
    aligned = (ctypes.addressof(storage) + 63) // 64 * 64  # the driver wants the map on a 64-byte boundary
    code = _encoder()(
        aligned,
        _DTYPE[tensor.dtype],
        4,
        tensor.data_ptr(),
        (ctypes.c_uint64 * 4)(dim, tokens, heads, batch),
        (ctypes.c_uint64 * 3)(2 * token, 2 * head, 2 * row),
        (ctypes.c_uint32 * 4)(_BOX_COLUMNS, rows, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        0,  # not interleaved
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        0,  # zeros beyond the bounds
    )
    if code:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled refused shape {list(tensor.shape)}, element strides {list(strides)} at "
            f"{tensor.data_ptr():#x} (CUresult {code}); make the tensor contiguous"
        )
    return ctypes.string_at(aligned, MAP_BYTES)
