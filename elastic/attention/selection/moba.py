"""MoBA, Mixture of Block Attention (arXiv 2502.13189, section 2.2): the blocks whose mean key fits the query best.

Keys are cut into blocks I_c of `chunk` tokens (512 in the paper). Equations 5 and 6: a query q of a head scores
    s_c = q . mean(K[I_c]),   gate g_c = 1 if s_c is among the k largest,
with s_c = -inf for blocks after the query; the block that holds the query is always visited (g = 1) and counts among
the k (3 in the paper: "at most 2 history block and the current block", section 3.1). Every query head chooses for
itself.

For a query block the mean of its queries' scores counts, which is the score of its mean query, so that its queries
share their blocks; a query block that lies in two of MoBA's blocks has both as its own. Decoding attends in full, as in
the paper ("MoBA is used for prefill only, while we switch to full attention during generation", section 3.3).
The paper continues the pre-training of the model with it; here the backbone is frozen.
"""

import torch
from torch import Tensor

from elastic.attention.selection.pooling import grouped_scores, heaviest, run_means
from elastic.attention.selection.sample import AttentionSample

PUBLISHED = 3


def choose(sample: AttentionSample) -> Tensor:
    """Key blocks of every query head, [H, M, N]."""
    sparse = sample.sparse
    score_HMC = grouped_scores(run_means(sample.q_HLD, sample.rows), run_means(sample.k_KSD, sparse.chunk))
    own_MC, seen_MC = sample.own(sparse.chunk), sample.seen(sparse.chunk)
    chunks_HMC = heaviest(score_HMC, own_MC, seen_MC, sparse.top_k or PUBLISHED)
    seen_MN = sample.seen()
    return chunks_HMC.repeat_interleave(sparse.chunk // sparse.block, dim=-1)[..., : seen_MN.shape[1]] & seen_MN


def oracle(sample: AttentionSample) -> Tensor:
    """The same, from the equations: a score for every query and block of MoBA's, ranked one query block at a time."""
    sparse, wide = sample.sparse, sample.wide
    seen_MN = sample.seen()
    chosen = torch.zeros(sample.q_HLD.shape[0], *seen_MN.shape, dtype=torch.bool)
    begins = range(0, sample.k_KSD.shape[1], sparse.chunk)
    for head, q_LD in enumerate(sample.q_HLD.to(wide)):
        k_SD = sample.k_KSD[head // sample.group].to(wide)
        s_LC = torch.stack([q_LD @ k_SD[c : c + sparse.chunk].mean(0) for c in begins], dim=1)
        for m, (first, last) in enumerate(zip(sample.firsts.tolist(), sample.lasts.tolist(), strict=True)):
            own = [c for c, begin in enumerate(begins) if begin <= last and begin + sparse.chunk > first]
            before = [c for c, begin in enumerate(begins) if begin + sparse.chunk <= first]
            score_C = s_LC[m * sample.rows : (m + 1) * sample.rows].mean(0)
            ranked = sorted(before, key=lambda c: (-score_C[c].item(), c))
            for c in own + ranked[: max(0, (sparse.top_k or PUBLISHED) - len(own))]:
                first_block = c * sparse.chunk // sparse.block
                chosen[head, m, first_block : first_block + sparse.chunk // sparse.block] = True
    return chosen & seen_MN.cpu()
