"""Rows too long for one GPU: every process of a group holds a slice of the row, attention exchanges heads.

Everything but attention works on a slice of the tokens. In attention, queries, keys and values are exchanged so that
each process has its share of the KV heads over the whole row, runs `routed_attention` on them, and exchanges back: two
all-to-all messages a layer. Heads are dealt out by what they cost in their routed modes, so that no process waits for
one with all the full heads. Routing adds two sums of pooled keys, a loss one sum over the slices. All processes draw
the same routes and compute the same loss; the mean of their gradients is the gradient of one process.
Legend: C processes, s = S / C tokens here (rounded up: the last slices end in tokens of no sample), H query heads, K KV
heads, G = H / K, D head dim, N samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from elastic.attention.head_plan import HeadPlan
from elastic.attention.modes import FULL, STREAMING
from elastic.attention.routed import Routed, routed_attention
from elastic.attention.row_slice import RowSlice
from elastic.data.packing import Batch
from elastic.model.attach import routers, set_row_slice
from elastic.model.layer_hooks import whole_rows_needed
from elastic.protocols import CausalLM

_UNKNOWN = 0.5  # cost of an XAttention head, as a share of a full one


class Deal(NamedTuple):
    """Which heads each process runs.

    Attributes:
        kv_K: KV heads in the order of the processes, K / C each.
        query_H: their query heads in the same order.
        back_H: place of every query head in that order.
    """

    kv_K: Tensor
    query_H: Tensor
    back_H: Tensor


def deal(plan: HeadPlan, size: int, group: int) -> Deal:
    """Equally many KV heads for each of `size` processes, dealt out from the most to the least expensive and back
    (a snake), on the device without synchronising.

    Args:
        group: query heads of a KV head.
    """
    mode_NK, layout = plan.mode_NK, plan.layout
    pairs_N1 = (layout.end_N - layout.begin_N).float().square()[:, None]
    share_NK = torch.where(mode_NK == FULL, 1.0, torch.where(mode_NK == STREAMING, 0.0, _UNKNOWN))
    order_K = (share_NK * pairs_N1).sum(0).argsort(descending=True, stable=True)
    rounds = torch.arange(order_K.shape[0], device=order_K.device).view(-1, size)
    rounds[1::2] = rounds[1::2].flip(1)
    kv_K = order_K[rounds.T.flatten()]
    query_H = (kv_K[:, None] * group + torch.arange(group, device=kv_K.device)).flatten()
    return Deal(kv_K, query_H, query_H.argsort())


class RowSliceGroup(RowSlice):
    """One slice of a row on each process of a group.

    Args:
        group: process group; default all processes.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError("context parallelism needs a process group; call torch.distributed.init_process_group")
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def sum(self, part: Tensor) -> Tensor:
        """Sum over the processes, with gradient."""
        total: Tensor = _Sum.apply(part, self.group)
        return total

    def attend(
        self, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, route_NK: Tensor, plan: HeadPlan, scale: float
    ) -> Routed:
        """`routed_attention` on this process's KV heads over the whole row.

        Args:
            q_BHSD: [1, H, s, D]; k_BKSD, v_BKSD: [1, K, s, D]: this slice's tokens after RoPE.
            route_NK: of all KV heads, equal on all processes.
            plan: of all KV heads and the whole row.
            scale: softmax scale.

        Returns:
            the output [1, s, H, D], the plan of this process's heads, and the density [N, K] of all XAttention heads.
        """
        heads, kv_heads = q_BHSD.shape[1] // self.size, k_BKSD.shape[1] // self.size
        dealt = deal(plan, self.size, heads // kv_heads)
        mine = dealt.kv_K[self.rank * kv_heads : (self.rank + 1) * kv_heads]
        chosen = ((q_BHSD, dealt.query_H), (k_BKSD, dealt.kv_K), (v_BKSD, dealt.kv_K))
        parts = [x[0].index_select(0, index).unflatten(0, (self.size, -1)) for x, index in chosen]
        exchanged = _Exchange.apply(torch.cat(parts, dim=1), self.group)  # [C, (H + 2 K) / C, s, D], C: whose tokens
        whole = exchanged.transpose(0, 1).flatten(1, 2)[None, :, : plan.layout.queries]  # [1, (H + 2 K) / C, S, D]
        q, k, v = whole.split([heads, kv_heads, kv_heads], dim=1)
        plan = replace(plan, mode_NK=plan.mode_NK.index_select(1, mine))
        found = routed_attention(q, k, v, route_NK.index_select(1, mine), plan, scale)  # [1, S, H / C, D]
        beyond = self.size * q_BHSD.shape[2] - plan.layout.queries
        output = F.pad(found.output, (0, 0, 0, 0, 0, beyond)) if beyond else found.output
        back = _Exchange.apply(output[0].unflatten(0, (self.size, -1)), self.group)  # first axis: whose heads
        output = back.transpose(0, 1).flatten(1, 2).index_select(1, dealt.back_H)[None]
        return Routed(output, found.plan, self._all_heads(found.density, mine, route_NK))

    def _all_heads(self, share: Tensor | None, mine: Tensor, route_NK: Tensor) -> Tensor | None:
        """A number per sample and KV head of this process, [N, K / C], put together with those of the others."""
        if share is None:
            return None
        whole = torch.zeros(route_NK.shape, dtype=share.dtype, device=share.device).index_copy(1, mine, share)
        dist.all_reduce(whole, group=self.group)
        return whole


def slice_rows(model: CausalLM, group: Any = None) -> RowSliceGroup:
    """From now on the decoder of an attached model takes slices of packed rows, as `shard` cuts them.

    Raises:
        RuntimeError: no process group.
        ValueError: KV heads that the group's size does not divide, or routers that look at whole rows.
    """
    row_slice, router = RowSliceGroup(group), routers(model)[0]
    if router.kv_heads % row_slice.size:
        fitting = [size for size in range(1, router.kv_heads + 1) if router.kv_heads % size == 0]
        raise ValueError(
            f"{router.kv_heads} KV heads cannot be shared out over {row_slice.size} processes; use a group of "
            f"{' or '.join(map(str, fitting))}"
        )
    if router.after_rope:
        raise whole_rows_needed()
    set_row_slice(model, row_slice)
    return row_slice


@contextmanager
def context_parallel(model: CausalLM, group: Any = None) -> Iterator[RowSliceGroup]:
    """`slice_rows` inside only."""
    previous = set_row_slice(model, RowSlice())
    try:
        yield slice_rows(model, group)
    finally:
        set_row_slice(model, previous)


def shard(batch: Batch, row_slice: RowSlice) -> dict[str, Tensor]:
    """What the decoder takes on this process: its slice of ids and positions, and the whole row's boundaries. Where the
    slices are longer than the row, the last ones end in tokens of no sample.
    """
    length = batch["input_ids"].shape[1]
    size = -(-length // row_slice.size)
    here, beyond = slice(row_slice.rank * size, (row_slice.rank + 1) * size), row_slice.size * size - length
    return {
        "input_ids": F.pad(batch["input_ids"], (0, beyond))[:, here],
        "position_ids": F.pad(batch["position_ids"], (0, beyond))[:, here],
        "cu_seq_lens": batch["cu_seq_lens"],
        "prompt_spans": batch["prompt_spans"],
        "user_spans": batch["user_spans"],
    }


class _Exchange(torch.autograd.Function):
    """Entry j of the first axis goes to process j; entry i of the result came from process i. Its own inverse."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: Any) -> Tensor:
        ctx.group = group
        sent = sent.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad_outputs[0], ctx.group), None


class _Sum(torch.autograd.Function):
    """Sum over the processes, all of which use it: the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = part.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad_outputs[0], ctx.group), None
