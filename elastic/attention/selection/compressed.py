"""Attention to compressed keys, from which NSA and InfLLM-V2 choose: where a group's queries look, by cells.

A cell c holds the tokens [c d, c d + l), l = 2 d, whole cells only; its key is their mean (both papers: l = 32, d = 16;
key blocks below 64 tokens have smaller cells, four strides to a block). A query sees a cell that ends at or before it.
NSA equation 8, InfLLM-V2 section 3.3: p = softmax(scale q . cell keys), summed over the query heads of a KV head
(NSA equation 10), which so share their choice.

Queries are averaged in runs of a quarter of a query block, 32 tokens in blocks of 128, and the runs' shares are summed
over the query block: the kernel's rows are shared by its queries, and a run has the l tokens that a cell has. A run
sees the cells that its first query sees. Legend: H query heads, K KV heads, R runs, M query blocks, C cells.
"""

import torch
from torch import Tensor

from elastic.attention.selection.pooling import grouped_scores, run_means
from elastic.attention.selection.sample import AttentionSample, DecodeSteps

STRIDE = 16  # d of both papers
RUNS = 4  # of a query block
_CHUNK_SCORES = 1 << 26  # that exist at a time


def cell_stride(block: int) -> int:
    """Tokens from one cell to the next."""
    return min(STRIDE, block // 4)


def cell_keys(k_KSD: Tensor, stride: int) -> Tensor:
    """Mean keys of all whole cells, [K, C, D]; C is 0 for fewer than two strides of keys."""
    means = run_means(k_KSD[:, : k_KSD.shape[1] // stride * stride], stride)
    return (means[:, :-1] + means[:, 1:]) / 2 if means.shape[1] else means


def cell_shares(sample: AttentionSample) -> Tensor:
    """Attention to the cells, summed over the runs of a query block and the heads of a group: [K, M, C]. 0 for cells
    that a query block does not see.
    """
    if isinstance(sample, DecodeSteps):
        return _step_shares(sample)
    stride, rows = cell_stride(sample.sparse.block), sample.rows
    run = rows // RUNS
    k_KCD, q_HRD = cell_keys(sample.k_KSD, stride), run_means(sample.q_HLD, run)
    kv_heads, cells = k_KCD.shape[:2]
    blocks = sample.firsts.shape[0]
    share_KMC = torch.zeros(kv_heads, blocks, cells, dtype=sample.wide, device=q_HRD.device)
    if not cells:
        return share_KMC
    step = max(1, _CHUNK_SCORES // (q_HRD.shape[0] * RUNS * cells))
    for begin in range(0, blocks, step):
        # Later cells than these end after the last of these queries.
        end = min(blocks, begin + step)
        width = min(cells, max(0, (sample.past + min(end * rows, sample.q_HLD.shape[1])) // stride - 1))
        if width:
            of_runs = _run_shares(sample, q_HRD[:, begin * RUNS : end * RUNS], k_KCD[:, :width], begin * RUNS, stride)
            share_KMC[:, begin:end, :width] = of_runs
    return share_KMC


def _run_shares(sample: AttentionSample, q_HRD: Tensor, k_KCD: Tensor, first_run: int, stride: int) -> Tensor:
    """Shares [K, m, C] of the query blocks that these runs are of."""
    run = sample.rows // RUNS
    first_R = (torch.arange(q_HRD.shape[1], device=q_HRD.device) + first_run) * run + sample.past
    last_C = (torch.arange(k_KCD.shape[1], device=q_HRD.device) + 2) * stride - 1
    score_HRC = grouped_scores(q_HRD * sample.scale, k_KCD)
    begin = sample.past + first_run * run
    inner = max(0, (begin + 1) // stride - 1)  # cells that all of these runs see
    score_HRC[..., inner:].masked_fill_(last_C[inner:] > first_R[:, None], float("-inf"))
    share_HRC = torch.softmax(score_HRC, dim=-1)
    blind = max(0, -(-(2 * stride - 1 - begin) // run))  # runs that see no cell
    share_HRC[:, :blind] = 0.0
    missing = -share_HRC.shape[1] % RUNS
    whole = torch.nn.functional.pad(share_HRC, (0, 0, 0, missing)) if missing else share_HRC
    # [K, G, m, RUNS, C] -> [K, m, C]
    return torch.unflatten(torch.unflatten(whole, 0, (-1, sample.group)), 2, (-1, RUNS)).sum((1, 3))


def _step_shares(steps: DecodeSteps) -> Tensor:
    """`cell_shares` of single queries, each at a position of its own: [K, 1, C]."""
    stride = cell_stride(steps.sparse.block)
    k_KCD = cell_keys(steps.k_KSD, stride)
    score_HC = grouped_scores(steps.q_HLD.to(steps.wide) * steps.scale, k_KCD)[:, 0]
    last_C = (torch.arange(k_KCD.shape[1], device=score_HC.device) + 2) * stride - 1
    seen_HC = last_C <= steps.past_K.repeat_interleave(steps.group)[:, None]
    share_HC = torch.softmax(score_HC.masked_fill(~seen_HC, float("-inf")), dim=-1)
    share_HC = share_HC.masked_fill(~seen_HC, 0.0)  # NaN so far where a query sees no cell
    return torch.unflatten(share_HC, 0, (-1, steps.group)).sum(1)[:, None]


def oracle_shares(sample: AttentionSample) -> Tensor:
    """`cell_shares` from the equations, a head, a run and a cell at a time."""
    stride, wide = cell_stride(sample.sparse.block), sample.wide
    run, length = sample.rows // RUNS, sample.q_HLD.shape[1]
    cells = max(0, sample.k_KSD.shape[1] // stride - 1)
    share = torch.zeros(sample.k_KSD.shape[0], sample.firsts.shape[0], cells, dtype=wide)
    for head, q_LD in enumerate(sample.q_HLD.to(wide)):
        k_SD = sample.k_KSD[head // sample.group].to(wide)
        keys = [k_SD[c * stride : c * stride + 2 * stride].mean(0) for c in range(cells)]
        for begin in range(0, length, run):
            visible = [c for c in range(cells) if (c + 2) * stride - 1 <= sample.past + begin]
            if visible:
                scores = torch.stack([keys[c] for c in visible]) @ q_LD[begin : begin + run].mean(0)
                attention = torch.softmax(sample.scale * scores, dim=0)
                share[head // sample.group, begin // sample.rows, visible] += attention
    return share
