"""Attention of a head plan in PyTorch: the CPU path, and the slow twin of the CUDA kernels on any device.

Full heads go through the same SDPA call as the stock model, so a plan of full heads equals it bit for bit on the CPU.
Streaming heads run in chunks of queries against their sink and window only: their cost grows with S * (sink + window),
not with S * S. Heads with chosen blocks run in chunks of queries under their block mask.
Legend: B rows, S tokens, H query heads, K KV heads, G = H / K, D head dim, C queries of a chunk.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from elastic.attention.head_plan import HeadPlan
from elastic.attention.modes import BLOCK_SPARSE, FULL, STREAMING
from elastic.config import SparseConfig
from elastic.kernels.block_bits import count_bits, mask_from_bits, query_block
from elastic.kernels.xattention_oracle import block_relations
from elastic.visibility import lower_bound, visible

_MASK_ENTRIES = 1 << 27  # of the block mask that exists at a time, where one query block allows it


def attend(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, plan: HeadPlan, scale: float) -> Tensor:
    """Run every head in its planned mode. Differentiable in q, k and v.

    Args:
        q_BHSD: [B, H, Lq, D] after RoPE; the last Lq positions of each row.
        k_BKSD, v_BKSD: [B, K, Lk, D], cached keys included.

    Returns:
        [B, Lq, H, D]; zero at padding.
    """
    modes = [_run_as(plan, n, of_heads) for n, of_heads in enumerate(plan.mode_NK.tolist())]
    if all(mode == FULL for sample in modes for mode in sample) and not plan.layout.packed:
        return _full(q_BHSD, k_BKSD, v_BKSD, plan.layout.dense_mask, scale, plan.sinks_H)
    samples = [_sample(q_BHSD, k_BKSD, v_BKSD, plan, scale, n, modes[n]) for n in range(len(modes))]
    return torch.cat(samples, dim=1 if plan.layout.packed else 0)


def _run_as(plan: HeadPlan, sample: int, modes: list[int]) -> list[int]:
    """The modes that a sample's heads run in: heads that chose every block they see attend in full, so that such a
    choice equals the stock model bit for bit, as that of full heads does.
    """
    if plan.bits is None or BLOCK_SPARSE not in modes:
        return modes
    layout, (_, begin, end) = plan.layout, plan.layout.spans[sample]
    first = max(0, begin - layout.past)
    queries = max(0, end - layout.past) - first
    _, seen_MN = block_relations(queries, end - begin, plan.sparse.block, plan.bits.device)
    whole_H = (count_bits(plan.bits[sample, :, : seen_MN.shape[0]]) == seen_MN.sum(-1)).all(-1)
    whole_K = whole_H.unflatten(0, (len(modes), -1)).all(-1).tolist()
    return [FULL if mode == BLOCK_SPARSE and whole else mode for mode, whole in zip(modes, whole_K, strict=True)]


def _full(
    q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None, scale: float, sinks_H: Tensor | None = None
) -> Tensor:
    """Causal attention by the stock model's own SDPA call, or as its eager call with sinks; [B, Lq, H, D]."""
    if sinks_H is not None:
        if mask is None:
            queries, keys = q_BHSD.shape[2], k_BKSD.shape[2]
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BHSD.device).tril(keys - queries)
        group = q_BHSD.shape[1] // k_BKSD.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k_BKSD, v_BKSD))
        return attend_with_sinks(q_BHSD, k, v, mask, scale, sinks_H[:, None]).transpose(1, 2).contiguous()
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    owner = SimpleNamespace(num_key_value_groups=q_BHSD.shape[1] // k_BKSD.shape[1], is_causal=True)
    return sdpa_attention_forward(owner, q_BHSD, k_BKSD, v_BKSD, mask, scaling=scale)[0]  # type: ignore[arg-type]


def _sample(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    plan: HeadPlan,
    scale: float,
    sample: int,
    modes: list[int],
) -> Tensor:
    """All heads of one sample, [1, its query rows, H, D]: the heads of each mode at once, then back in head order."""
    layout, (row, begin, end) = plan.layout, plan.layout.spans[sample]
    group = q_BHSD.shape[1] // k_BKSD.shape[1]
    first, last = max(0, begin - layout.past), max(0, end - layout.past)  # its query rows
    if begin == end:  # nothing but padding has been read of it
        return q_BHSD.new_zeros(1, layout.queries, *q_BHSD.shape[1::2])
    outputs, order = [], []
    for mode in sorted(set(modes)):
        kv_heads = [head for head, of_head in enumerate(modes) if of_head == mode]
        heads = [head * group + g for head in kv_heads for g in range(group)]
        q, k, v = q_BHSD[row, heads][None], k_BKSD[row, kv_heads][None], v_BKSD[row, kv_heads][None]
        sinks = None if plan.sinks_H is None else plan.sinks_H[heads]
        if mode == FULL and not layout.packed:
            mask = None if layout.dense_mask is None else layout.dense_mask[row : row + 1]
            out = _full(q, k, v, mask, scale, sinks)
        elif mode == FULL:
            out = _full(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], None, scale, sinks)
        else:
            own = q[:, :, first:last], k[:, :, begin:end], v[:, :, begin:end]
            if mode == STREAMING:
                out = streaming(*own, plan.sparse, scale, sinks)
            else:
                assert plan.bits is not None  # elastic.attention.block_selection has run
                out = block_sparse(*own, plan.bits[sample, heads], plan.sparse.block, scale, sinks)
            if not layout.packed:
                out = F.pad(out, (0, 0, 0, 0, first, layout.queries - last))
        outputs.append(out)
        order += heads
    if len(outputs) == 1:
        return outputs[0]
    inverse = torch.tensor(order, device=q_BHSD.device).argsort()
    return torch.cat(outputs, dim=2).index_select(2, inverse)


