"""Which key blocks the XAttention heads of a plan visit, chosen from queries and keys after RoPE, and how much that is.

The choice is a constant for the gradient. Legend: B rows, N samples, H query heads, K KV heads, D head dim, M query
blocks, W words of 32 key blocks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.attention.head_plan import HeadPlan
from elastic.attention.modes import BLOCK_SPARSE
from elastic.kernels import select_blocks
from elastic.kernels.block_bits import count_bits, query_block
from elastic.kernels.xattention_oracle import select_oracle


def with_blocks(q_BHSD: Tensor, k_BKSD: Tensor, plan: HeadPlan, scale: float, *, fused: bool, both: bool) -> HeadPlan:
    """The plan with the key blocks of its XAttention heads; the plan itself if it has them or none are needed.

    Args:
        fused: choose with the operator, without waiting for the GPU; otherwise with its oracle, in PyTorch.
        both: choose for every head, so that the flipped plan can run too.
    """
    if plan.bits is not None or not plan.chooses_blocks:
        return plan
    sparse, choose = plan.sparse, select_blocks if fused else select_oracle
    q, k = q_BHSD.detach().transpose(1, 2), k_BKSD.detach().transpose(1, 2)
    mode = torch.full_like(plan.mode_NK, BLOCK_SPARSE) if both else plan.mode_NK
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        bits = choose(
            q, k, mode, plan.pattern(scale), plan.layout.kernel_ranges, stride=sparse.stride, threshold=sparse.threshold
        )
    return replace(plan, bits=bits)


def density(plan: HeadPlan) -> Tensor | None:
    """Share of the visible (query, key) pairs in the blocks that XAttention chose, the mean over a KV head's query
    heads: float64 [N, K], on the device. It says nothing for heads that were not estimated. None while decoding, and if
    the configuration has no XAttention heads; 1 where they attend in full to a single token.
    """
    layout = plan.layout
    if not plan.sparse.has("xattention") or (layout.queries == 1 and layout.past):
        return None
    if plan.bits is None:
        return torch.ones(plan.mode_NK.shape, dtype=torch.float64, device=plan.mode_NK.device)
    blocks = plan.bits.shape[2]
    pairs = layout.memo(("pairs", plan.sparse.block), lambda: _pairs_of(plan, blocks))
    of_heads: Tensor = pairs.visited_share(plan.bits).unflatten(1, (plan.mode_NK.shape[1], -1)).mean(-1)
    return of_heads


@dataclass(frozen=True)
class BlockPairs:
    """(query, key) pairs of samples cut into blocks. All chosen blocks but those that hold the query block's own
    positions lie wholly before it, and its own are always chosen: so their number is all there is to know.

    Attributes:
        weight_NM: pairs that one more key block brings to a query block.
        constant_N: pairs in the query blocks' own key blocks, less what their number would count.
        visible_N: causally visible pairs.
    """

    weight_NM: Tensor
    constant_N: Tensor
    visible_N: Tensor

    @classmethod
    def of(cls, queries_N: Tensor, keys_N: Tensor, block: int, query_blocks: int) -> "BlockPairs":
        """Samples whose queries are their last positions; int64 tensors, on the device."""
        size, past_N1 = query_block(block), (keys_N - queries_N)[:, None]
        begin_M = torch.arange(query_blocks, device=keys_N.device) * size
        rows_NM = (queries_N[:, None] - begin_M).clamp(min=0, max=size)
        first_NM = past_N1 + begin_M
        own_begin_NM = first_NM // block
        own_NM = (first_NM + rows_NM - 1) // block - own_begin_NM + 1
        own_pairs_NM = rows_NM * (first_NM - own_begin_NM * block + 1) + rows_NM * (rows_NM - 1) // 2
        weight_NM = block * rows_NM
        visible_N = queries_N * past_N1[:, 0] + queries_N * (queries_N + 1) // 2
        return cls(weight_NM, (own_pairs_NM - own_NM * weight_NM).sum(-1), visible_N.clamp(min=1))

    def visited_share(self, bits_NHMW: Tensor) -> Tensor:
        """Share of the visible pairs that lie in chosen blocks, float64 [N, H]."""
        visited_NH = (count_bits(bits_NHMW) * self.weight_NM[:, None]).sum(-1) + self.constant_N[:, None]
        return visited_NH.double() / self.visible_N[:, None]


def _pairs_of(plan: HeadPlan, query_blocks: int) -> BlockPairs:
    layout = plan.layout
    queries_N = (layout.end_N - layout.past).clamp(min=0) - (layout.begin_N - layout.past).clamp(min=0)
    return BlockPairs.of(queries_N, layout.end_N - layout.begin_N, plan.sparse.block, query_blocks)
