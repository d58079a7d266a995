"""The two hooks of an attached model: before the decoder runs, and before every attention module (docs/design.md
section 6).

The first lays out the samples and puts a `ForwardPass` under the keyword `elastic_call`; the second routes the layer's
heads and exchanges it for the layer's own `LayerCall`, which transformers hands to the attention function. A decision
taken with a KV cache is stored on the cache object too.
Legend: L layers, N samples, B rows, S tokens, K KV heads, D head dim, P pooled tokens at either end of the prompt, E
hidden size.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import (
    Layout,
    batch_layout,
    decode_layout,
    packed_bounds,
    packed_layout,
    plain_mask,
    right_padding,
    turn_layout,
)
from elastic.attention.modes import FULL, STREAMING
from elastic.attention.prompt_reach import last_queries
from elastic.attention.row_slice import RowSlice
from elastic.attention.spans import check_prompts, check_user, pairs
from elastic.cache.elastic_cache import ElasticCache
from elastic.cache.keyword import cache_of
from elastic.cache.pieces import next_piece
from elastic.cache.route_record import RouteRecord, check_depth, find_record, new_record
from elastic.model.families import RoutedAttention, prerope_keys
from elastic.model.layer_types import LINEAR, SLIDING
from elastic.model.long_rope import check_one_rotation, check_whole_rows, rotation, tokens_by_position
from elastic.model.pass_state import AttachedState, ForwardPass, LayerCall, PendingCall, forced_on
from elastic.protocols import KVCache
from elastic.routing.decision import decide_from_keys, decide_from_reach
from elastic.routing.level import LevelRouter
from elastic.routing.pooling import Pooling, half_sums
from elastic.routing.reach_router import ReachRouter
from elastic.routing.router import Decision, check_router

CALL = "elastic_call"
IMPLEMENTATION, COMPILED = "elastic", "elastic_compiled"  # names of the attention function
_WATCH = "output_router_logits"
Args = tuple[Any, ...]


def before_decoder(
    state: AttachedState, decoder: Any, args: Args, kwargs: dict[str, Any]
) -> tuple[Args, dict[str, Any]]:
    """Begin a pass: read what is in force, lay out the samples, and make room in an elastic cache."""
    kwargs = dict(kwargs)
    if decoder.config._attn_implementation not in (IMPLEMENTATION, COMPILED):
        raise ValueError(
            f"the attached model was switched to attention implementation {decoder.config._attn_implementation!r}, by "
            "which no route is followed; switch back to 'elastic' with set_attn_implementation, or elastic.detach it"
        )
    if state.parts > 1 and decoder.training and torch.is_grad_enabled():
        raise ValueError(
            f"the model is cut into {state.parts} parts by tensor parallelism, each of which knows the gradient of its "
            "own heads alone; train with FSDP2 or context parallelism, or call model.eval()"
        )
    cache = cache_of(kwargs, args)
    check_depth(cache, len(decoder.layers), len(decoder.layers) - len(state.windows))
    if isinstance(cache, ElasticCache) and cache.windows != state.windows:
        raise ValueError(
            f"the ElasticCache was made for windows {cache.windows} by layer (None: linear attention), but the model "
            f"has {state.windows}; make it with elastic.new_cache(model)"
        )
    _check_mask(state, kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
    of_pass = _begin(state, args, kwargs)
    if state.rope_switches:
        positions = kwargs.get("position_ids", args[2] if len(args) > 2 else None)
        _rotate_as_cached(state.rope_switches, of_pass, positions, find_record(cache))
    state.last.watched = bool(kwargs.get(_WATCH, getattr(decoder.config, _WATCH, False)))
    if of_pass.mode_LNK is None:
        state.last.record = of_pass.record
    if isinstance(cache, ElasticCache):
        cache.begin_pass(of_pass.mode_LNK if of_pass.layout.queries == 1 else None, of_pass.override, of_pass.config)
    return args, {**kwargs, CALL: of_pass}


def _rotate_as_cached(
    switches: tuple[int, ...], of_pass: ForwardPass, positions: Tensor | None, record: RouteRecord | None
) -> None:
    """Note by which factors RoPE rotates in a pass, which must be those of the cached keys."""
    layout = of_pass.layout
    check_whole_rows(switches, layout, of_pass.row_slice)
    tokens = tokens_by_position(positions, layout)
    if tokens is None:
        return
    of_pass.rotation = rotation(switches, tokens)
    if layout.past and record is not None:
        check_one_rotation(switches, record.rotation, tokens)


def before_attention(attn: RoutedAttention, args: Args, kwargs: dict[str, Any]) -> tuple[Args, dict[str, Any]]:
    """Decide what the layer's heads do and hand it to the attention function."""
    of_pass, cache = kwargs.get(CALL), cache_of(kwargs, args)
    if not isinstance(of_pass, ForwardPass):
        raise ValueError("this layer was called outside the attached model's decoder; call the whole model")
    config, layout, layer = of_pass.config, of_pass.layout, of_pass.place(attn.layer_idx)
    if cache is None and layout.past:
        raise ValueError(
            f"the decoder was given a KV cache of {layout.past} tokens, but its layer {attn.layer_idx} none; gradient "
            "checkpointing withholds it in training: call model.eval(), or train without a cache"
        )
    elastic = cache if isinstance(cache, ElasticCache) else None
    if elastic is not None:
        elastic.routed[layer].begin(layout)
    if of_pass.mode_LNK is not None:
        # Candidates are read as decode steps read them, which choose no key blocks.
        sparse = config.sparse if layout.decoding else config.sparse.dense
        plan = HeadPlan(of_pass.mode_LNK[layer], sparse, layout)
        if elastic is not None:
            elastic.routed[layer].follow(plan)
        return args, {**kwargs, CALL: LayerCall(of_pass, layer, plan.mode_NK, plan, cache)}
    dropped = None if elastic is None else elastic.dropped(layer)
    if of_pass.override is None:
        check_router(attn.router, attn.layer_idx)
    if attn.router.after_rope and of_pass.override is None:
        return args, {**kwargs, CALL: PendingCall(of_pass, cache, dropped)}
    decision = route_layer(attn, args[0] if args else kwargs["hidden_states"], of_pass, cache, dropped)
    return args, {**kwargs, CALL: _planned(decision, layer, of_pass, cache)}


