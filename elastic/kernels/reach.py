"""`reach`: per KV head, the share of attention that a prompt's last queries put outside what a streaming head sees.

A signal that needs no training, for routers: large where the answer lies in the hidden middle of the prompt. The
operator is `torch.ops.elastic.reach`: a CUDA kernel on a GPU, the oracle on the CPU. Sample ranges are read on the
device; the host never waits. Legend: B batch rows, N samples, S tokens, H query heads, K KV heads, G = H / K, D head
dim.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from elastic.kernels import jit, operators
from elastic.kernels.attention_decode import arrivals
from elastic.kernels.attention_forward import PreparedLaunch, launch_key
from elastic.kernels.checks import check_alignment, check_cuda, check_pattern, check_ranges, check_tensors
from elastic.kernels.devices import (
    MAX_HEADS,
    REACH_PART,
    LaunchConfig,
    capability_of,
    processors_of,
    reach_config,
    shared_limit,
)
from elastic.kernels.params import (
    MAP_BYTES,
    REACH_QUERIES,
    REACH_TILE,
    WHOLE_ROWS,
    Pattern,
    Ranges,
    pack_answers,
    pack_pointers,
    pack_sizes,
    strides_of,
)
from elastic.kernels.reach_oracle import reach_oracle
from elastic.kernels.tensor_map import tensor_map

_PLANS: dict[tuple[Any, ...], PreparedLaunch] = {}
_MAX_PLANS, _MAX_MAPS = 1024, 256


class Reach(NamedTuple):
    """How far the last queries of every sample look back, by KV head. Legend: N samples, K KV heads.

    Attributes:
        largest: fp32 [N, K] in [0, 1]; over the last 32 queries the largest share of attention that lies outside sink
            and window, mean over the group's query heads.
        recent: fp32 [N, K] in [0, 1]; that share's mean over the last 8 of these queries and the group's query heads.
    """

    largest: Tensor
    recent: Tensor


def reach(q: Tensor, k: Tensor, pattern: Pattern, ranges: Ranges = WHOLE_ROWS) -> Reach:
    """Reach of every sample and KV head. For the query at position a of query head h, with p = softmax(scale q k^T)
    over the sample's keys j <= a,
        outside[h, a] = sum of p[j] over the keys j that `elastic.visibility` does not show to position a;
        largest = mean over h of max over a of outside, recent = mean over h and the last 8 a of outside,
    where a runs over the sample's last 32 queries, or all it has. Exactly 0 where the sample is no longer than sink +
    window, or has no query here. A constant for autograd.

    Args:
        q: [B, Sq, H, D] after RoPE; on a GPU bf16 or fp16, D 64 or 128, any strides that are multiples of 16 bytes, D
            contiguous, H / K at most 8 (`unsupported_reach` says why not).
        k: [B, Sk, K, D] likewise, cached keys included; query head h reads KV head h // (H / K).
        pattern: sizes of the streaming heads, and the softmax scale.
        ranges: where the samples lie; by default every row is one. The queries of a sample are its last positions:
            to leave the end of a sample out, end both its queries and its keys there.

    Raises:
        ValueError: arguments that do not fit, with the way out.
    """
    with torch.no_grad():
        if operators.is_plain_cuda(q):
            return Reach(*_reach_cuda(q, k, pattern, ranges))
        return Reach(*torch.ops.elastic.reach(q, k, *operators.flatten(pattern, ranges, q.shape[-1])))


def samples_of(q: Tensor, ranges: Ranges) -> int:
    """N: as many as there are batch rows where `ranges` name none."""
    return q.shape[0] if ranges.row is None else ranges.row.shape[0]


def config_for(q: Tensor, k: Tensor, samples: int) -> LaunchConfig:
    """Launch choices for such tensors on their GPU."""
    index, (_, keys, kv_heads, dim) = q.device.index, k.shape
    group, tiles = q.shape[2] // kv_heads, samples * kv_heads * -(-keys // REACH_TILE)
    return reach_config(
        capability_of(index), processors_of(index), shared_limit(index), dim, group, samples * kv_heads, tiles
    )


def prepare_reach(
    q: Tensor, k: Tensor, largest: Tensor, pattern: Pattern, config: LaunchConfig | None = None,
    debug: tuple[str, ...] = (),
) -> PreparedLaunch:  # fmt: skip
    """Choose and load the kernel, and pack everything but the addresses. `config` and `debug` serve the tests."""
    config = config or config_for(q, k, largest.shape[0])
    macros = (*config.macros, *debug)
    variant = jit.Variant(config.name, config.arch, q.shape[3], q.dtype == torch.bfloat16, macros)
    sizes = pack_sizes(q, k, k, q, largest, None, pattern)
    return PreparedLaunch(config, jit.load_kernel(variant, q.device.index), sizes, (strides_of(q), strides_of(k)))


def _encode_maps(q: Tensor, k: Tensor, plan: PreparedLaunch) -> bytes:
    if plan.config.arch != "sm_90a":
        return bytes(4 * MAP_BYTES)  # that kernel reads by address
    boxes = zip((q, k), plan.strides, (REACH_QUERIES, REACH_TILE), strict=True)
    return b"".join(tensor_map(x, strides, rows) for x, strides, rows in boxes) + bytes(2 * MAP_BYTES)


def launch_reach(
    largest: Tensor, recent: Tensor, parts: Tensor, q: Tensor, k: Tensor, ranges: Ranges, plan: PreparedLaunch
) -> None:
    """Run the kernel on checked CUDA tensors, into tensors the caller owns; `parts` is fp32 of `parts_size`."""
    index, addresses = q.device.index, (q.data_ptr(), k.data_ptr())
    maps = plan.maps.get(addresses)
    if maps is None:
        if len(plan.maps) >= _MAX_MAPS:
            plan.maps.clear()
        maps = plan.maps[addresses] = _encode_maps(q, k, plan)
    arrived = arrivals(q.device, jit.current_stream(index), jit.capture_id(index))
    pointers = pack_pointers(q, k, k, q, parts, largest, None, ranges, arrived)
    params = maps + pointers + plan.sizes + pack_answers(largest, recent)
    jit.launch(plan.kernel, (plan.config.grid,), plan.config.threads, params, plan.config.shared_bytes, index)


def parts_size(grid: int, group: int) -> int:
    """Floats in which the CTAs leave the sums of rows that others finish, of two heads each."""
    return 2 * grid * group * REACH_QUERIES * REACH_PART // 4


def _reach_cuda(q: Tensor, k: Tensor, pattern: Pattern, ranges: Ranges) -> tuple[Tensor, Tensor]:
    key = launch_key(pattern, q, k, *ranges)
    plan = _PLANS.get(key)
    if plan is None:
        check_reach(q, k, pattern, ranges)
        check_reach_cuda(q, k, samples_of(q, ranges))
    shape = (samples_of(q, ranges), k.shape[2])
    if shape[0] == 0 or q.shape[1] == 0 or k.shape[1] == 0:
        return q.new_zeros(shape, dtype=torch.float32), q.new_zeros(shape, dtype=torch.float32)
    largest, recent = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    if plan is None:
        if len(_PLANS) >= _MAX_PLANS:
            _PLANS.clear()
        plan = _PLANS[key] = prepare_reach(q, k, largest, pattern)
    check_alignment(q, k, k)
    size = parts_size(plan.config.grid, q.shape[2] // k.shape[2])
    parts = torch.empty(size, dtype=torch.float32, device=q.device)
    launch_reach(largest, recent, parts, q, k, ranges, plan)
    return largest, recent


def check_reach(q: Tensor, k: Tensor, pattern: Pattern, ranges: Ranges) -> None:
    """What every implementation needs of its arguments; reads shapes and types only."""
    check_tensors(q, k, k)
    check_pattern(pattern, None)
    check_ranges(q, k, samples_of(q, ranges), ranges)


def check_reach_cuda(q: Tensor, k: Tensor, samples: int) -> None:
    """What the kernels need beyond the operator's contract."""
    check_cuda(q, k, k)
    config_for(q, k, samples)  # refuses groups that are too large
    if samples * k.shape[2] > MAX_HEADS:
        raise ValueError(
            f"{samples} samples of {k.shape[2]} KV heads; one launch takes at most {MAX_HEADS} KV heads of all "
            "samples, split the batch"
        )


def _reach_cpu(q: Tensor, k: Tensor, pattern: Pattern, ranges: Ranges) -> tuple[Tensor, Tensor]:
    check_reach(q, k, pattern, ranges)
    largest, recent = reach_oracle(q, k, pattern, ranges)
    return largest.float(), recent.float()


def _reach_fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (samples_of(q, Ranges(*rest[-len(Ranges._fields) :])), k.shape[2])
    return tuple(torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))  # type: ignore[return-value]


operators.define(
    f"reach(Tensor q, Tensor k, {operators.PATTERN}, {operators.RANGES}) -> (Tensor, Tensor)",
    cuda=operators.unflattened(_reach_cuda, 2),
    cpu=operators.unflattened(_reach_cpu, 2),
    fake=_reach_fake,
)
