"""The attention function that transformers calls in place of its own, by the registered name `elastic`."""

from typing import Any

import torch
from torch import Tensor, nn

from elastic.cache.decode_attention import decode_attention
from elastic.cache.elastic_cache import ElasticCache
from elastic.model.layer_hooks import remember_density

IMPLEMENTATION = "elastic"


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q [B, H, Lq, D], k and v [B, K, Lk, D] after RoPE -> [B, Lq, H, D]."""
    plan, route, context = (kwargs.get(f"elastic_{name}") for name in ("plan", "route", "context"))
    if plan is None or route is None or context is None:
        raise ValueError(
            "attention implementation 'elastic' was chosen without routers; call elastic.attach(model, config)"
        )
    if torch.is_autocast_enabled(query.device.type):  # RoPE and norms leave queries and keys in fp32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache: Any = kwargs.get("elastic_cache")
    elastic = isinstance(cache, ElasticCache)
    if plan.layout.decoding and (elastic or not torch.is_grad_enabled()):
        stored = cache.stored(module.layer_idx) if elastic else None
        return decode_attention(query, key, value, plan, scale, stored), None
    keys = plan.layout.keys  # a static cache hands out its whole allocation
    out, density = context.attend(query, key[:, :, :keys], value[:, :, :keys], route, plan, scale)
    remember_density(module, density, cache)
    return out, None


def no_mask(**kwargs: Any) -> None:
    """The layout carries padding and packing; no [S, S] mask is ever built for the whole batch."""


def register(attention: Any = attention_function) -> None:
    """Make the attention function known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)
