"""`paged_decode`: one query token per request against keys and values in an engine's pages, each KV head in its mode.

The operator is `torch.ops.elastic.paged_decode`: on a GPU the decode kernel with another way to find a token's row, on
the CPU the oracle. Table, lengths and modes are read on the device; the host never waits, and a captured graph may be
replayed after they have changed. Legend: B requests, H query heads, K KV heads, D head dim, N pages of T tokens, P
entries of a request's row.
"""

import math
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from elastic.kernels import jit, operators
from elastic.kernels.attention_decode import PARAMS, arrivals, decode_launch
from elastic.kernels.attention_forward import launch_key
from elastic.kernels.checks import check_alignment
from elastic.kernels.devices import MAX_GROUP, MAX_HEADS, DecodeConfig
from elastic.kernels.paged_oracle import paged_oracle
from elastic.kernels.pages import check_paged, check_paged_cuda
from elastic.kernels.params import Pattern, pack_pages, strides_of

_PARAMS = struct.Struct(f"<{PARAMS.size + 16}s2Q3I5i")


def paged_decode(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, mode: Tensor, pattern: Pattern
) -> Tensor:
    """Attention of the newest token of each request to its cached tokens, itself among them. Not differentiable.

    Token t of request b is place t mod T of page table[b, t // T]. A full head sees all lengths[b] tokens, a streaming
    one its sink and the window that ends with the newest; pages of which it sees no token are not read for it.

    Args:
        q: [B, H, D]; on a GPU bf16 or fp16, D 64 or 128, H / K at most 16. Query head h reads KV head h // (H / K).
        keys, values: pools [N, T, K, D] of the same strides, D contiguous; on a GPU T is a power of two from 16 on.
        table: int32 [B, P], rows contiguous. Entries past a request's length may hold anything.
        lengths: int32 [B], tokens with the newest; a request of length 0 (a graph's padding) answers 0.
        mode: int32 [B, K]: 0 full, 1 streaming. A head of another mode answers NaN.
        pattern: sizes of the streaming heads, softmax scale.

    Returns:
        [B, H, D] contiguous, in q's dtype.

    Raises:
        ValueError: arguments that do not fit, with the way out. Page numbers outside the pools are looked for on the
            CPU only; on a GPU they are the caller's to avoid.
    """
    flat = (*pattern[:-1], pattern.scale_for(q.shape[-1]))
    plain = operators.is_plain_cuda(q)
    run: Callable[..., Tensor] = _decode_cuda if plain else torch.ops.elastic.paged_decode
    return run(q, keys, values, table, lengths, mode, *flat)


def _check(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, mode: Tensor, pattern: Pattern
) -> None:
    check_paged(q, keys, values, table, lengths, mode, pattern)
    if q.shape[0] != table.shape[0]:
        raise ValueError(
            f"q {list(q.shape)} and a table of {table.shape[0]} requests; expected one query for each: use "
            "paged_forward where requests have several"
        )


@cache
def _kernel(config: DecodeConfig, head_dim: int, bf16: bool, index: int) -> Any:
    macros = (f"ELASTIC_WARPS={config.warps}", f"ELASTIC_STAGES={config.stages}", "ELASTIC_PAGED=1")
    return jit.load_kernel(jit.Variant("attention_decode", config.arch, head_dim, bf16, macros), index)


def launch_paged_decode(
    out: Tensor, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, mode: Tensor,
    pattern: Pattern, config: DecodeConfig,
) -> None:  # fmt: skip
    """Run the kernel on checked CUDA tensors, into a tensor the caller owns."""
    (requests, heads, dim), kv_heads, index = q.shape, keys.shape[2], q.device.index
    partial = torch.empty(2 * config.grid * (heads // kv_heads) * (dim + 2), dtype=torch.float32, device=q.device)
    arrived = arrivals(q.device, jit.current_stream(index), jit.capture_id(index))
    given = (q, keys, values, out, None, None, None, None, partial, arrived, None)  # neither base and spans nor sinks
    addresses = (0 if x is None else x.data_ptr() for x in given)
    sizes = (q.stride(0), q.stride(1), 0, requests, heads, kv_heads)
    shared = PARAMS.pack(*addresses, *sizes, pattern.scale_for(dim) * math.log2(math.e))
    page, place, head = (stride // 8 for stride in strides_of(keys))
    params = _PARAMS.pack(
        shared + pack_pages(table, keys.shape[1]),
        *(lengths.data_ptr(), mode.data_ptr(), page, place, head, table.shape[1] * keys.shape[1]),
        *(pattern.sink, min(pattern.window, 1 << 30), int(pattern.granule == "block"), pattern.block),
    )
    kernel = _kernel(config, dim, q.dtype == torch.bfloat16, index)
    jit.launch(kernel, (config.grid,), 32 * config.warps, params, config.shared_bytes, index)


def _check_cuda(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, mode: Tensor) -> None:
    check_paged_cuda(q, keys, values, table)
    if q.shape[1] // keys.shape[2] > MAX_GROUP or mode.numel() > MAX_HEADS:
        raise ValueError(
            f"q is {list(q.shape)} for {mode.numel()} KV heads of all requests; the decode kernel takes at most "
            f"{MAX_GROUP} query heads per KV head and {MAX_HEADS} KV heads; split the batch"
        )


_CHECKED: set[tuple[Any, ...]] = set()  # calls that differ in addresses and values alone are checked once
_MOST = 4096


def _decode_cuda(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, mode: Tensor, *flat: Any
) -> Tensor:
    pattern = Pattern(*flat)
    key = launch_key(pattern, q, keys, values, table, lengths, mode)
    if key not in _CHECKED:
        _check(q, keys, values, table, lengths, mode, pattern)
        _check_cuda(q, keys, values, table, mode)
        if len(_CHECKED) >= _MOST:
            _CHECKED.clear()
        _CHECKED.add(key)
    check_alignment(q, keys, values)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() and keys.shape[0] and table.shape[1]:
        config = decode_launch(q.device.index, q.shape[2], q.shape[1] // keys.shape[2], mode.numel())
        launch_paged_decode(out, q, keys, values, table, lengths, mode, pattern, config)
        return out
    return out.zero_()


def _decode_cpu(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, mode: Tensor, *flat: Any
) -> Tensor:
    pattern = Pattern(*flat)
    _check(q, keys, values, table, lengths, mode, pattern)
    return paged_decode_oracle(q, keys, values, table, lengths, mode, pattern)


def paged_decode_oracle(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, mode: Tensor, pattern: Pattern,
    compute: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The readable twin: `paged_oracle` with one query for each request."""
    starts = torch.arange(q.shape[0] + 1)
    return paged_oracle(q, keys, values, table, starts, lengths, mode, pattern, compute)[0]


def _decode_fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


operators.define(
    "paged_decode(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor lengths, Tensor mode, "
    f"{operators.PATTERN}) -> Tensor",
    cuda=_decode_cuda,
    cpu=_decode_cpu,
    fake=_decode_fake,
)