def attend_with_sinks(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor, scale: float, sinks: Tensor
) -> Tensor:
    """Attention [B, H, Lq, D] in which a sink takes its share of every softmax: exp(s) joins the denominator, which is
    exp(LSE) / (exp(LSE) + exp(s)) times attention without it. Written as transformers' eager attention writes it.

    Args:
        mask: bool, broadcast to [B, H, Lq, Lk].
        sinks: broadcast to [B, H, Lq].
    """
    scores = (q_BHSD @ k_BHSD.transpose(2, 3) * scale).masked_fill(~mask, torch.finfo(q_BHSD.dtype).min)
    logits = torch.cat([scores, sinks.expand(scores.shape[:-1])[..., None]], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1].to(v_BHSD.dtype) @ v_BHSD


def _attend_folded(
    q_KCD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor, scale: float, sinks_H: Tensor | None
) -> Tensor:
    """Attention [1, K, G * C, D] of queries that are folded by KV head, under a bool mask."""
    if sinks_H is None:
        return F.scaled_dot_product_attention(q_KCD[None], k_BKSD, v_BKSD, attn_mask=mask, scale=scale)
    kv_heads, rows = q_KCD.shape[:2]
    group = sinks_H.shape[0] // kv_heads
    sinks = sinks_H.view(kv_heads, group, 1).expand(kv_heads, group, rows // group).reshape(kv_heads, rows)
    return attend_with_sinks(q_KCD[None], k_BKSD, v_BKSD, mask, scale, sinks)


def streaming(
    q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, sparse: SparseConfig, scale: float, sinks_H: Tensor | None = None
) -> Tensor:
    """Streaming attention of one sample's heads: position 0 is its first key, the queries are its last Lq positions.

    Returns:
        [1, Lq, H, D].
    """
    _, heads, queries, dim = q_BHSD.shape
    kv_heads, keys = k_BKSD.shape[1:3]
    group = heads // kv_heads
    chunk = min(max(64, sparse.window // 4), 512)
    outputs = []
    for start in range(keys - queries, keys, chunk):
        stop = min(start + chunk, keys)
        # The group's query heads share keys: fold them into the query axis instead of repeating K and V.
        q_KCD = q_BHSD[0, :, start - keys + queries : stop - keys + queries].reshape(kv_heads, -1, dim)
        k, v, mask_Ck = _visited(k_BKSD[0], v_BKSD[0], start, stop, sparse)
        out = _attend_folded(q_KCD, k[None], v[None], mask_Ck.repeat(group, 1), scale, sinks_H)
        outputs.append(out.reshape(heads, stop - start, dim))  # some GPU backends stride it differently
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


def _visited(
    k_KSD: Tensor, v_KSD: Tensor, start: int, stop: int, sparse: SparseConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values that the queries [start, stop) visit, and the bool mask [C, visited]."""
    local = max(0, lower_bound(start, sparse.window, sparse.granule, sparse.block))
    sink = min(sparse.sink, local)
    position = torch.arange(start, stop, device=k_KSD.device)[:, None]
    key = torch.cat([torch.arange(sink, device=k_KSD.device), torch.arange(local, stop, device=k_KSD.device)])
    mask = visible(position, key, sink=sparse.sink, window=sparse.window, granule=sparse.granule, block=sparse.block)
    if sink == 0:
        return k_KSD[:, local:stop], v_KSD[:, local:stop], mask
    k = torch.cat([k_KSD[:, :sink], k_KSD[:, local:stop]], dim=1)
    v = torch.cat([v_KSD[:, :sink], v_KSD[:, local:stop]], dim=1)
    return k, v, mask


def block_sparse(
    q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, bits_HMW: Tensor, block: int, scale: float,
    sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one sample's heads to the key blocks of their bits; the queries are its last Lq positions.

    Returns:
        [1, Lq, H, D].
    """
    _, heads, queries, dim = q_BHSD.shape
    kv_heads, keys = k_BKSD.shape[1:3]
    size, key = query_block(block), torch.arange(keys, device=q_BHSD.device)
    blocks_HMN = mask_from_bits(bits_HMW)[..., : -(-keys // block)]
    chunk = size * max(1, min(512, _MASK_ENTRIES // (heads * keys)) // size)
    outputs = []
    for start in range(0, queries, chunk):
        stop = min(start + chunk, queries)
        seen = keys - queries + stop
        rows = torch.arange(start, stop, device=q_BHSD.device)
        mask_HCS = blocks_HMN[:, rows // size].repeat_interleave(block, dim=-1)[..., :seen]
        mask_HCS = mask_HCS & (key[:seen] <= (rows + keys - queries)[:, None])
        # The group's query heads share keys: fold them into the query axis instead of repeating K and V.
        q_KCD = q_BHSD[0, :, start:stop].reshape(kv_heads, -1, dim)
        mask_KCS = mask_HCS.view(kv_heads, -1, seen)
        out = _attend_folded(q_KCD, k_BKSD[:, :, :seen], v_BKSD[:, :, :seen], mask_KCS[None], scale, sinks_H)
        outputs.append(out.reshape(heads, stop - start, dim))
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]
