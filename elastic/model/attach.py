"""Attach attention routers to a frozen Hugging Face causal LM from outside, and detach them again (spec section 6).

Nothing is copied, subclassed or patched: a pre-hook on the decoder lays out the samples of the batch, a pre-hook on
every attention module routes them, and an attention function registered with transformers runs the head plan. Decisions
of a generation live on its KV cache, so interleaved requests never mix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from elastic.attention.row_slice import RowSlice
from elastic.cache.route_record import RouteRecord, route_of
from elastic.config import ElasticConfig, SparseConfig
from elastic.model.attention_function import IMPLEMENTATION, register
from elastic.model.chunking import chunk, unchunk
from elastic.model.families import FAMILIES, attention_layers
from elastic.model.layer_hooks import Handle, PassRoutes
from elastic.routing.router import Router, build_router

__all__ = [
    "FAMILIES",
    "PassRoutes",
    "RouteRecord",
    "attach",
    "biased",
    "detach",
    "elastic_config",
    "is_attached",
    "last_routes",
    "override_routes",
    "pooled_keys",
    "route_of",
    "routers",
    "set_config",
    "set_row_slice",
    "set_temperature",
    "update_statistics",
]

HANDLE = "_elastic_handle"


def attach(model: Any, config: ElasticConfig | None = None) -> Any:
    """Give every attention layer of `model` a router, freeze the backbone, and run attention by head plan. Works in
    place.

    Args:
        model: a transformers causal LM of one of `FAMILIES`, on any device and dtype; routers stay fp32.
        config: router and pattern settings; default `ElasticConfig()`.

    Returns:
        The same model. With all heads on full attention its outputs equal the stock model's bit for bit on the CPU.

    Raises:
        ValueError: a model that is attached already or uses something unsupported.
    """
    config = config or ElasticConfig()
    if is_attached(model):
        raise ValueError("this model already has routers; call elastic.detach(model) first")
    layers = attention_layers(model)
    register()
    handle = Handle(model, config)
    for attn in layers:
        weight = attn.k_proj.weight
        router = build_router(weight.shape[0] // attn.head_dim, attn.head_dim, config.router)
        attn.router = router.to(weight.device).train(model.training)
        handle.hooks.append(attn.register_forward_pre_hook(handle.before_attention, with_kwargs=True))
    chunk(model.get_decoder(), handle.chunk_tokens)
    handle.hooks.append(model.get_decoder().register_forward_pre_hook(handle.before_decoder, with_kwargs=True))
    model.set_attn_implementation(IMPLEMENTATION)
    setattr(model, HANDLE, handle)
    return model


def detach(model: Any) -> Any:
    """Remove the routers and restore the stock model exactly, `requires_grad` flags included."""
    handle = handle_of(model)
    for hook in handle.hooks:
        hook.remove()
    for attn in handle.attention_layers(model):
        del attn.router
    unchunk(model.get_decoder())
    for part in handle.compiled:
        del part.forward
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(handle.trainable[name])
    model.set_attn_implementation(handle.implementation)
    delattr(model, HANDLE)
    return model


def is_attached(model: Any) -> bool:
    """Whether `attach` was called on this model."""
    return hasattr(model, HANDLE)


def elastic_config(model: Any) -> ElasticConfig:
    """The configuration the model was attached with."""
    return handle_of(model).routing.config


def set_config(model: Any, config: ElasticConfig) -> None:
    """Replace settings that need no new routers: sparsity bias, decoding, pattern sizes."""
    if config.router != elastic_config(model).router:
        raise ValueError(
            f"router settings are fixed at attach ({elastic_config(model).router}); detach and attach again"
        )
    handle_of(model).routing.config = config


def set_row_slice(model: Any, row_slice: RowSlice) -> RowSlice:
    """Say which part of each row this process holds; returns what was set before."""
    state = handle_of(model).routing
    previous, state.row_slice = state.row_slice, row_slice
    return previous


def routers(model: Any) -> list[Router]:
    """The routers in layer order."""
    return [attn.router for attn in handle_of(model).attention_layers(model)]


def last_routes(model: Any) -> PassRoutes:
    """What the routers decided in the last forward pass of this model (for training and tests; generation:
    `route_of(cache)`).

    Raises:
        RuntimeError: no forward pass yet, or one whose routes lost their gradient to reentrant checkpointing.
    """
    states = [router.last for router in routers(model)]
    lengths = handle_of(model).routing.lengths_N
    if lengths is None or any(state is None for state in states):
        raise RuntimeError("no routes yet: run a forward pass of the attached model first")
    state = PassRoutes.stack([state for state in states if state is not None], lengths)
    if state.logits is not None and model.training and torch.is_grad_enabled() and not state.route.requires_grad:
        raise RuntimeError(
            "the routes of the last forward pass have no gradient: it ran under torch.no_grad or reentrant gradient "
            "checkpointing; use gradient_checkpointing_enable({'use_reentrant': False})"
        )
    return state


@contextmanager
def override_routes(model: Any, route: int | Tensor | None, sparse: SparseConfig | None = None) -> Iterator[None]:
    """Inside the context, use these routes instead of the routers' decisions.

    Args:
        route: 0 (every head in route 0's mode), 1, a tensor [L, K] or [L, N, K] in {0, 1}, or None for the routers'
            own.
        sparse: modes and pattern sizes inside the context; default the model's own.

    Raises:
        ValueError: a tensor of another shape, or values other than 0 and 1.
    """
    state = handle_of(model).routing
    state.check_override(route, len(routers(model)), routers(model)[0].kv_heads)
    previous, config = state.override, state.config
    state.override, state.config = route, replace(config, sparse=sparse or config.sparse)
    try:
        yield
    finally:
        state.override, state.config = previous, config


@contextmanager
def biased(model: Any, sparsity_bias: float | None) -> Iterator[None]:
    """Inside the context, routers decide with this `sparsity_bias`; None leaves the configuration's."""
    if sparsity_bias is None:
        yield
        return
    config = elastic_config(model)
    set_config(model, replace(config, sparsity_bias=sparsity_bias))
    try:
        yield
    finally:
        set_config(model, config)


def set_temperature(model: Any, temperature: float) -> None:
    """Temperature of the Gumbel-softmax that samples routes while the model is in training mode."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not positive; the annealing must end above 0 (tau_min)")
    handle_of(model).routing.temperature = temperature


def pooled_keys(model: Any) -> Tensor:
    """Pooled keys [L, N, K, D] that the last forward pass was routed on.

    Raises:
        RuntimeError: no forward pass yet, or one whose routes were given by `override_routes`.
    """
    pooled = [None if router.last is None else router.last.pooled_NKD for router in routers(model)]
    if any(keys is None for keys in pooled):
        raise RuntimeError("no routes yet: run a forward pass of the attached model, outside override_routes")
    return torch.stack([keys for keys in pooled if keys is not None])


def update_statistics(model: Any, pooled_LNKD: Tensor) -> None:
    """Fold pooled keys, as `pooled_keys` returns them, into the routers' running statistics; call once per step."""
    for router, pooled_NKD in zip(routers(model), pooled_LNKD, strict=True):
        router.update_statistics(pooled_NKD)


def handle_of(model: Any) -> Handle:
    if not is_attached(model):
        raise ValueError("this model has no routers; call elastic.attach(model, config) or elastic.load(path) first")
    return getattr(model, HANDLE)
