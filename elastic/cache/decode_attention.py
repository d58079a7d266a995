"""Attention of one new token per sample, over an ordinary cache or an elastic one (docs/design.md section 7).

On a GPU both go through the decode kernel, which reads only what the heads see; everything else takes PyTorch's
attention over the keys laid out by position. Where heads choose key blocks in every step (NSA, InfLLM-V2), a step
runs as a prompt does.
Legend: B samples, H query heads, K KV heads, T allocated tokens, D head dim, R rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.attention.head_plan import HeadPlan
from elastic.attention.modes import STREAMING
from elastic.attention.routed import routed_attention
from elastic.attention.torch_path import attend
from elastic.cache.kv_pool import KVPool, Visible, visible_slots
from elastic.kernels import attention_decode, unsupported_reason


@dataclass(frozen=True)
class Stored:
    """One layer of an elastic cache in a decode step, the new token included.

    Attributes:
        pool: the layer's keys and values.
        base_BK: int64; first row of every head.
        visible: what its heads see, [B, K].
        begin_B, count_B: padding before, and valid tokens of every sample.
    """

    pool: KVPool
    base_BK: Tensor
    visible: Visible
    begin_B: Tensor
    count_B: Tensor


def decode_attention(
    q_BH1D: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, plan: HeadPlan, scale: float, stored: Stored | None
) -> Tensor:
    """Output [B, 1, H, D] of one query per head.

    Args:
        k_BKTD, v_BKTD: keys and values of an ordinary cache, the new token at `plan.layout.keys - 1`; not read where
            `stored` is given.
    """
    if plan.chooses_blocks:
        return _chosen(q_BH1D, k_BKTD, v_BKTD, plan, scale, stored)
    kernel = unsupported_reason(q_BH1D.device, q_BH1D.dtype, q_BH1D.shape[-1]) is None
    if stored is not None:
        q_BH1D = q_BH1D.to(stored.pool.keys.dtype)  # under autocast the cache holds what the model stored
        if kernel:
            pool = stored.pool
            return _launch(q_BH1D, pool.keys, pool.values, stored.base_BK, stored.visible, plan, scale)
        k, v = stored.pool.dense(stored.begin_B, stored.count_B, plan.layout.keys)
        return attend(q_BH1D, k, v, plan, scale)
    if kernel and k_BKTD.is_contiguous() and v_BKTD.is_contiguous():
        return _launch(q_BH1D, k_BKTD, v_BKTD, *_dense_rows(k_BKTD, plan), plan, scale)
    keys = plan.layout.keys  # a static cache hands out its whole allocation
    found = routed_attention(q_BH1D, k_BKTD[:, :, :keys], v_BKTD[:, :, :keys], plan.mode_NK, plan, scale)
    return found.output


def _chosen(
    q_BH1D: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, plan: HeadPlan, scale: float, stored: Stored | None
) -> Tensor:
    """Steps in which heads choose key blocks: as a prompt of one query over its keys."""
    keys = plan.layout.keys
    if stored is None:
        k, v = k_BKTD[:, :, :keys], v_BKTD[:, :, :keys]
    else:
        q_BH1D = q_BH1D.to(stored.pool.keys.dtype)
        k, v = stored.pool.dense(stored.begin_B, stored.count_B, keys)
    return routed_attention(q_BH1D, k, v, plan.mode_NK, plan, scale).output


def _dense_rows(k_BKTD: Tensor, plan: HeadPlan) -> tuple[Tensor, Visible]:
    """First row of every head's first valid token, and what it sees, for a cache [B, K, T, D]."""
    (batch, kv_heads, length), layout = k_BKTD.shape[:3], plan.layout
    head = torch.arange(batch * kv_heads, device=k_BKTD.device).view(batch, kv_heads)
    streaming = plan.mode_NK == STREAMING
    count = (layout.end_N - layout.begin_N)[:, None].expand(batch, kv_heads)
    visible = visible_slots(count, streaming, torch.zeros_like(streaming), plan.sparse)
    return head * length + layout.begin_N[:, None], visible


def _launch(
    q_BH1D: Tensor, keys: Tensor, values: Tensor, base_BK: Tensor, visible: Visible, plan: HeadPlan, scale: float
) -> Tensor:
    q_BHD = q_BH1D[:, :, 0]
    return attention_decode(q_BHD, keys, values, base_BK, *visible, scale=scale, sinks=plan.sinks_H)[:, None]
