"""The oracle of the KV caches: every key kept, attention written out under each head's explicit mask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from elastic.attention.head_plan import HeadPlan
from elastic.attention.modes import STREAMING
from elastic.attention.reference import attention
from elastic.attention.routed import Routed
from elastic.attention.row_slice import RowSlice
from elastic.model import attention_function
from elastic.model.attach import set_row_slice
from elastic.visibility import visible


def head_masks(plan: HeadPlan) -> Tensor:
    """Bool [B, K, Lq, Lk]: what every head sees, positions counted from its sample's first valid token."""
    layout, sparse = plan.layout, plan.sparse
    key = torch.arange(layout.keys)
    valid = (key >= layout.begin_N[:, None]) & (key < layout.end_N[:, None])
    position = key - layout.begin_N[:, None]
    query, keys = position[:, layout.past :, None], position[:, None, :]
    rule = {"sink": sparse.sink, "window": sparse.window, "granule": sparse.granule, "block": sparse.block}
    streaming = (plan.mode_NK == STREAMING)[:, :, None, None]
    seen = torch.where(streaming, visible(query, keys, **rule)[:, None], (keys <= query)[:, None])
    return seen & valid[:, None, None, :] & valid[:, None, layout.past :, None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, scale: float) -> Tensor:
    """[B, Lq, H, D] of q [B, H, Lq, D] and the whole cache [B, K, Lk, D]."""
    mask = head_masks(plan).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    if plan.sinks_H is not None:  # a key of its own, whose value is nothing
        scores = q.float() @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).float().transpose(2, 3) * scale
        total = torch.logaddexp(
            scores.masked_fill(~mask, float("-inf")).logsumexp(-1, keepdim=True), plan.sinks_H[:, None, None].float()
        )
        weights = scores.masked_fill(~mask, float("-inf")).sub(total).exp()
        return (weights @ v.repeat_interleave(q.shape[1] // k.shape[1], 1).float()).to(q.dtype).transpose(1, 2)
    return attention(q, k, v, mask, scale).to(q.dtype).transpose(1, 2)


class _Masked(RowSlice):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, route: Tensor, plan: HeadPlan, scale: float) -> Routed:
        return Routed(masked_attention(q, k, v, plan, scale), plan)


@contextmanager
def masked_oracle(model: Any) -> Iterator[None]:
    """Inside the context, an attached model over an ordinary cache is the oracle."""
    previous = set_row_slice(model, _Masked())

    def decode(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, scale: float, stored: Any) -> Tensor:
        assert stored is None, "the oracle keeps every key"
        return masked_attention(q, k, v, plan, scale)

    with patch.object(attention_function, "decode_attention", decode):
        yield
    set_row_slice(model, previous)
