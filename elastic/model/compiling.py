"""`compile_layers`: torch.compile around routing and attention."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from elastic.cache.keyword import cache_of
from elastic.model.attach import Model, handle_of
from elastic.model.attention_function import COMPILED
from elastic.model.chunking import Chunked, give_back
from elastic.model.linear_attention import StockLinear


def compile_layers(model: Model, **settings: Any) -> Model:
    """`torch.compile` what surrounds attention in every decoder layer (norms, projections, RoPE, MLP), in place.

    Routing and attention, linear attention too, stay outside, where the kernels are launched as before. Works under
    training, gradient checkpointing and for any sequence length; `detach` undoes it. Where a KV cache comes along, only
    MLPs and norms run compiled: a cache talks to the host, and the number of the layer that it wants would make each
    layer a graph.

    Args:
        settings: of `torch.compile`, such as `backend` or `mode`; `dynamic=True` unless given.
    """
    handle, settings = handle_of(model), {"dynamic": True, **settings}
    model.set_attn_implementation(COMPILED)
    # Parts of a layer, because checkpointing a compiled layer would not compile it; and their forward alone, because
    # the hook that routes is not for the compiler.
    done = {part for part, _ in handle.compiled}
    for layer in model.get_decoder().layers:
        for part in layer.children():
            if part in done or isinstance(part.forward, StockLinear):
                continue
            if isinstance(part.forward, Chunked):
                part.forward.compile(**settings)
            else:
                give_back(part)  # a chunked norm inside would make every layer a graph of its own
                handle.compiled.append((part, vars(part).get("forward")))
                part.forward = _compiled_without_cache(part.forward, settings)
    return model


def _compiled_without_cache(plain: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, **settings)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if cache_of(kwargs, args) is None else plain)(*args, **kwargs)

    return forward
