"""NSA, Native Sparse Attention, on a frozen backbone (arXiv 2502.11089, section 3.3): its selection and its window.

The importance of a key block is the attention to the compressed keys in it (`compressed`). Equation 9, for cells of
l = 2 d tokens every d tokens: p_block[j] = sum over the cells of p[cell] times the strides of d tokens that cell and
block share, so a cell that lies half in the block counts once and one that lies in it twice. Equation 11: the n blocks
of the highest importance, the first block and those of the query itself among them (16 blocks of 64 tokens in the
paper, one initial and two local ones). Beside them every query sees the `window` (512 tokens in the paper).

Not NSA as it was trained: there a learnt MLP compresses keys and values, attention to the compressed values is a third
branch, and learnt gates weigh the three branches, each with keys of its own. A frozen backbone has none of these: mean
keys take the place of the MLP, selection and window are one softmax over their union, and the compressed branch ends
with the choice. Decode steps choose in the same way, as in the paper: a single query is a run of its own.
"""

import torch
from torch import Tensor

from elastic.attention.selection.compressed import cell_shares, cell_stride, oracle_shares
from elastic.attention.selection.pooling import heaviest
from elastic.attention.selection.sample import AttentionSample

PUBLISHED = 16


def choose(sample: AttentionSample) -> Tensor:
    """Key blocks of every KV head, [K, M, N]."""
    seen_MN, own_MN = sample.seen(), sample.own()
    share_KMC, strides = cell_shares(sample), sample.sparse.block // cell_stride(sample.sparse.block)
    # A stride of d tokens has the cell that begins there and the one before it, [K, M, C + 1].
    of_strides = torch.nn.functional.pad(share_KMC, (0, 1)) + torch.nn.functional.pad(share_KMC, (1, 0))
    missing = seen_MN.shape[-1] * strides - of_strides.shape[-1]
    score_KMN = torch.nn.functional.pad(of_strides, (0, missing)).unflatten(-1, (-1, strides)).sum(-1)
    chosen = heaviest(score_KMN, own_MN | sample.sink(1), seen_MN, sample.sparse.top_k or PUBLISHED)
    return chosen | sample.window(sample.sparse.window)


def oracle(sample: AttentionSample) -> Tensor:
    """The same, from the equations, a query block at a time."""
    share_KMC, block, stride = oracle_shares(sample), sample.sparse.block, cell_stride(sample.sparse.block)
    (kv_heads, blocks, cells), share = share_KMC.shape, share_KMC.tolist()
    begins = range(0, sample.k_KSD.shape[1], block)
    chosen = torch.zeros(kv_heads, blocks, len(begins), dtype=torch.bool)
    for m, (first, last) in enumerate(zip(sample.firsts.tolist(), sample.lasts.tolist(), strict=True)):
        seen = [j for j, begin in enumerate(begins) if begin <= last]
        always = {0, *(j for j in seen if begins[j] + block > first)}
        window = [j for j in seen if begins[j] > first - sample.sparse.window]
        for head in range(kv_heads):
            importance = dict.fromkeys(seen, 0.0)
            for j in seen:
                for c in range(max(0, begins[j] // stride - 1), min(cells, (begins[j] + block) // stride)):
                    halves = (c * stride, (c + 1) * stride)  # where the cell's two strides begin
                    shared = sum(begins[j] <= half < begins[j] + block for half in halves)
                    importance[j] += shared * share[head][m][c]
            ranked = sorted(set(seen) - always, key=lambda j: (-importance[j], j))
            best = ranked[: max(0, (sample.sparse.top_k or PUBLISHED) - len(always))]
            chosen[head, m, [*always, *best, *window]] = True
    return chosen
