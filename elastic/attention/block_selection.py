"""Which key blocks the heads of a plan visit whose mode chooses them, from queries and keys after RoPE, and how much
that is: XAttention's heads by its operator, those of `elastic.attention.selection` in PyTorch.

The choice is a constant for the gradient. Legend: B rows, N samples, H query heads, K KV heads, D head dim, M query
blocks, W words of 32 key blocks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.attention.head_plan import HeadPlan
from elastic.attention.modes import BLOCK_SPARSE
from elastic.attention.selection.sample import AttentionSample, DecodeSteps
from elastic.attention.selection.table import SELECTIONS, Selection
from elastic.kernels import select_blocks
from elastic.kernels.block_bits import bits_from_mask, count_bits, query_block
from elastic.kernels.xattention_oracle import select_oracle


def with_blocks(q_BHSD: Tensor, k_BKSD: Tensor, plan: HeadPlan, scale: float, *, fused: bool, both: bool) -> HeadPlan:
    """The plan with the key blocks of its heads that choose them; the plan itself if it has them or none are needed.

    Args:
        fused: XAttention: choose with the operator, without waiting for the GPU; otherwise with its oracle, in PyTorch.
        both: choose for every head, so that the flipped plan can run too.
    """
    if plan.bits is not None or not plan.chooses_blocks:
        return plan
    sparse, selection = plan.sparse, SELECTIONS.get(plan.sparse.chooser or "")
    mode = torch.full_like(plan.mode_NK, BLOCK_SPARSE) if both else plan.mode_NK
    q, k = q_BHSD.detach(), k_BKSD.detach()
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if selection is not None:
            return replace(plan, bits=selected_bits(selection, q, k, replace(plan, mode_NK=mode), scale))
        bits = (select_blocks if fused else select_oracle)(
            q.transpose(1, 2), k.transpose(1, 2), mode, plan.pattern(scale), plan.layout.kernel_ranges,
            stride=sparse.stride, threshold=sparse.threshold,
        )  # fmt: skip
    return replace(plan, bits=bits)


def selected_bits(selection: Selection, q_BHSD: Tensor, k_BKSD: Tensor, plan: HeadPlan, scale: float) -> Tensor:
    """Bits [N, H, M, W] of a plan's block-sparse heads, 0 for the others; every sample chooses from its own tokens.
    Nothing is read back from a GPU but the bounds of padded rows, once per forward pass, and none for decode steps.
    """
    if plan.layout.decoding and not plan.layout.packed:
        return _step_bits(selection, q_BHSD, k_BKSD, plan, scale)
    return _bits_by_sample(selection, q_BHSD, k_BKSD, plan, scale)


def _step_bits(selection: Selection, q_BHSD: Tensor, k_BKSD: Tensor, plan: HeadPlan, scale: float) -> Tensor:
    """Those of one query in every row, which choose all at once."""
    layout, (rows, kv_heads, keys, _) = plan.layout, k_BKSD.shape
    group = q_BHSD.shape[1] // kv_heads
    if layout.padded:  # every row's own keys first
        places_BS = layout.memo("places", lambda: _places(layout.begin_N, keys))
        k_BKSD = k_BKSD.take_along_dim(places_BS[:, None, :, None], dim=2)
    past_K = layout.memo(("past", kv_heads), lambda: (layout.past - layout.begin_N).repeat_interleave(kv_heads))
    steps = DecodeSteps(q_BHSD.flatten(0, 1), k_BKSD.flatten(0, 1), plan.sparse, scale, past_K)
    runs_BK = (plan.mode_NK == BLOCK_SPARSE) & (layout.end_N > layout.past)[:, None]
    of_heads = torch.unflatten(bits_from_mask(selection.choose(steps)), 0, (rows, kv_heads))
    return (of_heads * runs_BK[..., None, None]).repeat_interleave(group, dim=1)


def _places(begin_N: Tensor, keys: int) -> Tensor:
    return (begin_N[:, None] + torch.arange(keys, device=begin_N.device)).clamp(max=keys - 1)


def _bits_by_sample(selection: Selection, q_BHSD: Tensor, k_BKSD: Tensor, plan: HeadPlan, scale: float) -> Tensor:
    """Any layout's, a sample at a time."""
    layout, heads, kv_heads = plan.layout, q_BHSD.shape[1], k_BKSD.shape[1]
    size, samples = query_block(plan.sparse.block), plan.mode_NK.shape[0]
    shape = (samples, heads, -(-layout.queries // size), -(-layout.keys // (32 * plan.sparse.block)))
    bits = torch.zeros(shape, dtype=torch.int32, device=q_BHSD.device)
    whole = [(row, 0, layout.keys) for row in range(layout.rows)]
    for n, (row, begin, end) in enumerate(layout.spans if layout.packed or layout.padded else whole):
        queries = slice(max(0, begin - layout.past), max(0, end - layout.past))
        if queries.start >= queries.stop:
            continue
        chosen = selection.choose(
            AttentionSample(q_BHSD[row, :, queries], k_BKSD[row, :, begin:end], plan.sparse, scale)
        )
        of_heads = bits_from_mask(chosen).repeat_interleave(heads // chosen.shape[0], dim=0)
        runs = (plan.mode_NK[n] == BLOCK_SPARSE).repeat_interleave(heads // kv_heads)
        bits[n, :, : of_heads.shape[1], : of_heads.shape[2]] = of_heads * runs[:, None, None]
    return bits


def density(plan: HeadPlan) -> Tensor | None:
    """Share of the visible (query, key) pairs in the blocks that were chosen, the mean over a KV head's query heads:
    float64 [N, K], on the device. It says nothing for heads that did not choose. None while decoding, and if no mode of
    the configuration chooses; 1 where such heads attend in full to a single token.
    """
    layout = plan.layout
    if plan.sparse.chooser is None or layout.decoding:
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