def _check_mask(state: AttachedState, mask: Any) -> None:
    """Refuse masks by layer type that leave the backbone's own sliding or linear layers out."""
    for window in state.windows.values() if isinstance(mask, dict) else ():
        kind = LINEAR if window is None else SLIDING
        if kind not in mask:
            raise ValueError(
                f"attention_mask is a dict of {', '.join(map(str, mask)) or 'nothing'}, but the model has layers of "
                f"{kind} too; pass the tokenizer's 2D mask"
            )


def _begin(state: AttachedState, args: Args, kwargs: dict[str, Any]) -> ForwardPass:
    """The pass that the decoder was called for; takes this project's own batch keywords out of `kwargs`."""
    config, forced, row_slice = state.config_in_force(), forced_on(state), state.row_slice
    tokens, override = _tokens(args, kwargs), forced.route
    rows, queries = tokens.shape[0], tokens.shape[1] * row_slice.size
    cache = cache_of(kwargs, args)
    past = 0 if cache is None else int(cache.get_seq_length())
    mask, positions = (
        kwargs.get(name, args[place] if len(args) > place else None)
        for place, name in ((1, "attention_mask"), (2, "position_ids"))
    )
    mask = plain_mask(mask)
    mask = mask if mask is None or forced.mask is None else forced.mask
    bounds = packed_bounds(kwargs, positions, mask, queries)
    spans, user = (kwargs.pop(name, None) for name in ("prompt_spans", "user_spans"))
    prompt_end, modes = None if spans is None else pairs("prompt_spans", spans)[:, 1], None
    record, user = find_record(cache), _user_spans(user, forced.user_spans, rows)
    pending = record.pieces if record is not None and past else None
    dense = override is None and config.router.kind != "static"
    pieces = None
    if pending is not None or forced.prompt_end is not None:
        pieces = next_piece(pending, past, past + queries, forced.prompt_end, dense)
    decoding = pieces is None and (queries == 1 or forced.verifying)
    if past and decoding and bounds is None and record is not None and record.layout is not None:
        layout = decode_layout(record.layout, rows, past, mask, queries)
        modes = record.modes(override, config.dense_decode, config.sparse)
    elif bounds is not None:
        if row_slice.size > 1:
            queries = _whole_row(bounds, tokens.shape[1], row_slice)
        if rows != 1 or past or mask is not None:
            raise ValueError(
                f"packed input (cu_seq_lens, or position_ids that begin again) came with {rows} rows, {past} cached "
                f"tokens and {'an' if mask is not None else 'no'} attention_mask; expected one row, no cache, no mask"
            )
        layout = packed_layout(bounds, prompt_end, queries, tokens.device, user)
    elif row_slice.size > 1:
        raise ValueError(
            "a slice of a sequence came without cu_seq_lens; under context_parallel, pass packed rows by "
            "elastic.training.context_parallel.shard"
        )
    else:
        prompt_end = prompt_end if pieces is None else torch.full((rows,), pieces.end)
        begun = None if pieces is None else pieces.begin
        layout = batch_layout(rows, queries, past, tokens.device, mask, prompt_end, user, begun)
        if past and record is not None and record.layout is not None:
            layout = turn_layout(record.layout, layout, mask is not None, user is not None)
        if layout.padded_right and forced.generating:
            raise right_padding()
    if spans is not None:
        check_prompts(layout, spans)
    if user is not None and modes is None:
        check_user(layout, user)
    return ForwardPass(
        layout, config, override=override, mode_LNK=modes, row_slice=row_slice, temperature=state.temperature,
        fused=state.fused, level_N=forced.level_N, gumbel_LNK2=forced.gumbel_LNK2, places=state.places,
        masked=mask is not None, pieces=pieces,
    )  # fmt: skip


