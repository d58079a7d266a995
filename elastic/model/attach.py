"""Attach attention routers to a frozen Hugging Face causal LM from outside, and detach them again (docs/design.md
section 6).

No class is copied, subclassed or patched: a pre-hook on the decoder lays out the samples of the batch, a pre-hook on
every attention module routes them, and an attention function registered with transformers runs the head plan. Decisions
of a generation live on its KV cache, so interleaved requests never mix.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastic.attention.row_slice import RowSlice
from elastic.cache.route_record import RouteRecord, route_of
from elastic.config import ElasticConfig, SparseConfig
from elastic.model.attention_function import IMPLEMENTATION, register
from elastic.model.chunking import give_back
from elastic.model.families import FAMILIES, RoutedAttention, attention_layers
from elastic.model.fusing import fuse
from elastic.model.generation import unwatch, watch
from elastic.model.layer_hooks import before_attention, before_decoder
from elastic.model.layer_types import stock_layers
from elastic.model.linear_attention import keep_linear
from elastic.model.long_rope import keep_cache, keep_no_cache, switch_lengths
from elastic.model.outside import device_of, unwrapped
from elastic.model.pass_state import AttachedState, PassRecord, PassRoutes, forced_on, forcing
from elastic.model.saving import save_as_before, save_backbone_alone
from elastic.model.tensor_parallel import HeadShare, check_routers, head_share
from elastic.protocols import AttentionModule, CausalLM
from elastic.routing.kinds import build_router
from elastic.routing.router import Router

__all__ = [
    "FAMILIES",
    "PassRoutes",
    "RouteRecord",
    "at_level",
    "attach",
    "biased",
    "detach",
    "drawn_by",
    "elastic_config",
    "is_attached",
    "last_features",
    "last_routes",
    "override_routes",
    "route_of",
    "routers",
    "set_config",
    "set_row_slice",
    "set_temperature",
    "update_statistics",
    "user_wrote",
]

HANDLE = "_elastic_handle"
Model = TypeVar("Model", bound=CausalLM)


@dataclass
class Handle:
    """What `attach` must remember: the model's settings, and how to undo itself.

    Attributes:
        state: the settings.
        implementation: attention implementation from before.
        trainable: the parameters from before with their names (of a wrapper's own: none) and `requires_grad`.
        share: which KV heads are here.
        hooks: what removes the hooks.
        compiled: modules that `compile_layers` gave another forward, each with the one of its own that it had, if any.
    """

    state: AttachedState
    implementation: str
    trainable: list[tuple[str, nn.Parameter, bool]]
    share: HeadShare = HeadShare()  # noqa: RUF009 - a tuple
    hooks: list[RemovableHandle] = field(default_factory=list)
    compiled: list[tuple[nn.Module, Any]] = field(default_factory=list)


def attach(model: Model, config: ElasticConfig | None = None) -> Model:
    """Give every layer of full attention of `model` a router, freeze the backbone, and run attention by head plan.
    Works in place. Layers of the backbone's own kinds, sliding or linear, stay as they are.

    Args:
        model: a transformers causal LM of one of `FAMILIES`, on any devices and in any dtype, quantised, offloaded, or
            inside a wrapper such as peft's; routers stay fp32.
        config: router and pattern settings; default `ElasticConfig()`.

    Returns:
        The same model. With all heads on full attention its outputs equal the stock model's bit for bit on the CPU.

    Raises:
        ValueError: a model that is attached already or uses something unsupported. It is left as it was.
    """
    config = config or ElasticConfig()
    if is_attached(model):
        raise ValueError("this model already has routers; call elastic.detach(model) first")
    bare = unwrapped(model)
    layers = attention_layers(bare)
    share = head_share(bare, layers)
    # Not by the weights, which a quantised layer packs or does not have.
    kv_heads = bare.config.num_key_value_heads // share.parts
    devices = [device_of(attn, attn.layer_idx, bare.device) for attn in layers]
    with torch.device("cpu"):  # whose generator draws the same routers under every strategy, on every device
        fresh = [build_router(kv_heads, attn.head_dim, config.router, place) for place, attn in enumerate(layers)]
    made = [router.to(device).train(bare.training) for router, device in zip(fresh, devices, strict=True)]
    check_routers(made, share)
    register()
    named = {id(parameter): name for name, parameter in bare.named_parameters()}  # a wrapper may have more
    trainable = [(named.get(id(parameter), ""), parameter, parameter.requires_grad) for parameter in model.parameters()]
    handle = Handle(AttachedState(config, share.parts), bare.config._attn_implementation, trainable, share)
    handle.state.places = {attn.layer_idx: place for place, attn in enumerate(layers)}
    handle.state.windows, handle.state.rope_switches = stock_layers(bare.config), switch_lengths(bare.config)
    try:
        _install(bare, handle, layers, made)
    except BaseException:
        _undo(bare, handle)
        raise
    setattr(bare, HANDLE, handle)
    return model


def _give_own_config(model: CausalLM) -> None:
    """A copy of the config, which other models may share: the choice of the attention function is written there."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            vars(module)["config"] = own


def _install(model: CausalLM, handle: Handle, layers: list[AttentionModule], made: list[Router]) -> None:
    _give_own_config(model)
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"{type(model).__name__} kept attention implementation {model.config._attn_implementation!r}; expected a "
            "model whose attention goes through transformers' AttentionInterface"
        )
    for _, parameter, _ in handle.trainable:
        parameter.requires_grad_(False)
    for attn, router in zip(layers, made, strict=True):
        attn.add_module("router", router)
        handle.hooks.append(attn.register_forward_pre_hook(before_attention, with_kwargs=True))
    watch(model, handle.state)
    save_backbone_alone(model)
    keep_cache(model, handle.state.rope_switches)
    decoder = model.get_decoder()
    fuse(decoder, handle.state)
    keep_linear(decoder, handle.state.windows)
    hook = partial(before_decoder, handle.state)
    handle.hooks.append(decoder.register_forward_pre_hook(hook, with_kwargs=True))


