"""Rows too long for one GPU: every process of a group holds a slice of the row, attention exchanges heads.

Everything but attention works on a slice of the tokens. In attention, queries, keys and values are exchanged so that
each process has its share of the KV heads over the whole row, runs `routed_attention` on them, and exchanges back: two
all-to-all messages a layer. Routing adds two sums of pooled keys. All processes draw the same routes (seed them alike)
and compute the same loss; the mean of their gradients is the gradient of one process.
Legend: C processes, s = S / C tokens here, H query heads, K KV heads, D head dim, N samples, E hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.attention.head_plan import HeadPlan
from elastic.attention.routed import Routed, routed_attention
from elastic.attention.row_slice import RowSlice
from elastic.data.packing import IGNORE, Batch
from elastic.model.attach import routers, set_row_slice
from elastic.protocols import CausalLM
from elastic.training.losses import chunked_divergence, labelled_positions, labelled_samples, summed_cross_entropy


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
        mine = slice(self.rank * kv_heads, (self.rank + 1) * kv_heads)
        parts = [x[0].unflatten(0, (self.size, -1)) for x in (q_BHSD, k_BKSD, v_BKSD)]  # [C, heads / C, s, D] each
        exchanged = _Exchange.apply(torch.cat(parts, dim=1), self.group)  # first axis: whose tokens
        whole = exchanged.transpose(0, 1).flatten(1, 2)[None]  # [1, (H + 2 K) / C, S, D]
        q, k, v = whole.split([heads, kv_heads, kv_heads], dim=1)
        plan = replace(plan, mode_NK=plan.mode_NK[:, mine].contiguous())
        found = routed_attention(q, k, v, route_NK[:, mine], plan, scale)  # [1, S, H / C, D]
        back = _Exchange.apply(found.output[0].unflatten(0, (self.size, -1)), self.group)  # first axis: whose heads
        output = back.transpose(0, 1).flatten(1, 2)[None]
        return Routed(output, found.plan, self._all_heads(found.density, mine, route_NK))

    def _all_heads(self, share: Tensor | None, mine: slice, route_NK: Tensor) -> Tensor | None:
        """A number per sample and KV head of this process, [N, K / C], put together with those of the others."""
        if share is None:
            return None
        whole = torch.zeros(route_NK.shape, dtype=share.dtype, device=share.device)
        whole[:, mine] = share
        dist.all_reduce(whole, group=self.group)
        return whole


@contextmanager
def context_parallel(model: CausalLM, group: Any = None) -> Iterator[RowSliceGroup]:
    """Inside, the decoder of an attached model takes slices of packed rows, as `shard` cuts them.

    Raises:
        RuntimeError: no process group.
        ValueError: KV heads that the group's size does not divide.
    """
    row_slice, kv_heads = RowSliceGroup(group), routers(model)[0].kv_heads
    if kv_heads % row_slice.size:
        fitting = [size for size in range(1, kv_heads + 1) if kv_heads % size == 0]
        raise ValueError(
            f"{kv_heads} KV heads cannot be shared out over {row_slice.size} processes; use a group of "
            f"{' or '.join(map(str, fitting))}"
        )
    previous = set_row_slice(model, row_slice)
    try:
        yield row_slice
    finally:
        set_row_slice(model, previous)


def shard(batch: Batch, row_slice: RowSlice) -> dict[str, Tensor]:
    """What the decoder takes on this process: its slice of ids and positions, and the whole row's boundaries.

    Raises:
        ValueError: a row whose length the group's size does not divide.
    """
    length = batch["input_ids"].shape[1]
    if length % row_slice.size:
        raise ValueError(
            f"a row of {length} tokens cannot be cut into {row_slice.size} equal slices; pack rows of a multiple of "
            f"{row_slice.size} tokens, without a shorter last one"
        )
    here = slice(row_slice.rank * (length // row_slice.size), (row_slice.rank + 1) * (length // row_slice.size))
    return {
        "input_ids": batch["input_ids"][:, here],
        "position_ids": batch["position_ids"][:, here],
        "cu_seq_lens": batch["cu_seq_lens"],
        "prompt_spans": batch["prompt_spans"],
        "user_spans": batch["user_spans"],
    }


def language_loss(hidden_1sE: Tensor, lm_head: nn.Module, labels_1S: Tensor, chunk: int, row_slice: RowSlice) -> Tensor:
    """Mean next-token cross-entropy of the whole row, equal on all processes; `chunked_cross_entropy` of one process.

    Args:
        hidden_1sE: final hidden states of this slice.
        labels_1S: of the whole row; a slice's last token predicts the first label of the next slice.

    Raises:
        ValueError: no labelled token in the whole row.
    """
    total = int((labels_1S[:, 1:] != IGNORE).sum())
    if not total:
        raise ValueError("the batch has no labelled token; every sample needs an answer")
    here = hidden_1sE.shape[1]
    labels = F.pad(labels_1S, (0, 1), value=IGNORE)[:, row_slice.rank * here : (row_slice.rank + 1) * here + 1]
    hidden_PE, target_P = labelled_positions(F.pad(hidden_1sE, (0, 0, 0, 1)), labels)
    return row_slice.sum(summed_cross_entropy(hidden_PE, target_P, lm_head, chunk)) / total


def divergence(
    hidden_1sE: Tensor,
    dense_1sE: Tensor,
    lm_head: nn.Module,
    labels_1S: Tensor,
    cu_seq_lens: Tensor,
    chunk: int,
    row_slice: RowSlice,
) -> Tensor:
    """Mean KL(dense || routed) [N] over each sample's labelled tokens, equal on all processes: what objective `quality`
    bounds.

    Args:
        hidden_1sE, dense_1sE: final hidden states of this slice, routed and dense.
        labels_1S, cu_seq_lens: of the whole row.

    Raises:
        ValueError: a sample without a labelled token.
    """
    sample_P, count_N = labelled_samples(labels_1S, cu_seq_lens)
    here = hidden_1sE.shape[1]
    labels = F.pad(labels_1S, (0, 1), value=IGNORE)[:, row_slice.rank * here : (row_slice.rank + 1) * here + 1]
    routed, dense = (labelled_positions(F.pad(x, (0, 0, 0, 1)), labels)[0] for x in (hidden_1sE, dense_1sE))
    predicting_P = (labels_1S[0, 1:] != IGNORE).nonzero()[:, 0]
    mine_P = sample_P[predicting_P // here == row_slice.rank]
    part_N = torch.zeros_like(count_N).index_add(0, mine_P, chunked_divergence(routed, dense, lm_head, chunk))
    return row_slice.sum(part_N) / count_N


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
