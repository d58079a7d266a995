"""How far a prompt's last queries look back, by sample and KV head: `elastic.kernels.reach` for a batch's layout.

Legend: B rows, N samples, H query heads, K KV heads, Q = 32 last queries, D head dim.
"""

import torch
from torch import Tensor

from elastic.attention.layout import Layout
from elastic.config import SparseConfig
from elastic.kernels import Pattern, Ranges, Reach, reach, unsupported_reach
from elastic.kernels.params import REACH_QUERIES, WHOLE_ROWS
from elastic.kernels.reach_oracle import reach_oracle


def prompt_reach(
    q_BHSD: Tensor, k_BKSD: Tensor, layout: Layout, sparse: SparseConfig, scale: float, kept_NHQD: Tensor | None = None
) -> Reach:
    """Reach of the prompt of every sample: its queries are the last of what the user wrote, its keys begin with the
    sample. Where the kernel cannot run, the same in PyTorch (`unsupported_reach` says why). No gradient.

    Args:
        q_BHSD: [B, H, Lq, D] after RoPE; the last Lq positions of each row.
        k_BKSD: [B, K, Lk, D], cached keys included.
        sparse: sink, window, granule and block of the streaming heads.
        scale: softmax scale.
        kept_NHQD: what `last_queries` has kept of a prompt that was read in pieces; they are looked at instead.

    Returns:
        fp32 [N, K] each; 0 where the user wrote nothing here, or sink + window hold the whole sample.
    """
    q, k = (q_BHSD if kept_NHQD is None else kept_NHQD).detach().transpose(1, 2), k_BKSD.detach().transpose(1, 2)
    pattern = Pattern(sparse.sink, sparse.window, sparse.granule, sparse.block, scale)
    ranges = layout.memo("reach", lambda: _ranges(layout) if kept_NHQD is None else _kept_ranges(layout))
    reason = unsupported_reach(q.device, q.dtype, q.shape[3], q.shape[2] // k.shape[2])
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if reason is None or q.device.type == "cpu":
            return reach(q, k, pattern, ranges)
        return Reach(*(found.float() for found in reach_oracle(q, k, pattern, ranges)))


def last_queries(q_BHSD: Tensor, layout: Layout, kept_NHQD: Tensor | None) -> Tensor:
    """The queries [N, H, 32, D] at the last 32 positions of what the user wrote, as far as they have been read: of the
    rows' last Lq positions here, and of `kept_NHQD` from pieces before. The others are 0.
    """
    slot_Q = torch.arange(-REACH_QUERIES, 0, device=q_BHSD.device)
    place_NQ = layout.user_end_N[:, None] + slot_Q - layout.past
    here_NQ = (place_NQ >= 0) & (place_NQ < layout.queries)
    index = place_NQ.clamp(0, layout.queries - 1)[:, None, :, None].expand(-1, q_BHSD.shape[1], -1, q_BHSD.shape[3])
    found = q_BHSD.detach()[layout.row_N].gather(2, index)
    before = torch.zeros_like(found) if kept_NHQD is None else kept_NHQD
    return torch.where(here_NQ[:, None, :, None], found, before)


def _kept_ranges(layout: Layout) -> Ranges:
    """As `_ranges`, of queries that `last_queries` has kept; those of earlier turns do not count."""
    end_N = layout.user_end_N
    count_N = (end_N - layout.user_begin_N.clamp(min=layout.turn_begin)).clamp(0, REACH_QUERIES)
    cuts = (REACH_QUERIES - count_N, torch.full_like(count_N, REACH_QUERIES), layout.begin_N, end_N, layout.row_N)
    return Ranges(*(cut.to(torch.int32).contiguous() for cut in cuts))


def _ranges(layout: Layout) -> Ranges:
    """Prompts as the operators take samples: queries and keys both end with the user's words."""
    begin_N, end_N = layout.user_begin_N, layout.user_end_N
    if (begin_N is layout.begin_N and end_N is layout.end_N) and not (layout.packed or layout.padded):
        return WHOLE_ROWS
    begin_q, end_q = ((cut - layout.past).clamp(min=0) for cut in (begin_N, end_N))
    cuts = (begin_q, end_q, layout.begin_N, end_N, layout.row_N)
    return Ranges(*(cut.to(torch.int32).contiguous() for cut in cuts))