def detach(model: Model) -> Model:
    """Remove the routers and restore the stock model exactly: hooks, forwards, attention implementation and
    `requires_grad` flags.
    """
    handle, bare = handle_of(model), unwrapped(model)
    _undo(bare, handle)
    delattr(bare, HANDLE)
    return model


def _undo(model: CausalLM, handle: Handle) -> None:
    """Take back whatever `attach` and `compile_layers` have done so far."""
    for hook in handle.hooks:
        hook.remove()
    for part, before in handle.compiled:
        del part.forward
        if before is not None:
            part.forward = before
    unwatch(model)
    save_as_before(model)
    keep_no_cache(model)
    give_back(model.get_decoder())
    for layer in model.get_decoder().layers:
        attn: Any = getattr(layer, "self_attn", None)
        if attn is not None:
            attn._modules.pop("router", None)
    # An adapter renames what it wraps, and sharding replaces it under its name; what came later keeps its flag.
    now = dict(model.named_parameters())
    for name, parameter, flag in handle.trainable:
        parameter.requires_grad_(flag)
        if name in now:
            now[name].requires_grad_(flag)
    model.set_attn_implementation(handle.implementation)


def is_attached(model: CausalLM) -> bool:
    """Whether `attach` was called on this model, by itself or in a wrapper."""
    return hasattr(unwrapped(model), HANDLE)


def is_reading(model: CausalLM) -> bool:
    """Whether `generate` is reading a prompt in pieces, in this thread (or asyncio task)."""
    return forced_on(handle_of(model).state).prompt_end is not None


def elastic_config(model: CausalLM) -> ElasticConfig:
    """The configuration in force: the model's, with what `override_routes` and `biased` force in this thread."""
    return handle_of(model).state.config_in_force()


