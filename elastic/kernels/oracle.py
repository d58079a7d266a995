"""The readable twin of the kernels: the same arguments, an explicit dense mask per sample and head, plain tensor code.

Runs on any device, in fp32 or wider; it copies the sample ranges to the host. Legend: B batch rows, N samples, S
tokens, H query heads, K KV heads, G = H / K, D head dim.
"""

import torch
from torch import Tensor

from elastic.kernels.block_bits import mask_from_bits
from elastic.kernels.params import BLOCK_SPARSE, FULL, QUERY_BLOCK, STREAMING, Pattern, Ranges
from elastic.visibility import visible


def head_mask(
    mode: int, queries: int, keys: int, pattern: Pattern, bits: Tensor | None, device: torch.device
) -> Tensor | None:
    """Boolean [Lq, Lk], or [G, Lq, Lk] for a block-sparse head with `bits` [G, query blocks, W]; None: no such mode."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    causal = key <= position
    if mode == FULL:
        return causal
    if mode == STREAMING:
        sink, window = pattern.sink, pattern.window
        return visible(position, key, sink=sink, window=window, granule=pattern.granule, block=pattern.block)
    if mode == BLOCK_SPARSE and bits is not None:
        blocks = mask_from_bits(bits).repeat_interleave(pattern.block, dim=-1)[..., :keys]
        blocks = torch.nn.functional.pad(blocks, (0, keys - blocks.shape[-1]))
        return blocks.repeat_interleave(QUERY_BLOCK, dim=-2)[..., :queries, :] & causal
    return None


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: Tensor,
    pattern: Pattern,
    ranges: Ranges,
    bits: Tensor | None,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, Sq, H, D] in q's dtype and LSE [B, H, Sq]; the arguments are those of the operator.

    Args:
        compute: element type of every intermediate; default fp32, or fp64 for fp64 input.
    """
    wide = compute or torch.promote_types(q.dtype, torch.float32)
    batch, seq_q, heads, dim = q.shape
    out = torch.zeros(batch, seq_q, heads, dim, dtype=wide, device=q.device)
    lse = torch.full((batch, heads, seq_q), float("-inf"), dtype=wide, device=q.device)
    samples, kv_heads = mode.shape
    full = {"begin_q": 0, "end_q": seq_q, "begin_k": 0, "end_k": k.shape[1]}
    spans = {n: t.tolist() if t is not None else [full.get(n)] * samples for n, t in ranges.named().items()}
    rows = list(range(samples)) if ranges.row is None else spans["row"]
    group = heads // kv_heads
    for n, modes in enumerate(mode.tolist()):
        queries, keys = slice(spans["begin_q"][n], spans["end_q"][n]), slice(spans["begin_k"][n], spans["end_k"][n])
        for kv_head, of_head in enumerate(modes):
            of_group = slice(kv_head * group, (kv_head + 1) * group)
            q_GLD = q[rows[n], queries, of_group].transpose(0, 1).to(wide)
            k_LD, v_LD = k[rows[n], keys, kv_head].to(wide), v[rows[n], keys, kv_head].to(wide)
            chosen = None if bits is None else bits[n, of_group]
            mask = head_mask(of_head, q_GLD.shape[1], k_LD.shape[0], pattern, chosen, q.device)
            if mask is None:
                out[rows[n], queries, of_group] = lse[rows[n], of_group, queries] = float("nan")
                continue
            scores = (q_GLD @ k_LD.T * pattern.scale).masked_fill(~mask, float("-inf"))
            sums = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - sums.masked_fill(sums == float("-inf"), 0.0)[..., None])
            out[rows[n], queries, of_group] = (weights @ v_LD).transpose(0, 1)
            lse[rows[n], of_group, queries] = sums
    return out.to(q.dtype), lse
