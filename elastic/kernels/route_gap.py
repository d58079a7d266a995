"""`route_gap`: <dO, O - O'> per sample and KV head, where O' is what the heads would have answered in another mode.

This is all that the route's own gradient needs of the mode that was not chosen: one more forward pass, without a
backward. Query rows are cut into slots, and of every `period` neighbouring slots one is drawn and counts `period`
times, so that the estimate is unbiased; share 1 takes every slot and is exact. Slots are drawn on the device from
torch's generator; the host never waits. Legend: B batch rows, N samples, T slots, S tokens, H query heads, K KV heads,
D head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elastic.kernels import jit, operators, params
from elastic.kernels.attention_backward import readable, rows_kernel
from elastic.kernels.attention_forward import attention_forward
from elastic.kernels.devices import ROWS_THREADS
from elastic.kernels.params import QUERY_BLOCK, WHOLE_ROWS, Pattern, Ranges

_TARGET_SLOTS = 256  # of one launch; more slots spread the sample finer, fewer cost less bookkeeping


def period_of(share: float) -> int:
    """Slots of which one is drawn.

    Raises:
        ValueError: a share that is not one over a whole number.
    """
    period = round(1 / share) if 0 < share <= 1 else 0
    if period < 1 or abs(share * period - 1) > 1e-3:
        raise ValueError(
            f"gradient_share={share} is not 1, 1/2, 1/3, ...; 1.0 gives the exact gradient of the routes, 0.125 a "
            "good estimate"
        )
    return period


def slot_table(
    ranges: Ranges, batch: int, seq_q: int, seq_k: int, samples: int, period: int, device: torch.device
) -> Tensor:
    """All slots, int32 [6, T, period]: begin_q, end_q, begin_k, end_k, row and sample of each; slots beyond the last
    are empty. The layers of a forward pass share it.

    The queries of a slot keep their positions: its keys are the sample's first ones, up to its last query.
    """

    def given(values: Tensor | None, default: int) -> Tensor:
        return torch.full((samples,), default, device=device) if values is None else values.long()

    begin_q, begin_k = given(ranges.begin_q, 0), given(ranges.begin_k, 0)
    end_q, end_k = given(ranges.end_q, seq_q), given(ranges.end_k, seq_k)
    row = torch.arange(samples, device=device) if ranges.row is None else ranges.row.long()
    size = _slot_size(batch, seq_q, period)
    bound = batch * -(-seq_q // size) + (samples if ranges.partial else 0)
    strata = -(-bound // period)
    slots_N = (end_q - begin_q).clamp(min=0).add(size - 1) // size
    last_N = slots_N.cumsum(0)
    slot = torch.arange(strata * period, device=device)
    owner = torch.searchsorted(last_N, slot, right=True)
    used, owner = owner < samples, owner.clamp(max=samples - 1)
    first = begin_q[owner] + (slot - (last_N - slots_N)[owner]) * size
    last = torch.minimum(first + size, end_q[owner])
    places = torch.stack([first, last, begin_k[owner], end_k[owner] - end_q[owner] + last, row[owner]])
    return torch.cat([torch.where(used, places, 0), owner[None]]).int().view(6, strata, period)


def _slot_size(batch: int, seq_q: int, period: int) -> int:
    """Query rows of a slot, whole query blocks."""
    return QUERY_BLOCK * max(1, -(-batch * seq_q // (QUERY_BLOCK * _TARGET_SLOTS * period)))


def draw_slots(table: Tensor) -> tuple[Ranges, Tensor]:
    """One slot of every stratum of a `slot_table`, as samples of their own, and the sample [T] each belongs to."""
    _, strata, period = table.shape
    if period == 1:
        drawn = table[:, :, 0]
    else:
        pick = torch.arange(0, strata * period, period, device=table.device)
        drawn = table.flatten(1).index_select(1, pick + torch.randint(period, (strata,), device=table.device))
    return Ranges(*drawn[:5]), drawn[5]


def route_gap(
    grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, other_mode: Tensor, pattern: Pattern,
    ranges: Ranges = WHOLE_ROWS, bits: Tensor | None = None, *, share: float = 1.0, table: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum over the sample's queries, the group's heads and D of grad_out (out - other), fp32 [N, K].

    Args:
        grad_out, out: [B, Sq, H, D], gradient of the output and the output.
        other_mode: int32 [N, K]: what to compare with.
        q, k, v, pattern, ranges, bits, sinks: as for `attention_forward`.
        share: share of the queries that are looked at, one over a whole number.
        table: `slot_table` of these samples and this share, where the caller has it already.

    Raises:
        ValueError: a share that is not one over a whole number.
    """
    period, samples = period_of(share), other_mode.shape[0]
    if table is None:
        table = slot_table(ranges, q.shape[0], q.shape[1], k.shape[1], samples, period, q.device)
    slots, owner = draw_slots(table)
    modes = other_mode.index_select(0, owner)
    if bits is not None:
        assert slots.begin_q is not None
        begin_q = ranges.begin_q
        first = slots.begin_q if begin_q is None else slots.begin_q - begin_q.index_select(0, owner)
        bits = _bits_of_slots(bits, owner, first, _slot_size(q.shape[0], q.shape[1], period))
    other, _ = attention_forward(q, k, v, modes, pattern, slots, bits, sinks)
    plain = operators.is_plain_cuda(q)
    slot_gap: Callable[..., Tensor] = _slot_gap_cuda if plain else torch.ops.elastic.slot_gap
    gap_TK = slot_gap(grad_out, out, other, modes, slots.begin_q, slots.end_q, slots.row)
    owns_NT = owner == torch.arange(samples, device=q.device)[:, None]
    return owns_NT.to(gap_TK.dtype) @ gap_TK * period


