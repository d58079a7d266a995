"""InfLLM-V2 (arXiv 2509.24663, sections 3.2 and 3.3): sink, window, and the blocks where a compressed key fits best.

Attention to compressed keys, summed over the heads of a group (`compressed`), gives a score to every cell; a key block
has the largest score of the cells that share tokens with it (the paper's max pooling, in the published code five cells
of stride four). A query sees the first blocks (`sink`), the `window`, and the blocks of the highest score, `top_k` of
them beside the window with the sink among them: 64 blocks of 64 tokens and a window of 2048 in the published model
(section 4.1), 6144 tokens in all. Every KV head chooses for its group. No parameters are added, but the published model
(MiniCPM4.1) was trained with it; here the backbone is frozen. The published switch to dense attention below 8192 tokens
is left to the caller. Decode steps choose in the same way, as published: a single query is a run of its own.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from elastic.attention.selection.compressed import cell_shares, cell_stride, oracle_shares
from elastic.attention.selection.pooling import heaviest
from elastic.attention.selection.sample import AttentionSample

PUBLISHED = 64


def choose(sample: AttentionSample) -> Tensor:
    """Key blocks of every KV head, [K, M, N]."""
    sparse, seen_MN = sample.sparse, sample.seen()
    window_MN, sink_MN = sample.window(sparse.window), sample.sink(sparse.sink)
    strides, share_KMC = sparse.block // cell_stride(sparse.block), cell_shares(sample)
    # Block j has the cells from the one before its first stride to its last stride's.
    missing = seen_MN.shape[-1] * strides - share_KMC.shape[-1]
    score_KMN = F.max_pool1d(F.pad(share_KMC, (1, missing)), strides + 1, strides)
    total_M = window_MN.sum(-1) + (sparse.top_k or PUBLISHED)
    return heaviest(score_KMN, window_MN | sink_MN, seen_MN, total_M)


def oracle(sample: AttentionSample) -> Tensor:
    """The same, from the equations, a query block at a time."""
    sparse, share_KMC, stride = sample.sparse, oracle_shares(sample), cell_stride(sample.sparse.block)
    (kv_heads, blocks, cells), share = share_KMC.shape, share_KMC.tolist()
    begins = range(0, sample.k_KSD.shape[1], sparse.block)
    chosen = torch.zeros(kv_heads, blocks, len(begins), dtype=torch.bool)
    for m, (first, last) in enumerate(zip(sample.firsts.tolist(), sample.lasts.tolist(), strict=True)):
        seen = [j for j, begin in enumerate(begins) if begin <= last]
        window = {j for j in seen if begins[j] > first - sparse.window or begins[j] + sparse.block > first}
        always = window | {j for j in seen if begins[j] < sparse.sink}
        for head in range(kv_heads):

            def score(j: int, head: int = head, m: int = m) -> float:
                touching = range(max(0, begins[j] // stride - 1), min(cells, (begins[j] + sparse.block) // stride))
                return max((share[head][m][c] for c in touching), default=0.0)

            ranked = sorted(set(seen) - always, key=lambda j: (-score(j), j))
            best = ranked[: max(0, len(window) + (sparse.top_k or PUBLISHED) - len(always))]
            chosen[head, m, [*always, *best]] = True
    return chosen
