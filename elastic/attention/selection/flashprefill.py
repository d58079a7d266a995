"""FlashPrefill (arXiv 2603.06199): the blocks whose score is at least a share `alpha` of the row's largest.

With mean keys k[n] of the key blocks, rounded to the keys' element type as in the published code, each query head
scores a pair of query block m and key block n by
    p[m, n] = sum over the queries i of m that see the whole of n of exp(scale q_i . k[n]),
normalised over n, which no comparison within a row needs. A query block visits the n with
    p[m, n] >= alpha max over n' of p[m, n'],
without sorting or summing up; the first blocks (`sink`, 256 tokens as published), the last ones (`window`, 512 tokens),
and everything in the last two query blocks. Published alpha: 0.18 (Llama-3.1), 0.08 (Qwen2.5), 0.12 (Qwen3-30B-A3B).
Equations and constants are those of the published code, ops/flashprefill_native_forward.py of
github.com/qhfan/FlashPrefill. Decoding attends in full, as published. FlashPrefill needs no training.
"""

import math

import torch
from torch import Tensor

from elastic.attention.selection.pooling import grouped_scores, run_means
from elastic.attention.selection.sample import AttentionSample
from elastic.kernels.block_choice import launch_block_scores, unsupported_choice

LAST_FULL = 2  # query blocks at the end that visit everything
_CHUNK_SCORES = 1 << 26  # that exist at a time


def choose(sample: AttentionSample) -> Tensor:
    """Key blocks of every query head, [H, M, N]."""
    seen_MN, log_HMN = sample.seen(), _log_scores(sample)
    floor = log_HMN.amax(-1, keepdim=True) + math.log(sample.sparse.threshold)
    heavy = (log_HMN >= floor) & (log_HMN > float("-inf"))
    return (heavy | _always(sample)) & seen_MN


def _log_scores(sample: AttentionSample) -> Tensor:
    """log p [H, M, N]; -inf where no query sees the whole of a key block, and in the last query blocks."""
    block, q_HLD = sample.sparse.block, sample.q_HLD
    k_KND = run_means(sample.k_KSD, block).to(sample.k_KSD.dtype)
    heads, blocks, columns = q_HLD.shape[0], sample.firsts.shape[0], k_KND.shape[1]
    scored = max(0, blocks - LAST_FULL)  # whole query blocks, all of them
    if unsupported_choice(q_HLD, sample.k_KSD, block) is None:
        return launch_block_scores(q_HLD, k_KND, sample.past, block, scored, sample.scale)
    log_HMN = torch.full((heads, blocks, columns), float("-inf"), dtype=sample.wide, device=q_HLD.device)
    step = max(1, _CHUNK_SCORES // (heads * sample.rows * columns))
    for begin in range(0, scored, step):
        end = min(scored, begin + step)
        width = (sample.past + end * sample.rows) // block  # key blocks that end at or before the last query
        if width:
            log_HMN[:, begin:end, :width] = _block_scores(sample, begin, end, k_KND[:, :width])
    return log_HMN


def _block_scores(sample: AttentionSample, begin: int, end: int, k_KWD: Tensor) -> Tensor:
    """log p of the query blocks [begin, end), [H, m, W]; -inf where no query sees the whole of a key block."""
    queries = slice(begin * sample.rows, end * sample.rows)
    score_HCW = grouped_scores(sample.q_HLD[:, queries], k_KWD).mul_(sample.scale)
    position = torch.arange(queries.start, queries.stop, device=score_HCW.device) + sample.past
    last_W = (torch.arange(k_KWD.shape[1], device=score_HCW.device) + 1) * sample.sparse.block - 1
    inner = (sample.past + queries.start + 1) // sample.sparse.block  # whole for all of these queries
    score_HCW[..., inner:].masked_fill_(last_W[inner:] > position[:, None], float("-inf"))
    score_HmRW = torch.unflatten(score_HCW, 1, (-1, sample.rows))
    # log sum = score - log softmax, of the last query, which sees what any of its block does. On a GPU log_softmax is
    # one kernel, torch.logsumexp five.
    final_HmW = score_HmRW[:, :, -1]
    total = final_HmW - torch.log_softmax(score_HmRW, dim=2)[:, :, -1]
    return torch.where(final_HmW == float("-inf"), final_HmW, total)


def _always(sample: AttentionSample) -> Tensor:
    """Sink, window and the last query blocks, [M, N]."""
    blocks = sample.firsts.shape[0]
    last = torch.arange(blocks, device=sample.firsts.device) >= blocks - LAST_FULL
    return sample.sink(sample.sparse.sink) | sample.window(sample.sparse.window) | last[:, None]


def oracle(sample: AttentionSample) -> Tensor:
    """The same, from the equations, a pair of blocks at a time."""
    sparse, wide, length = sample.sparse, sample.wide, sample.q_HLD.shape[1]
    seen_MN, own_MN = sample.seen().cpu(), sample.own().cpu()
    blocks, columns = seen_MN.shape
    first_M = sample.firsts.tolist()
    chosen = torch.zeros(sample.q_HLD.shape[0], blocks, columns, dtype=torch.bool)
    for head, q_LD in enumerate(sample.q_HLD.to(wide)):
        k_SD = sample.k_KSD[head // sample.group]
        spans = [slice(n * sparse.block, (n + 1) * sparse.block) for n in range(columns)]
        means = [k_SD[span].to(wide).mean(0).to(k_SD.dtype).to(wide) for span in spans]
        for m in range(blocks):
            of_block = range(m * sample.rows, min((m + 1) * sample.rows, length))
            scores = {}
            for n in range(columns):
                inside = [i for i in of_block if sample.past + i >= spans[n].stop - 1]
                if inside:
                    scores[n] = torch.logsumexp(sample.scale * (q_LD[inside] @ means[n]), dim=0).item()
            largest = max(scores.values(), default=0.0)
            for n in range(columns):
                heavy = n in scores and scores[n] >= largest + math.log(sparse.threshold)
                near = n * sparse.block > first_M[m] - sparse.window or bool(own_MN[m, n])
                chosen[head, m, n] = heavy or near or n * sparse.block < sparse.sink or m >= blocks - LAST_FULL
    return chosen & seen_MN
