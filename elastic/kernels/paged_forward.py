"""`paged_forward`: attention of requests' new tokens to keys and values in an engine's pages, each KV head in its mode.

A request's new tokens are its last ones: a whole prompt, what follows a shared prefix, or a later chunk. The operator
is `torch.ops.elastic.paged_forward`: on a GPU the kernels of `attention_forward` with another loader, on the CPU the
oracle. Table, lengths and modes are read on the device; the host never waits. Legend: B requests, S new tokens of all,
H query heads, K KV heads, D head dim, N pages of T tokens, P entries of a request's row.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from elastic.kernels import jit, operators
from elastic.kernels.attention_forward import PreparedLaunch, launch_key, tile_counter
from elastic.kernels.checks import MAX_SAMPLES, check_alignment
from elastic.kernels.devices import LaunchConfig, capability_of, launch_config, processors_of
from elastic.kernels.paged_oracle import paged_oracle
from elastic.kernels.pages import check_paged, check_paged_cuda
from elastic.kernels.params import (
    HALF_BLOCK,
    MAP_BYTES,
    PAGED_BYTES,
    QUERY_BLOCK,
    WARP_ROWS,
    Pattern,
    Ranges,
    pack_pages,
    pack_pointers,
    pack_sizes,
    strides_of,
)
from elastic.kernels.tensor_map import tensor_map


def paged_forward(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, mode: Tensor,
    pattern: Pattern,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal attention of each request's newest tokens, all heads in one launch. Not differentiable.

    Token t of request b is place t mod T of page table[b, t // T]. The request's queries are rows starts[b] to
    starts[b + 1] of q and the last ones of its lengths[b] tokens; their own keys and values lie in the pages already.

    Args:
        q: [S, H, D]; on a GPU bf16 or fp16, D 64 or 128. Query head h reads KV head h // (H / K).
        keys, values: pools [N, T, K, D] of the same strides, D contiguous; on a GPU T is a power of two from 16 on.
        table: int32 [B, P], rows contiguous. Entries past a request's length may hold anything.
        starts: int32 [B + 1], from 0 to S (vLLM's query_start_loc).
        lengths: int32 [B], tokens with the new ones.
        mode: int32 [B, K]: 0 full, 1 streaming. A head of another mode answers NaN.
        pattern: sizes of the streaming heads, softmax scale.

    Returns:
        out [S, H, D] contiguous, in q's dtype; lse [H, S] fp32, the natural logarithm of the softmax denominator.

    Raises:
        ValueError: arguments that do not fit, with the way out. Page numbers outside the pools and rows of q that no
            request has are looked for on the CPU only; on a GPU such rows hold anything: cut them off.
    """
    if operators.is_plain_cuda(q):
        return _forward_cuda(q, keys, values, table, starts, lengths, mode, *pattern)
    flat = (*pattern[:-1], pattern.scale_for(q.shape[-1]))
    out, lse = torch.ops.elastic.paged_forward(q, keys, values, table, starts, lengths, mode, *flat)
    return out, lse


def _check(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, mode: Tensor,
    pattern: Pattern,
) -> None:  # fmt: skip
    check_paged(q, keys, values, table, lengths, mode, pattern)
    wanted = (table.shape[0] + 1,)
    if starts.dtype != torch.int32 or tuple(starts.shape) != wanted or not starts.is_contiguous():
        raise ValueError(
            f"starts is {starts.dtype} {list(starts.shape)}, expected contiguous torch.int32 {list(wanted)}: where "
            "each request's queries begin, and their number"
        )
    if starts.device != q.device:
        raise ValueError(f"starts lies on {starts.device} and q on {q.device}; expected one device")


def box_tokens(size: int) -> int:
    """Tokens of a TMA box over pages of `size`: whole pages, or the half block that fits a page."""
    return min(size, HALF_BLOCK)


def paged_config(
    capability: tuple[int, int], processors: int, head_dim: int, samples: int, tiles: int, size: int
) -> LaunchConfig:
    """Launch choices of `launch_config`, for pages of `size` tokens."""
    config = launch_config(capability, processors, head_dim, samples, tiles)
    return replace(config, macros=(f"ELASTIC_PAGED={box_tokens(size) if config.arch == 'sm_90a' else 1}",))