def _tokens(args: Args, kwargs: dict[str, Any]) -> Tensor:
    """Ids or embeddings [B, S, ...] that the decoder was called with."""
    found = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tokens: Tensor | None = next((given for given in found if given is not None), None)
    if tokens is None:
        raise ValueError("the model was called without input_ids and inputs_embeds; pass one of them")
    if 0 in tokens.shape[:2]:
        raise ValueError(
            f"the batch is empty: {tokens.shape[0]} rows of {tokens.shape[1]} tokens; give at least one each"
        )
    return tokens


def _whole_row(bounds: Tensor, here: int, row_slice: RowSlice) -> int:
    """Tokens of the row that slices of `here` tokens are of; the last slices may be longer than it."""
    length = int(bounds[-1])
    if -(-length // row_slice.size) != here:
        raise ValueError(
            f"a slice of {here} tokens came with cu_seq_lens of a row of {length} in {row_slice.size} slices of "
            f"{-(-length // row_slice.size)} tokens; cut rows by elastic.training.context_parallel.shard"
        )
    return length


def route_layer(
    attn: RoutedAttention,
    hidden_BSE: Tensor,
    of_pass: ForwardPass,
    cache: KVCache | None = None,
    dropped_NK: Tensor | None = None,
) -> Decision:
    """Decision of one layer for a prompt or a new turn: given from outside, or made from the layer's own keys.

    Args:
        attn: the attention module; of it are read key projection and norm, head dim, router and layer index.
        hidden_BSE: what its projections read.
        cache: the KV cache that remembers the decision, or None.
        dropped_NK: bool; heads whose cached keys allow streaming attention only.
    """
    layout, override, layer = of_pass.layout, of_pass.override, of_pass.place(attn.layer_idx)
    record, samples = _record(cache, layout, layer), layout.row_N.shape[0]
    if override is not None or of_pass.early:
        decision = _undecided(of_pass, samples, attn.router.kv_heads, hidden_BSE.device)
        if override is not None:
            route = _given(override, layer, samples, attn.router.kv_heads, hidden_BSE.device)
            decision = Decision(route, None, None)
        if record is not None and not attn.router.after_rope:
            _pool_unrouted(attn, hidden_BSE, of_pass, record)
    else:
        decision = _decide(attn, hidden_BSE, of_pass, record)
    return _settled(decision, layer, of_pass, record, dropped_NK)


def decide_after_rope(
    attn: RoutedAttention, q_BHSD: Tensor, k_BKSD: Tensor, scale: float, call: PendingCall
) -> LayerCall:
    """The call of a layer whose router looks at queries and keys after RoPE, now that they are there."""
    of_pass, cache, dropped = call.of_pass, call.cache, call.dropped_NK
    layer = of_pass.place(attn.layer_idx)
    if of_pass.row_slice.size > 1:
        raise whole_rows_needed()
    record, kept, pieces = _record(cache, of_pass.layout, layer), None, of_pass.pieces
    if pieces is not None:
        kept = pieces.queries[layer] = last_queries(q_BHSD, of_pass.layout, pieces.queries.get(layer))
    if of_pass.early:
        decision = _undecided(of_pass, of_pass.layout.row_N.shape[0], attn.router.kv_heads, q_BHSD.device)
        return _planned(_settled(decision, layer, of_pass, record, dropped), layer, of_pass, cache)
    earlier = of_pass.record.decisions[layer - 1].reach_NR if layer else None
    decision = decide_from_reach(
        cast(LevelRouter | ReachRouter, attn.router), q_BHSD, k_BKSD, of_pass.layout, of_pass.config, scale, earlier,
        kept_NHQD=kept, dropped_NK=dropped, level_N=of_pass.level_N, temperature=of_pass.temperature,
        gumbel_NK2=of_pass.noise(layer),
    )  # fmt: skip
    return _planned(_settled(decision, layer, of_pass, record, dropped), layer, of_pass, cache)


def whole_rows_needed() -> ValueError:
    """What to say of routers that no process can run on its slice of a row."""
    return ValueError(
        "routers by level or reach look at the last queries and all keys of a row, of which context parallelism "
        "leaves each process a slice; train them with DDP or FSDP, or use routers of kind paper"
    )


def _planned(decision: Decision, layer: int, of_pass: ForwardPass, cache: KVCache | None) -> LayerCall:
    """What attention is told of a decision, which the pass and an elastic cache remember."""
    config = of_pass.config
    of_pass.record.decisions.setdefault(layer, decision)  # a second one's graph would keep what a layer recomputes
    if of_pass.early and decision.mode_NK is not None:  # of modes that no route may name
        plan = HeadPlan(decision.mode_NK, config.sparse.dense, of_pass.layout)
    else:
        plan = HeadPlan.build(decision.route_NK, config.sparse, of_pass.layout, config.gradient_share, decision.mode_NK)
    if isinstance(cache, ElasticCache):
        cache.routed[layer].follow(plan)
    return LayerCall(of_pass, layer, decision.route_NK, plan, cache)


def _settled(
    decision: Decision, layer: int, of_pass: ForwardPass, record: RouteRecord | None, dropped_NK: Tensor | None
) -> Decision:
    """The decision with what is fixed already, kept on the cache's record."""
    sparse, early = of_pass.config.sparse, of_pass.early
    if dropped_NK is not None:
        streaming = float(sparse.route1 == "streaming")
        mode = torch.where(dropped_NK, STREAMING, decision.mode_NK) if early and decision.mode_NK is not None else None
        decision = replace(decision, route_NK=torch.where(dropped_NK, streaming, decision.route_NK), mode_NK=mode)
    if record is not None:
        record.set_route(layer, decision.route_NK)
        record.read_under(of_pass.layout, of_pass.override, of_pass.rotation, of_pass.pending)
        if early and sparse.chooser is not None:
            record.densities[layer] = torch.ones_like(decision.route_NK, dtype=torch.float64)
    return decision


def _undecided(of_pass: ForwardPass, samples: int, kv_heads: int, device: torch.device) -> Decision:
    """Every head in full, as the pieces of a prompt run before the last; the route is that of the mode which leaves
    out least.
    """
    shape = (samples, kv_heads)
    route = torch.full(shape, float(of_pass.config.sparse.route0 == "streaming"), device=device)
    return Decision(route, None, None, torch.full(shape, FULL, dtype=torch.int32, device=device))


def _decide(attn: RoutedAttention, hidden_BSE: Tensor, of_pass: ForwardPass, record: RouteRecord | None) -> Decision:
    """The router's decision on the prompt's boundaries. On a later turn the first P keys come from the record, the
    last P from the new tokens.
    """
    keys, pooling, earlier = _boundary_keys(attn, hidden_BSE, of_pass, record)
    layer = of_pass.place(attn.layer_idx)
    last = None if of_pass.pieces is None else of_pass.pieces.last.get(layer)
    if last is not None:
        earlier = last if earlier is None else earlier + last
    decision, first = decide_from_keys(
        attn.router, keys, pooling, of_pass.config, earlier, row_slice=of_pass.row_slice,
        temperature=of_pass.temperature, gumbel_NK2=of_pass.noise(layer), fused=of_pass.fused,
    )  # fmt: skip
    if record is not None:
        first = first if last is None else first - last
        record.keep_pooled(layer, first, pooling.first_N, of_pass.layout, of_pass.config.router)
    return decision


def _pool_unrouted(attn: RoutedAttention, hidden_BSE: Tensor, of_pass: ForwardPass, record: RouteRecord) -> None:
    """Remember the first P keys of a pass whose routes were given: the router may decide a later turn. Of a prompt's
    early piece also the last P, for its own decision.
    """
    keys, pooling, earlier = _boundary_keys(attn, hidden_BSE, of_pass, record)
    first, last = half_sums(keys, pooling.weight_N2P).unbind(1)
    first = first if earlier is None else first + earlier
    layer = of_pass.place(attn.layer_idx)
    if of_pass.pieces is not None and of_pass.early:
        of_pass.pieces.keep_last(layer, last, pooling.last_N)
    record.keep_pooled(layer, first, pooling.first_N, of_pass.layout, of_pass.config.router)


def _boundary_keys(
    attn: RoutedAttention, hidden_BSE: Tensor, of_pass: ForwardPass, record: RouteRecord | None
) -> tuple[Tensor, Pooling, Tensor | None]:
    """Pre-RoPE keys [N, 2P, K, D] of the prompt's boundaries, how they are pooled, and what earlier turns summed up of
    the first P.
    """
    layout = of_pass.layout
    before = record if layout.past else None
    pooled_N = None if before is None else before.pooled_N
    last_N = None if of_pass.pieces is None else of_pass.pieces.last_N
    pooling = Pooling.shared(layout, of_pass.config.router, hidden_BSE.shape[1], of_pass.row_slice, pooled_N, last_N)
    keys = prerope_keys(attn, hidden_BSE.flatten(0, 1).index_select(0, pooling.token_M))
    earlier = None if before is None else before.heads.get(of_pass.place(attn.layer_idx))
    return keys.unflatten(0, pooling.weight_N2P.shape), pooling, earlier


def _record(cache: KVCache | None, layout: Layout, layer: int) -> RouteRecord | None:
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
    elif layer == 0:
        record.begin_turn(layout)
    return record


def _given(route: int | Tensor, layer: int, samples: int, kv_heads: int, device: torch.device) -> Tensor:
    """The override's route of one layer, fp32 [N, K]."""
    if isinstance(route, Tensor):
        of_layer = route[layer].to(device, torch.float32)
        return of_layer.expand(samples, kv_heads) if of_layer.dim() == 1 else of_layer
    return torch.full((samples, kv_heads), float(route), device=device)


def _user_spans(given: Tensor | None, forced: Tensor | None, rows: int) -> Tensor | None:
    """Where the users' words are: as the call says, or `user_wrote`, for every beam of its rows."""
    if given is not None:
        return pairs("user_spans", given)
    if forced is None:
        return None
    return pairs("user_spans", forced).repeat_interleave(max(1, rows // max(1, forced.shape[0])), 0)
