"""What happens in a layer before its attention: reuse, override or take a routing decision, and remember it where it
belongs.

A decision taken with a KV cache is stored on the cache object; the router itself only keeps the last decision for
training and tests.
Legend: L layers, N samples, B rows, S tokens, K KV heads, D head dim, P pooled tokens at either end of the prompt, E
hidden size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import Layout, batch_layout, decode_layout, packed_layout
from elastic.attention.row_slice import RowSlice
from elastic.cache.elastic_cache import ElasticCache
from elastic.cache.route_record import RouteRecord, find_record, new_record, route_of
from elastic.config import ElasticConfig
from elastic.model.families import prerope_keys
from elastic.routing.decision import decide_from_keys
from elastic.routing.pooling import Pooling
from elastic.routing.router import Decision


@dataclass(frozen=True)
class PassRoutes:
    """Decisions of one forward pass.

    Attributes:
        route: [L, N, K] in {0, 1}, with the straight-through gradient in training.
        logits: [L, N, K, 2], route 0 first; None when the routes were given from outside.
        lengths: int64 [N]; tokens of each sample.
        density: float64 [L, N, K]; share of the visible pairs that XAttention heads visited
            (`elastic.attention.block_selection`). None if the configuration has no such heads.
    """

    route: Tensor
    logits: Tensor | None
    lengths: Tensor
    density: Tensor | None = None

    @classmethod
    def stack(cls, states: list[Decision], lengths: Tensor) -> "PassRoutes":
        """Collect the layers' states."""
        route = torch.stack([state.route_NK for state in states])
        logits = [state.logits_NK2 for state in states if state.logits_NK2 is not None]
        density = [state.density_NK for state in states if state.density_NK is not None]
        return cls(
            route,
            torch.stack(logits) if len(logits) == len(states) else None,
            lengths,
            torch.stack(density) if len(density) == len(states) else None,
        )


