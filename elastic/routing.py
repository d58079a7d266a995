"""What happens in a layer before its attention: reuse, override or take a routing decision, and remember it where it
belongs.

A decision taken with a KV cache is stored on the cache object; the router itself only keeps the last decision for
training and tests.
Legend: L layers, N samples, B rows, S tokens, K KV heads, D head dim, P pooled tokens at either end of the prompt, E
hidden size.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from elastic.config import ElasticConfig
from elastic.context import Context
from elastic.deciding import Pooling, decide_from_keys, prerope_keys
from elastic.head_plan import Layout, batch_layout, packed_layout
from elastic.router import LayerState

_RECORD = "_elastic_record"


@dataclass
class RouteRecord:
    """Decisions of one generation, kept on its KV cache.

    Attributes:
        layers: route [N, K] by layer.
        heads: by layer, sum [N, K, D] of the conversation's first P keys, for routing a later turn.
        prompt_lengths: int64 [N]; tokens of the prompt that the routes were decided on.
        densities: by layer, what XAttention heads visited [N, K], see `elastic.selection.density`.
    """

    layers: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    prompt_lengths: Tensor | None = None
    densities: dict[int, Tensor] = field(default_factory=dict)

    @property
    def route(self) -> Tensor:
        """int8 [L, N, K] on the CPU."""
        return torch.stack([self.layers[i].cpu() for i in sorted(self.layers)])

    @property
    def density(self) -> Tensor | None:
        """float64 [L, N, K] on the CPU; None if the configuration has no XAttention heads."""
        return torch.stack([self.densities[i].cpu() for i in sorted(self.densities)]) if self.densities else None


@dataclass(frozen=True)
class RoutingState:
    """Decisions of one forward pass.

    Attributes:
        route: [L, N, K] in {0, 1}, with the straight-through gradient in training.
        logits: [L, N, K, 2], route 0 first; None when the routes were given from outside.
        lengths: int64 [N]; tokens of each sample.
        density: float64 [L, N, K]; share of the visible pairs that XAttention heads visited (`elastic.selection`).
            None if the configuration has no such heads.
    """

    route: Tensor
    logits: Tensor | None
    lengths: Tensor
    density: Tensor | None = None

    @classmethod
    def stack(cls, states: list[LayerState], lengths: Tensor) -> "RoutingState":
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


def route_of(cache: Any) -> RouteRecord:
    """The decisions stored on a KV cache by the prefill that filled it.

    Raises:
        ValueError: a cache that no attached model filled.
    """
    record = getattr(cache, _RECORD, None)
    if record is None:
        raise ValueError(f"this {type(cache).__name__} holds no routes; it was not filled by a model with routers")
    return record


class Routing:
    """State shared by the hooks of one attached model.

    Attributes:
        config: the model's configuration.
        override: routes given by `override_routes`, or None.
        temperature: of the Gumbel-softmax in training.
        context: which part of the rows is here.
        lengths_N: tokens of the samples of the last forward pass.
        fused: whether the router may run as one kernel where it can; tests and timings compare both ways.
    """

    def __init__(self, config: ElasticConfig) -> None:
        self.config = config
        self.override: int | Tensor | None = None
        self.temperature = 1.0
        self.context = Context()
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
        rows, queries = tokens.shape[0], tokens.shape[1] * self.context.size
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        bounds, spans = kwargs.pop("cu_seq_lens", None), kwargs.pop("prompt_spans", None)
        prompt_end = None if spans is None else _prompt_end(spans)
        if bounds is not None:
            if rows != 1 or past or mask is not None:
                raise ValueError(
                    f"packed input (cu_seq_lens) came with {rows} rows, {past} cached tokens and "
                    f"{'an' if mask is not None else 'no'} attention_mask; expected one row, no cache, no mask"
                )
            layout = packed_layout(bounds, prompt_end, queries, tokens.device)
        elif self.context.size > 1:
            raise ValueError(
                "a slice of a sequence came without cu_seq_lens; under context_parallel, pass packed rows by "
                "elastic.context_parallel.shard"
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


def route_layer(attn: Any, hidden_BSE: Tensor, layout: Layout, cache: Any, routing: Routing) -> Tensor:
    """Route [N, K] of one layer: given from outside, reused while decoding, or decided from the layer's own keys."""
    router, samples = attn.router, layout.row_N.shape[0]
    record = _record(cache, layout, attn.layer_idx)
    decided = None if record is None else record.layers.get(attn.layer_idx)
    decoding = decided is not None and layout.past > 0 and layout.queries == 1
    if routing.override is not None:
        route = _given(routing.override, attn.layer_idx, samples, router.kv_heads, hidden_BSE.device)
        if not decoding:
            router.last = LayerState(route, None, None)
    elif decided is not None and decoding:
        route = torch.zeros_like(decided) if routing.config.dense_decode else decided
    else:
        router.last = _decide(attn, hidden_BSE, layout, routing, record)
        route = router.last.route_NK
    if record is not None and not decoding:
        record.layers[attn.layer_idx] = route.detach().to(torch.int8)
        record.prompt_lengths = (layout.prompt_end_N - layout.begin_N).cpu()
    return route.to(hidden_BSE.device)


def remember_density(attn: Any, density_NK: Tensor | None, cache: Any) -> None:
    """Keep what a prefill's XAttention heads visited beside the decision it belongs to."""
    if density_NK is not None:
        attn.router.last = replace(attn.router.last, density_NK=density_NK)
        if cache is not None:
            route_of(cache).densities[attn.layer_idx] = density_NK


def _decide(attn: Any, hidden_BSE: Tensor, layout: Layout, routing: Routing, record: RouteRecord | None) -> LayerState:
    """The router's decision on the prompt's boundaries. On a later turn the first P keys come from the record, the
    last P from the new tokens.
    """
    pooling = Pooling.shared(layout, routing.config.router.pool_tokens, hidden_BSE.shape[1], routing.context)
    keys = prerope_keys(attn, hidden_BSE.flatten(0, 1).index_select(0, pooling.token_M))
    earlier = record.heads[attn.layer_idx] if record is not None and layout.past else None
    state, first = decide_from_keys(
        attn.router, keys.unflatten(0, pooling.weight_N2P.shape), pooling, routing.config, earlier,
        context=routing.context, temperature=routing.temperature, fused=routing.fused,
    )  # fmt: skip
    if record is not None:
        record.heads[attn.layer_idx] = first.detach()
    return state


def _record(cache: Any, layout: Layout, layer: int) -> RouteRecord | None:
    """The cache's record, created at its first prefill."""
    if cache is None:
        return None
    record = getattr(cache, _RECORD, None)
    if layout.past == 0:
        if record is None or layer == 0:
            record = RouteRecord()
            setattr(cache, _RECORD, record)
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