def set_config(model: CausalLM, config: ElasticConfig) -> None:
    """Replace settings that need no new routers, for all threads: sparsity bias, decoding, pattern sizes.

    Raises:
        ValueError: other router settings, or a call inside `biased` or an `override_routes` that gives pattern sizes,
            whose values would become the model's.
    """
    state = handle_of(model).state
    if config.router != state.config.router:
        raise ValueError(f"router settings are fixed at attach ({state.config.router}); detach and attach again")
    forced = forced_on(state)
    if forced.bias is not None or forced.sparse is not None:
        raise ValueError(
            "set_config was called where biased or override_routes(..., sparse) is in force, so what is temporary here "
            "would become the model's own; leave that context first"
        )
    state.config = config


def set_row_slice(model: CausalLM, row_slice: RowSlice) -> RowSlice:
    """Say which part of each row this process holds; returns what was set before."""
    state = handle_of(model).state
    previous, state.row_slice = state.row_slice, row_slice
    return previous


def routers(model: CausalLM) -> list[Router]:
    """The routers in layer order; layers of the backbone's own kinds, sliding or linear, have none."""
    places, layers = handle_of(model).state.places, model.get_decoder().layers
    return [cast(RoutedAttention, layers[layer].self_attn).router for layer in places]


def last_routes(model: CausalLM) -> PassRoutes:
    """What the routers decided in this thread's last forward pass of this model that was not a decode step (for
    training and tests; generation: `route_of(cache)`).

    Raises:
        RuntimeError: no forward pass yet, or one whose routes lost their gradient to reentrant checkpointing.
    """
    routes = _last_record(model).routes()
    if routes.logits is not None and model.training and torch.is_grad_enabled() and not routes.route.requires_grad:
        raise RuntimeError(
            "the routes of the last forward pass have no gradient: it ran under torch.no_grad or reentrant gradient "
            "checkpointing; use gradient_checkpointing_enable({'use_reentrant': False})"
        )
    return routes


@contextmanager
def override_routes(model: CausalLM, route: int | Tensor | None, sparse: SparseConfig | None = None) -> Iterator[None]:
    """Inside the context, use these routes instead of the routers' decisions, in this thread (or asyncio task) alone.

    Args:
        route: 0 (every head in route 0's mode), 1, a tensor [L, K] or [L, N, K] in {0, 1}, or None for the routers'
            own.
        sparse: modes and pattern sizes inside the context; default those in force.

    Raises:
        ValueError: a tensor of another shape, or values other than 0 and 1.
    """
    handle, own = handle_of(model), routers(model)
    state, all_heads = handle.state, own[0].kv_heads * handle.share.parts
    _check_override(route, len(own), all_heads)
    if isinstance(route, Tensor):
        route = route[..., handle.share.mine(all_heads)]
    forced = forced_on(state)
    with forcing(state, replace(forced, route=route, sparse=sparse or forced.sparse)):
        yield


@contextmanager
def biased(model: CausalLM, sparsity_bias: float | None) -> Iterator[None]:
    """Inside the context, routers decide with this `sparsity_bias`, in this thread (or asyncio task) alone; None leaves
    what is in force.

    Raises:
        ValueError: a bias that is not a finite number.
    """
    state = handle_of(model).state
    forced = forced_on(state)
    changed = replace(forced, bias=forced.bias if sparsity_bias is None else sparsity_bias)
    changed.applied_to(state.config)  # refuses what the configuration refuses
    with forcing(state, changed):
        yield


@contextmanager
def at_level(model: CausalLM, level: float | Tensor | None) -> Iterator[None]:
    """Inside the context, level routers run every sample at this share of the order, in this thread (or asyncio task)
    alone, and still say what they would have expected; None leaves the decision to them.

    Args:
        level: an MSR, or one for each sample [N].

    Raises:
        ValueError: routers of another kind, or a level outside [0, 1].
    """
    state = handle_of(model).state
    if state.config.router.kind != "level":
        raise ValueError(f"at_level needs routers of kind level, not {state.config.router.kind}; use override_routes")
    level_N = None if level is None else torch.atleast_1d(torch.as_tensor(level, dtype=torch.float32))
    if level_N is not None and not bool(((level_N >= 0) & (level_N <= 1)).all()):
        raise ValueError(f"level={level!r} is outside [0, 1]; it is a share of all heads")
    with forcing(state, replace(forced_on(state), level_N=level_N)):
        yield


