"""The attention function that transformers calls in place of its own, by the registered name `elastic`.

The registry is the process's, so a model chooses by name and nothing is ever registered again: models whose layers are
compiled take `elastic_compiled`, the same function closed to the compiler. The others do not pay for its wrapper
(some microseconds a call).
"""

from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from elastic.cache.decode_attention import decode_attention
from elastic.cache.elastic_cache import ElasticCache
from elastic.model.families import RoutedAttention
from elastic.model.layer_hooks import CALL, COMPILED, IMPLEMENTATION, decide_after_rope
from elastic.model.layer_types import has_sinks
from elastic.model.pass_state import ForwardPass, LayerCall, PendingCall
from elastic.model.sliding_attention import attend_as_stock

SINKS = "s_aux"  # transformers' keyword

__all__ = ["COMPILED", "IMPLEMENTATION", "attention_function", "register"]


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
    call = kwargs.get(CALL)
    if isinstance(call, ForwardPass):  # as it came to a layer without a router
        options = {name: value for name, value in kwargs.items() if name != CALL}
        return attend_as_stock(
            module, query, key, value, attention_mask, call, scaling=scaling, dropout=dropout, **options
        )
    if not isinstance(call, LayerCall | PendingCall):
        raise ValueError(
            "attention implementation 'elastic' was chosen without routers; call elastic.attach(model, config)"
        )
    if torch.is_autocast_enabled(query.device.type):  # RoPE and norms leave queries and keys in fp32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys = call.of_pass.layout.keys  # a static cache hands out its whole allocation
    if isinstance(call, PendingCall):
        call = decide_after_rope(cast(RoutedAttention, module), query, key[:, :, :keys], scale, call)
    if kwargs.get(SINKS) is not None:
        call = _with_sinks(call, kwargs[SINKS])
    plan, elastic = call.plan, call.cache if isinstance(call.cache, ElasticCache) else None
    if plan.layout.decoding and (elastic is not None or not torch.is_grad_enabled()):
        stored = None if elastic is None else elastic.stored(call.layer)
        return decode_attention(query, key, value, plan, scale, stored), None
    found = call.of_pass.row_slice.attend(query, key[:, :, :keys], value[:, :, :keys], call.route_NK, plan, scale)
    call.remember_density(found.density)
    return found.output, None


def _with_sinks(call: LayerCall, sinks_H: Tensor) -> LayerCall:
    """The call with the attention sinks of its layer's query heads in its plan."""
    if call.of_pass.row_slice.size > 1:
        raise ValueError(
            "context parallelism does not know attention sinks, of which every slice of a row would take a share; "
            "train this backbone with DDP or FSDP"
        )
    return replace(call, plan=replace(call.plan, sinks_H=sinks_H))


def same_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The 2-D mask as it came: the layout carries padding and packing, and no [S, S] mask is ever built for the whole
    batch. With a compileable cache `generate` asks for the mask before the decoder does, which must still see it. That
    of sliding layers, which say a `local_size`, is the stock model's.
    """
    if kwargs.get("local_size") is None:
        return attention_mask
    from transformers.masking_utils import eager_mask, sdpa_mask

    make: Any = eager_mask if has_sinks(kwargs.get("config")) else sdpa_mask
    found: Tensor | None = make(attention_mask=attention_mask, **kwargs)
    return found


@cache
def register() -> None:
    """Make the attention function known to transformers, once in a process."""
    from transformers import AttentionInterface, AttentionMaskInterface

    closed: Any = torch.compiler.disable(attention_function)
    for name, function in ((IMPLEMENTATION, attention_function), (COMPILED, closed)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, same_mask)