class AttachedState:
    """State shared by the hooks of one attached model.

    Attributes:
        config: the model's configuration.
        override: routes given by `override_routes`, or None.
        temperature: of the Gumbel-softmax in training.
        row_slice: which part of the rows is here.
        lengths_N: tokens of the samples of the last forward pass.
        fused: whether the router may run as one kernel where it can; tests and timings compare both ways.
    """

    def __init__(self, config: ElasticConfig) -> None:
        self.config = config
        self.override: int | Tensor | None = None
        self.temperature = 1.0
        self.row_slice = RowSlice()
        self.lengths_N: Tensor | None = None
        self.fused = True

    def lay_out(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords for the layers: `elastic_layout` in place of this project's own batch keywords."""
        kwargs = dict(kwargs)
        tokens = next(
            (t for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None
        )
        if tokens is None:
            raise ValueError("the model was called without input_ids and inputs_embeds; pass one of them")
        rows, queries = tokens.shape[0], tokens.shape[1] * self.row_slice.size
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        bounds, spans = kwargs.pop("cu_seq_lens", None), kwargs.pop("prompt_spans", None)
        prompt_end = None if spans is None else _prompt_end(spans)
        record = find_record(cache)
        if past and queries == 1 and bounds is None and record is not None and record.layout is not None:
            layout = decode_layout(record.layout, rows, past, mask)
            kwargs["elastic_modes"] = record.modes(self.override, self.config.dense_decode, self.config.sparse)
        elif bounds is not None:
            if rows != 1 or past or mask is not None:
                raise ValueError(
                    f"packed input (cu_seq_lens) came with {rows} rows, {past} cached tokens and "
                    f"{'an' if mask is not None else 'no'} attention_mask; expected one row, no cache, no mask"
                )
            layout = packed_layout(bounds, prompt_end, queries, tokens.device)
        elif self.row_slice.size > 1:
            raise ValueError(
                "a slice of a sequence came without cu_seq_lens; under context_parallel, pass packed rows by "
                "elastic.training.context_parallel.shard"
            )
        else:
            layout = batch_layout(rows, queries, past, tokens.device, mask, prompt_end)
        if prompt_end is not None:
            _check_prompts(layout, spans)
        self.lengths_N = torch.tensor(layout.bounds).diff() if layout.bounds else layout.end_N - layout.begin_N
        kwargs["elastic_layout"] = layout
        return kwargs

    def check_override(self, route: int | Tensor | None, num_layers: int, kv_heads: int) -> None:
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


class Handle:
    """What `attach` must remember: how to undo itself, and the routing state its hooks share."""

    def __init__(self, model: Any, config: ElasticConfig) -> None:
        self.implementation = model.config._attn_implementation
        self.trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.hooks: list[Any] = []
        self.compiled: list[Any] = []
        self.routing = AttachedState(config)
        model.requires_grad_(False)

    def attention_layers(self, model: Any) -> list[Any]:
        return [layer.self_attn for layer in model.get_decoder().layers]

    def chunk_tokens(self) -> int:
        """Tokens that an MLP or norm works on at a time."""
        return self.routing.config.chunk_tokens

    def before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Lay out the batch's samples once per forward pass and hand the layout to the layers as a keyword."""
        kwargs, cache = self.routing.lay_out(args, kwargs), kwargs.get("past_key_values")
        if isinstance(cache, ElasticCache):
            cache.begin_pass(kwargs.get("elastic_modes"), self.routing.override, self.routing.config)
        return args, kwargs

    def before_attention(self, attn: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Route the layer's heads and hand the route to the attention function as a keyword."""
        hidden = args[0] if args else kwargs["hidden_states"]
        layout = kwargs.get("elastic_layout")
        if layout is None:
            raise ValueError("this layer was called outside the attached model's decoder; call the whole model")
        routing, cache, modes = self.routing, kwargs.get("past_key_values"), kwargs.get("elastic_modes")
        elastic = cache if isinstance(cache, ElasticCache) else None
        if modes is not None:
            plan = HeadPlan(modes[attn.layer_idx], routing.config.sparse, layout)
            route = plan.mode_NK
        else:
            dropped = None if elastic is None else elastic.dropped(attn.layer_idx)
            route = route_layer(attn, hidden, layout, cache, routing, dropped)
            state, config = attn.router.last, routing.config
            mode = None if state is None or state.route_NK is not route else state.mode_NK
            plan = HeadPlan.build(route, config.sparse, layout, config.gradient_share, mode)
        if elastic is not None:
            elastic.layers[attn.layer_idx].plan = plan
        own = {"elastic_route": route, "elastic_plan": plan, "elastic_context": routing.row_slice}
        return args, {**kwargs, **own, "elastic_cache": cache}


def route_layer(
    attn: Any, hidden_BSE: Tensor, layout: Layout, cache: Any, routing: AttachedState, dropped_NK: Tensor | None = None
) -> Tensor:
    """Route [N, K] of one layer for a prompt or a new turn: given from outside, or decided from the layer's own keys.

    Args:
        dropped_NK: bool; heads whose cached keys allow streaming attention only.
    """
    router, samples = attn.router, layout.row_N.shape[0]
    record = _record(cache, layout, attn.layer_idx)
    if routing.override is not None:
        route = _given(routing.override, attn.layer_idx, samples, router.kv_heads, hidden_BSE.device)
        router.last = Decision(route, None, None)
    else:
        router.last = _decide(attn, hidden_BSE, layout, routing, record)
        route = router.last.route_NK
    if dropped_NK is not None:
        route = torch.where(dropped_NK, float(routing.config.sparse.route1 == "streaming"), route)
        router.last = replace(router.last, route_NK=route, mode_NK=None)
    if record is not None:
        record.set_route(attn.layer_idx, route)
        record.layout, record.override = layout, routing.override
    return route.to(hidden_BSE.device)


def remember_density(attn: Any, density_NK: Tensor | None, cache: Any) -> None:
    """Keep what a prefill's XAttention heads visited beside the decision it belongs to."""
    if density_NK is not None:
        attn.router.last = replace(attn.router.last, density_NK=density_NK)
        if cache is not None:
            route_of(cache).densities[attn.layer_idx] = density_NK


def _decide(
    attn: Any, hidden_BSE: Tensor, layout: Layout, routing: AttachedState, record: RouteRecord | None
) -> Decision:
    """The router's decision on the prompt's boundaries. On a later turn the first P keys come from the record, the
    last P from the new tokens.
    """
    pooled_N = record.pooled_N if record is not None and layout.past else None
    pool_tokens, here = routing.config.router.pool_tokens, hidden_BSE.shape[1]
    pooling = Pooling.shared(layout, pool_tokens, here, routing.row_slice, pooled_N)
    keys = prerope_keys(attn, hidden_BSE.flatten(0, 1).index_select(0, pooling.token_M))
    earlier = record.heads.get(attn.layer_idx) if record is not None and layout.past else None
    state, first = decide_from_keys(
        attn.router, keys.unflatten(0, pooling.weight_N2P.shape), pooling, routing.config, earlier,
        row_slice=routing.row_slice, temperature=routing.temperature, fused=routing.fused,
    )  # fmt: skip
    if record is not None:
        record.heads[attn.layer_idx], record.pooled_N = first.detach(), pooling.first_N
    return state


def _record(cache: Any, layout: Layout, layer: int) -> RouteRecord | None:
    """The cache's record, created at its first prefill."""
    if cache is None:
        return None
    record = find_record(cache)
    if layout.past == 0:
        if record is None or layer == 0:
            record = new_record(cache)
    elif record is None or layer not in record.layers:
        raise ValueError(
            f"the cache holds {layout.past} tokens but no route for layer {layer}; it was filled by a model without "
            "routers: "
            "start from an empty cache"
        )
    return record


def _given(route: int | Tensor, layer: int, samples: int, kv_heads: int, device: torch.device) -> Tensor:
    """The override's route of one layer, fp32 [N, K]."""
    if isinstance(route, Tensor):
        of_layer = route[layer].to(device, torch.float32)
        return of_layer.expand(samples, kv_heads) if of_layer.dim() == 1 else of_layer
    return torch.full((samples, kv_heads), float(route), device=device)


def _prompt_end(spans: Tensor) -> Tensor:
    if spans.dim() != 2 or spans.shape[1] != 2:
        raise ValueError(
            f"prompt_spans has shape {list(spans.shape)}, expected [samples, 2] (start and end of each prompt)"
        )
    return spans[:, 1].to(torch.int64)


def _check_prompts(layout: Layout, spans: Tensor) -> None:
    """Prompts must be the non-empty heads of their samples, one each."""
    samples = layout.row_N.shape[0]
    if spans.shape[0] != samples:
        raise ValueError(f"prompt_spans has {spans.shape[0]} prompts for {samples} samples; expected one each")
    for n, ((_, begin, end), (start, stop)) in enumerate(zip(layout.spans, spans.tolist(), strict=True)):
        if start != begin or not begin < stop <= end:
            raise ValueError(
                f"prompt span [{start}, {stop}) of sample {n} does not fit; its tokens are [{begin}, {end}), and a "
                "prompt "
                "starts with its sample and holds at least one token"
            )
