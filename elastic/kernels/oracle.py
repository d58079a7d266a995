"""The readable twin of the kernels: the same arguments, an explicit dense mask per sample and head, plain tensor code.

Runs on any device, in fp32 or wider; it copies the sample ranges to the host. Legend: B batch rows, N samples, S
tokens, H query heads, K KV heads, G = H / K, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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
        seen: Tensor = visible(position, key, sink=sink, window=window, granule=pattern.granule, block=pattern.block)
        return seen
    if mode == BLOCK_SPARSE and bits is not None:
        blocks = mask_from_bits(bits).repeat_interleave(pattern.block, dim=-1)[..., :keys]
        blocks = torch.nn.functional.pad(blocks, (0, keys - blocks.shape[-1]))
        return blocks.repeat_interleave(QUERY_BLOCK, dim=-2)[..., :queries, :] & causal
    return None


@dataclass(frozen=True)
class _Group:
    """One KV head of one sample with its query heads: where they lie, wide operands, mask (None: no such mode)."""

    row: int
    queries: slice
    keys: slice
    heads: slice
    kv_head: int
    q_GLD: Tensor
    k_LD: Tensor
    v_LD: Tensor
    mask: Tensor | None

    def weights(self, scale: float, lse_GL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Softmax [G, Lq, Lk] and its log-sum-exp [G, Lq], that of the keys or the given one; a query that sees nothing
        has weights 0 and -inf.
        """
        assert self.mask is not None
        scores = (self.q_GLD @ self.k_LD.T * scale).masked_fill(~self.mask, float("-inf"))
        sums = torch.logsumexp(scores, dim=-1) if lse_GL is None else lse_GL
        return torch.exp(scores - sums.masked_fill(sums == float("-inf"), 0.0)[..., None]), sums


def _groups(
    q: Tensor, k: Tensor, v: Tensor, mode: Tensor, pattern: Pattern, ranges: Ranges, bits: Tensor | None,
    wide: torch.dtype,
) -> Iterator[_Group]:  # fmt: skip
    samples, kv_heads = mode.shape
    group = q.shape[2] // kv_heads
    spans = ranges.on_host(samples, q.shape[1], k.shape[1])
    for n, (modes, (row, begin_q, end_q, begin_k, end_k)) in enumerate(zip(mode.tolist(), spans, strict=True)):
        queries, keys = slice(begin_q, end_q), slice(begin_k, end_k)
        for kv_head, of_head in enumerate(modes):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            q_GLD = q[row, queries, heads].transpose(0, 1).to(wide)
            k_LD, v_LD = k[row, keys, kv_head].to(wide), v[row, keys, kv_head].to(wide)
            chosen = None if bits is None else bits[n, heads]
            mask = head_mask(of_head, q_GLD.shape[1], k_LD.shape[0], pattern, chosen, q.device)
            yield _Group(row, queries, keys, heads, kv_head, q_GLD, k_LD, v_LD, mask)


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
    scale = pattern.scale_for(dim)
    for g in _groups(q, k, v, mode, pattern, ranges, bits, wide):
        if g.mask is None:
            out[g.row, g.queries, g.heads] = lse[g.row, g.heads, g.queries] = float("nan")
            continue
        weights, lse[g.row, g.heads, g.queries] = g.weights(scale)
        out[g.row, g.queries, g.heads] = (weights @ g.v_LD).transpose(0, 1)
    return out.to(q.dtype), lse


def gradient_oracle(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mode: Tensor, pattern: Pattern, ranges: Ranges,
    bits: Tensor | None, compute: torch.dtype | None = None, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of `attention_oracle` in q's dtype, in the steps in which PyTorch differentiates a softmax:
    dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q.

    Args:
        lse: [B, H, Sq], of denominators in which more than the keys has a share; default that of the keys.
    """
    wide = compute or torch.promote_types(q.dtype, torch.float32)
    scale = pattern.scale_for(q.shape[3])
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for g in _groups(q, k, v, mode, pattern, ranges, bits, wide):
        at_keys, at_queries = (g.row, g.keys, g.kv_head), (g.row, g.queries, g.heads)
        if g.mask is None:
            dq[at_queries] = dk[at_keys] = dv[at_keys] = float("nan")
            continue
        weights, _ = g.weights(scale, None if lse is None else lse[g.row, g.heads, g.queries])
        grad_GLD = grad_out[at_queries].transpose(0, 1).to(wide)
        dp = grad_GLD @ g.v_LD.T
        ds = weights * (dp - (weights * dp).sum(-1, keepdim=True))
        dv[at_keys] = (weights.transpose(1, 2) @ grad_GLD).sum(0)
        dq[at_queries] = (ds @ g.k_LD * scale).transpose(0, 1)
        dk[at_keys] = (ds.transpose(1, 2) @ g.q_GLD * scale).sum(0)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
