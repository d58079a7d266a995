"""Keys and values in an engine's pages: what the paged operators check of them, shapes and types but no device memory.

Legend: N pages of T tokens, K KV heads, D head dim, B requests, P entries of a request's row, S queries, H query heads.
"""

import torch
from torch import Tensor

from elastic.kernels.checks import HEAD_DIMS, MAX_KEYS, MAX_KV_HEADS, check_pattern
from elastic.kernels.params import HALF_BLOCK, Pattern, is_half, strides_of

LEAST_PAGE = 16  # tokens of a page that the kernels take at least
_REACH = 1 << 35  # elements: the decode kernel counts 16-byte steps in 32 bits


def check_paged(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, mode: Tensor, pattern: Pattern
) -> None:
    """What both paged operators ask for; their queries differ, [S, H, D] here and there."""
    if q.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape or keys.shape[3] != q.shape[2]:
        raise ValueError(
            f"q {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)} do not belong together; expected "
            "q [S, H, D] and two pools [N, T, K, D] of one shape (views of one cache, with any strides: "
            "cache.unbind(0) of [2, N, T, K, D], cache.unbind(1) of [N, 2, T, K, D])"
        )
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"q, keys, values have dtypes {q.dtype}, {keys.dtype}, {values.dtype}; expected one dtype for all three"
        )
    kv_heads = keys.shape[2]
    if kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of the pools' {kv_heads} KV heads")
    if table.dtype != torch.int32 or table.dim() != 2 or (table.shape[1] > 1 and table.stride(1) != 1):
        raise ValueError(
            f"table is {table.dtype} {list(table.shape)} with strides {list(table.stride())}; expected torch.int32 "
            "[B, P] whose rows are contiguous, a row of page numbers for every request"
        )
    requests = table.shape[0]
    for name, tensor, shape in (("lengths", lengths, (requests,)), ("mode", mode, (requests, kv_heads))):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, expected contiguous torch.int32 {list(shape)}"
            )
    _check_devices(q=q, keys=keys, values=values, table=table, lengths=lengths, mode=mode)
    check_pattern(pattern, None)


def _check_devices(**tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors.values()}) > 1:
        listed = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"the arguments lie apart ({listed}); expected one device for all")


def check_paged_cuda(q: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> None:
    """What the kernels need beyond the operators' contract, but for the alignment of addresses."""
    size = keys.shape[1]
    if not is_half(q.dtype) or q.shape[2] not in HEAD_DIMS:
        raise ValueError(
            f"q is {q.dtype} with head dim {q.shape[2]}; the paged kernels take torch.bfloat16 or torch.float16 and "
            "head dim 64 or 128; run other shapes through PyTorch's attention"
        )
    if size < LEAST_PAGE or size & (size - 1):
        raise ValueError(
            f"pages of {size} tokens; the paged kernels take powers of two from {LEAST_PAGE} on (vLLM: --block-size 16)"
        )
    if table.shape[1] * size > MAX_KEYS - HALF_BLOCK or keys.shape[2] > MAX_KV_HEADS:
        raise ValueError(
            f"rows of {table.shape[1]} pages of {size} tokens, {keys.shape[2]} KV heads; the paged kernels take at "
            f"most {MAX_KEYS - HALF_BLOCK} tokens and {MAX_KV_HEADS} KV heads; cut the table to the longest request"
        )
    if q.stride(2) != 1 or q.stride(1) % 8 or q.stride(0) % 8:
        raise ValueError(
            f"q has strides {list(q.stride())}; expected a contiguous head dim and other strides that are multiples of "
            "8 elements; use q.contiguous()"
        )
    for name, pool in (("keys", keys), ("values", values)):
        strides = strides_of(pool)
        if pool.stride(3) != 1 or any(s % 8 or s < 0 for s in strides) or strides != strides_of(keys):
            raise ValueError(
                f"{name} have strides {list(pool.stride())}; expected a contiguous head dim and other strides that are "
                f"multiples of 8 elements, the same for keys ({list(keys.stride())}) and values; take both as views of "
                "one cache"
            )
        if sum(s * n for s, n in zip(strides, pool.shape[:3], strict=True)) > _REACH:
            raise ValueError(
                f"{name} {list(pool.shape)} with strides {list(pool.stride())} span over {_REACH} elements; the decode "
                "kernel reaches no further: pass the layer's own cache, not that of all layers"
            )
