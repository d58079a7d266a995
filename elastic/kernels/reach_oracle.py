"""The readable twin of `elastic.kernels.reach`: how much attention lies outside what a streaming head sees, in PyTorch.

Per sample, KV head after KV head would be the definition; here all heads of a sample go through one chunk of keys after
the other, so that 128K keys need no more memory than a few thousand. Legend: N samples, H query heads, K KV heads,
G = H / K, D head dim, Q queries that are looked at, C keys of a chunk.
"""

import torch
from torch import Tensor

from elastic.kernels.params import REACH_QUERIES, REACH_RECENT, Pattern, Ranges
from elastic.visibility import visible

_CHUNK = 4096  # keys


def reach_oracle(
    q: Tensor, k: Tensor, pattern: Pattern, ranges: Ranges, compute: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`largest` and `recent`, both [N, K] in the type of the computation; the arguments are those of the operator.
    Waits for a GPU if `ranges` are given.

    Args:
        compute: element type of every intermediate; default fp32, or fp64 for fp64 input.
    """
    wide = compute or torch.promote_types(q.dtype, torch.float32)
    kv_heads = k.shape[2]
    samples = q.shape[0] if ranges.row is None else ranges.row.shape[0]
    largest, recent = (torch.zeros(samples, kv_heads, dtype=wide, device=q.device) for _ in range(2))
    spans = ranges.on_host(samples, q.shape[1], k.shape[1])
    for n, (row, begin_q, end_q, begin_k, end_k) in enumerate(spans):
        first = max(begin_q, end_q - REACH_QUERIES)
        if first >= end_q or begin_k >= end_k:
            continue
        q_KGQD = q[row, first:end_q].to(wide).permute(1, 0, 2).unflatten(0, (kv_heads, -1))
        mass_KGQ = hidden_mass(q_KGQD, k[row, begin_k:end_k].transpose(0, 1), pattern)
        largest[n] = mass_KGQ.amax(2).mean(1)
        recent[n] = mass_KGQ[:, :, -REACH_RECENT:].mean((1, 2))
    return largest, recent


def hidden_mass(q_KGQD: Tensor, k_KSD: Tensor, pattern: Pattern) -> Tensor:
    """Per query, the softmax over the sample's keys up to its own position, summed over those that a streaming head
    hides: [K, G, Q] in the queries' type. The queries are the sample's last Q positions.
    """
    queries, (_, keys, dim) = q_KGQD.shape[2], k_KSD.shape
    position_Q1 = torch.arange(keys - queries, keys, device=k_KSD.device)[:, None]
    hidden, seen = [], []
    for begin in range(0, keys, _CHUNK):
        k_KCD = k_KSD[:, begin : begin + _CHUNK].to(q_KGQD.dtype)
        key_C = torch.arange(begin, begin + k_KCD.shape[1], device=k_KSD.device)
        shown_QC = visible(
            position_Q1, key_C, sink=pattern.sink, window=pattern.window, granule=pattern.granule, block=pattern.block
        )
        scores_KGQC = torch.einsum("kgqd,kcd->kgqc", q_KGQD, k_KCD) * pattern.scale_for(dim)
        seen.append(_sums(scores_KGQC, shown_QC))
        hidden.append(_sums(scores_KGQC, (key_C <= position_Q1) & ~shown_QC))
    # exp(hidden) / (exp(hidden) + exp(seen)): exactly 0 where nothing is hidden. A query always sees itself.
    return torch.sigmoid(torch.logsumexp(torch.stack(hidden), 0) - torch.logsumexp(torch.stack(seen), 0))


def _sums(scores_KGQC: Tensor, mask_QC: Tensor) -> Tensor:
    """Log of the sum of exponentials where the mask allows."""
    return torch.logsumexp(scores_KGQC.masked_fill(~mask_QC, float("-inf")), -1)