def _bits_of_slots(bits: Tensor, owner: Tensor, first_T: Tensor, size: int) -> Tensor:
    """Block bits [T, H, size / 128, W] of slots that begin `first_T` queries into their samples."""
    block = first_T[:, None] // QUERY_BLOCK + torch.arange(size // QUERY_BLOCK, device=bits.device)
    block = block.clamp(0, bits.shape[2] - 1)  # beyond a slot's last query nothing is read
    return bits[owner[:, None, None], torch.arange(bits.shape[1], device=bits.device)[:, None], block[:, None]]


def _slot_gap_cuda(
    grad_out: Tensor, out: Tensor, other: Tensor, mode: Tensor, begin: Tensor, end: Tensor, row: Tensor
) -> Tensor:
    gap = torch.empty(mode.shape, dtype=torch.float32, device=out.device)
    grad_out = readable(grad_out)
    keys = grad_out[:, :, : mode.shape[1]]  # the kernel takes the number of KV heads from here and reads no keys
    ranges, pattern = Ranges(begin, end, None, None, row), Pattern.without_streaming(scale=1.0)
    packed = (
        bytes(4 * params.MAP_BYTES)
        + params.pack_pointers(grad_out, keys, keys, out, gap, mode, None, ranges, mode)
        + params.pack_sizes(grad_out, keys, keys, grad_out, mode, None, pattern)
        + params.pack_addresses(grad_out.data_ptr(), 0, gap.data_ptr(), 0, other.data_ptr(), 0, 0)
        + params.pack_strides((out, other, out, out), 0)
    )
    kernel = rows_kernel("attention_route_gap", out)
    jit.launch(kernel, (mode.shape[0], mode.shape[1]), ROWS_THREADS, packed, 0, out.device.index)
    return gap


def _slot_gap_cpu(
    grad_out: Tensor, out: Tensor, other: Tensor, mode: Tensor, begin: Tensor, end: Tensor, row: Tensor
) -> Tensor:
    dots_BSH = (grad_out.float() * (out.float() - other.float())).sum(-1)
    dots_BSK = torch.unflatten(dots_BSH, 2, (mode.shape[1], -1)).sum(-1)
    spans = zip(row.tolist(), begin.tolist(), end.tolist(), strict=True)
    return torch.stack([dots_BSK[r, b:e].sum(0) for r, b, e in spans])


def _slot_gap_fake(_grad_out: Tensor, _out: Tensor, _other: Tensor, mode: Tensor, *_: Any) -> Tensor:
    return torch.empty(mode.shape, dtype=torch.float32, device=mode.device)


operators.define(
    "slot_gap(Tensor grad_out, Tensor out, Tensor other, Tensor mode, Tensor begin, Tensor end, Tensor row) -> Tensor",
    cuda=_slot_gap_cuda,
    cpu=_slot_gap_cpu,
    fake=_slot_gap_fake,
)
