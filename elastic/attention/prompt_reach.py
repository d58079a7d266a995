"""How far a prompt's last queries look back, by sample and KV head: `elastic.kernels.reach` for a batch's layout.

Legend: B rows, N samples, H query heads, K KV heads, D head dim.
"""

import torch
from torch import Tensor

from elastic.attention.layout import Layout
from elastic.config import SparseConfig
from elastic.kernels import Pattern, Ranges, Reach, reach, unsupported_reach
from elastic.kernels.params import WHOLE_ROWS
from elastic.kernels.reach_oracle import reach_oracle


def prompt_reach(
    q_BHSD: Tensor, k_BKSD: Tensor, layout: Layout, sparse: SparseConfig, scale: float, first_N: Tensor | None = None
) -> Reach:
    """Reach of the prompt of every sample: its last queries are those before `layout.prompt_end_N`, its keys begin with
    the sample. Where the kernel cannot run, the same in PyTorch (`unsupported_reach` says why). No gradient.

    Args:
        q_BHSD: [B, H, Lq, D] after RoPE; the last Lq positions of each row.
        k_BKSD: [B, K, Lk, D], cached keys included.
        sparse: sink, window, granule and block of the streaming heads.
        scale: softmax scale.
        first_N: int64, key positions; queries before it do not count, such as those of a system prompt. Default: all of
            the sample that are here.

    Returns:
        fp32 [N, K] each; 0 for a sample whose prompt has no query here, or is no longer than sink + window.
    """
    q, k = q_BHSD.detach().transpose(1, 2), k_BKSD.detach().transpose(1, 2)
    pattern = Pattern(sparse.sink, sparse.window, sparse.granule, sparse.block, scale)
    ranges = layout.memo("reach", lambda: _ranges(layout, None)) if first_N is None else _ranges(layout, first_N)
    reason = unsupported_reach(q.device, q.dtype, q.shape[3], q.shape[2] // k.shape[2])
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if reason is None or q.device.type == "cpu":
            return reach(q, k, pattern, ranges)
        return Reach(*(found.float() for found in reach_oracle(q, k, pattern, ranges)))


def _ranges(layout: Layout, first_N: Tensor | None) -> Ranges:
    """Prompts as the operators take samples: queries and keys both end with the prompt."""
    if first_N is None and layout.prompt_end_N is layout.end_N and not (layout.packed or layout.padded):
        return WHOLE_ROWS
    begin_N = layout.begin_N if first_N is None else torch.maximum(first_N, layout.begin_N)
    begin_q, end_q = ((cut - layout.past).clamp(min=0) for cut in (begin_N, layout.prompt_end_N))
    cuts = (begin_q, end_q, layout.begin_N, layout.prompt_end_N, layout.row_N)
    return Ranges(*(cut.to(torch.int32).contiguous() for cut in cuts))