def prepare_paged(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, table: Tensor, mode: Tensor, pattern: Pattern,
    config: LaunchConfig | None = None, debug: tuple[str, ...] = (),
) -> PreparedLaunch:  # fmt: skip
    """Choose and load the kernel, and pack everything but the addresses. `config` and `debug` serve the tests."""
    requests, index, dim = mode.shape[0], q.device.index, q.shape[2]
    if config is None:
        tiles = (-(-q.shape[0] // QUERY_BLOCK) + requests) * q.shape[1]
        config = paged_config(capability_of(index), processors_of(index), dim, requests, tiles, keys.shape[1])
    variant = jit.Variant(config.name, config.arch, dim, q.dtype == torch.bfloat16, (*config.macros, *debug))
    rows, capacity = (q[None], keys, values, out[None]), table.shape[1] * keys.shape[1]
    sizes = pack_sizes(*rows, mode, None, pattern, capacity)
    return PreparedLaunch(config, jit.load_kernel(variant, index), sizes, tuple(strides_of(x) for x in rows))


def _encode_maps(rows: tuple[Tensor, ...], plan: PreparedLaunch) -> bytes:
    if plan.config.arch != "sm_90a":
        return bytes(4 * MAP_BYTES)  # that kernel reads by address
    box = box_tokens(rows[1].shape[1])
    boxes = (QUERY_BLOCK, box, box, WARP_ROWS)
    return b"".join(tensor_map(x, s, tokens) for x, s, tokens in zip(rows, plan.strides, boxes, strict=True))


@cache
def _zeros(device: torch.device) -> Tensor:
    return torch.zeros(MAX_SAMPLES, dtype=torch.int32, device=device)


def _first_rows(device: torch.device) -> Tensor:
    """The batch row of every request: all queries are one row. A captured graph gets its own, as of `tile_counter`."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(MAX_SAMPLES, dtype=torch.int32, device=device)
    return _zeros(device)


def launch_paged(
    out: Tensor, lse: Tensor, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, starts: Tensor, lengths: Tensor,
    mode: Tensor, plan: PreparedLaunch,
) -> None:  # fmt: skip
    """Run the kernel on checked CUDA tensors, into tensors the caller owns."""
    config, rows = plan.config, (q[None], keys, values, out[None])
    addresses = tuple(x.data_ptr() for x in rows)
    maps = plan.maps.get(addresses)
    if maps is None:
        if len(plan.maps) >= _MAX_MAPS:
            plan.maps.clear()
        maps = plan.maps[addresses] = _encode_maps(rows, plan)
    rows_of_q = _first_rows(q.device)
    ranges = Ranges(starts[:-1], starts[1:], None, lengths, rows_of_q)
    pointers = pack_pointers(q, keys, values, out, lse, mode, None, ranges, tile_counter(q.device))
    params = maps + pointers + plan.sizes + pack_pages(table, keys.shape[1])
    params = params.ljust(PAGED_BYTES, b"\0")
    jit.launch(plan.kernel, (config.grid,), config.threads, params, config.shared_bytes, q.device.index)


_PLANS: dict[tuple[Any, ...], PreparedLaunch] = {}
_MAX_PLANS, _MAX_MAPS = 1024, 256


def _forward_cuda(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, mode: Tensor,
    *flat: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pattern = Pattern(*flat)
    key = launch_key(pattern, q, keys, values, table, starts, lengths, mode)
    plan = _PLANS.get(key)
    if plan is None:
        _check(q, keys, values, table, starts, lengths, mode, pattern)
        if table.shape[0] > MAX_SAMPLES:
            raise ValueError(
                f"{table.shape[0]} requests; the CUDA kernels take at most {MAX_SAMPLES} a launch: split the batch"
            )
        check_paged_cuda(q, keys, values, table)
    check_alignment(q, keys, values)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or keys.shape[0] == 0 or table.shape[1] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if plan is None:
        if len(_PLANS) >= _MAX_PLANS:
            _PLANS.clear()
        plan = _PLANS[key] = prepare_paged(q, keys, values, out, table, mode, pattern)
    launch_paged(out, lse, q, keys, values, table, starts, lengths, mode, plan)
    return out, lse


def _forward_cpu(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, mode: Tensor,
    *flat: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pattern = Pattern(*flat)
    _check(q, keys, values, table, starts, lengths, mode, pattern)
    out, lse = paged_oracle(q, keys, values, table, starts, lengths, mode, pattern)
    return out, lse.float()


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


operators.define(
    "paged_forward(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor starts, Tensor lengths, Tensor mode, "
    f"{operators.PATTERN}) -> (Tensor, Tensor)",
    cuda=_forward_cuda,
    cpu=_forward_cpu,
    fake=_forward_fake,
)