@contextmanager
def user_wrote(model: CausalLM, spans_B2: Tensor | None) -> Iterator[None]:
    """Inside the context, prompts are read with the users' words in these places, in this thread (or asyncio task)
    alone; for `model.generate`, which takes no `user_spans` of its own. None leaves what is in force.

    Args:
        spans_B2: int64 [B, 2], first and last + 1 position in the padded rows.
    """
    state = handle_of(model).state
    forced = forced_on(state)
    with forcing(state, replace(forced, user_spans=forced.user_spans if spans_B2 is None else spans_B2)):
        yield


def set_temperature(model: CausalLM, temperature: float) -> None:
    """Temperature of the Gumbel-softmax that samples routes while the model is in training mode."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not positive; the annealing must end above 0 (tau_min)")
    handle_of(model).state.temperature = temperature


@contextmanager
def drawn_by(model: CausalLM, gumbel_LNK2: Tensor) -> Iterator[None]:
    """Inside the context, routes of a model in training mode are drawn by this noise, in this thread alone.

    Args:
        gumbel_LNK2: Gumbel(0, 1) noise [L, N, K, 2] for the N samples of the passes to come.
    """
    state = handle_of(model).state
    with forcing(state, replace(forced_on(state), gumbel_LNK2=gumbel_LNK2)):
        yield


def last_features(model: CausalLM) -> list[Tensor]:
    """What the pass of `last_routes` was routed on, by layer: pooled keys [N, K, D], or the features [N, F] of level
    routers, which are more from layer to layer.

    Raises:
        RuntimeError: no forward pass yet, or one whose routes were given by `override_routes`.
    """
    decisions = _last_record(model).decisions
    found = [
        features for features in (decisions[layer].features for layer in sorted(decisions)) if features is not None
    ]
    if len(found) < len(decisions):
        raise RuntimeError("no routes yet: run a forward pass of the attached model, outside override_routes")
    return found


def update_statistics(model: CausalLM, features: Iterable[Tensor]) -> None:
    """Fold what `last_features` returns into the routers' running statistics; call once per step."""
    for router, of_layer in zip(routers(model), features, strict=True):
        router.update_statistics(of_layer)


def handle_of(model: CausalLM) -> Handle:
    if not is_attached(model):
        raise ValueError("this model has no routers; call elastic.attach(model, config) or elastic.load(path) first")
    handle: Handle = getattr(unwrapped(model), HANDLE)
    return handle


def _last_record(model: CausalLM) -> PassRecord:
    """Record of this thread's last pass that decided routes in all layers."""
    record = handle_of(model).state.last.record
    if record is None or len(record.decisions) < len(routers(model)):
        raise RuntimeError("no routes yet: run a forward pass of the attached model first, in this thread")
    return record


def _check_override(route: int | Tensor | None, num_layers: int, kv_heads: int) -> None:
    """Raise ValueError unless `route` is None, 0, 1, or 0/1-valued [L, K] or [L, N, K]."""
    if isinstance(route, Tensor):
        fits = route.dim() in (2, 3) and (route.shape[0], route.shape[-1]) == (num_layers, kv_heads)
        if not fits:
            raise ValueError(
                f"routes of shape {list(route.shape)} do not fit; expected [{num_layers}, {kv_heads}] or "
                f"[{num_layers}, samples, {kv_heads}] (layers, KV heads)"
            )
        if not bool(((route == 0) | (route == 1)).all()):
            raise ValueError("routes hold values other than 0 (route 0's mode) and 1 (route 1's mode)")
    elif route is not None and route not in (0, 1):
        raise ValueError(f"route={route!r}; expected 0, 1, a tensor of 0 and 1, or None")
