"""What a KV cache remembers about its routes, so that decoding, beams and later turns follow the prefill's decisions.

Legend: L layers, N samples, K KV heads, D head dim.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from elastic.attention.layout import Layout
from elastic.attention.modes import mode_ids
from elastic.cache.pieces import Pieces
from elastic.cache.turns import Turn, joined_turns
from elastic.config import RouterConfig, SparseConfig
from elastic.protocols import KVCache

_RECORD = "_elastic_record"
_PLACES = ("begin_N", "end_N", "prompt_end_N", "user_begin_N", "user_end_N")  # of a layout, by sample


@dataclass
class RouteRecord:
    """Decisions of one generation, kept on its KV cache.

    Attributes:
        layers: route [N, K] by layer.
        heads: by layer, sum [N, K, D] of those of the conversation's first P keys that were pooled, for routing a
            later turn.
        pooled_N: how many keys those sums hold.
        pooled_end_N: key position after the last of them.
        densities: by layer, what XAttention heads visited [N, K], see `elastic.attention.block_selection.density`.
        layout: of the prompt or turn that the routes were decided on.
        begin_N: int64; tokens of each sample before those that were read under these routes.
        override: what `override_routes` gave at that time.
        earlier: the turns before the one that `layers` decided.
        pieces: of a prompt whose last piece has not been read yet.
        rotation: by which factors the cached keys were rotated (`elastic.model.long_rope.rotation`).
    """

    layers: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    pooled_N: Tensor | None = None
    pooled_end_N: Tensor | None = None
    densities: dict[int, Tensor] = field(default_factory=dict)
    layout: Layout | None = None
    begin_N: Tensor | None = None
    override: int | Tensor | None = None
    earlier: list[Turn] = field(default_factory=list)
    pieces: Pieces | None = None
    rotation: int = 0
    _modes: tuple[int | Tensor | None, tuple[bool, SparseConfig], Tensor] | None = None

    @property
    def route(self) -> Tensor:
        """int8 [L, N, K] on the CPU."""
        return torch.stack([self.layers[i] for i in sorted(self.layers)]).cpu()

    @property
    def density(self) -> Tensor | None:
        """float64 [L, N, K] on the CPU; None if the configuration has no XAttention heads."""
        return torch.stack([self.densities[i].cpu() for i in sorted(self.densities)]) if self.densities else None

    @property
    def prompt_lengths(self) -> Tensor:
        """int64 [N] on the CPU; tokens of the prompt that the routes were decided on."""
        assert self.layout is not None
        return (self.layout.prompt_end_N - self.layout.begin_N).cpu()

    @property
    def turns(self) -> list[Turn]:
        """All turns of the conversation, on the CPU."""
        return [turn.cpu() for turn in (*self.earlier, self._turn)]

    @property
    def _turn(self) -> Turn:
        """The prompt or turn that the routes were decided on."""
        assert self.layout is not None and self.begin_N is not None
        layout, stack = self.layout, torch.stack
        density = stack([self.densities[i] for i in sorted(self.densities)]) if self.densities else None
        route = stack([self.layers[i] for i in sorted(self.layers)])
        return Turn(route, density, self.begin_N, torch.minimum(layout.prompt_end_N, layout.end_N) - layout.begin_N)

    def begin_turn(self, layout: Layout) -> None:
        """A later turn, or a prompt's next piece, is about to be read; what a crop has removed since counts no more."""
        held = (layout.past - layout.begin_N).clamp_min(0)
        self.earlier = [turn.cut(held) for turn in (*self.earlier, self._turn)]

    def set_route(self, layer: int, route_NK: Tensor) -> None:
        """Remember a layer's decision."""
        self.layers[layer] = route_NK.detach().to(torch.int8)
        self._modes = None

    def read_under(self, layout: Layout, override: int | Tensor | None, rotation: int, pieces: Pieces | None) -> None:
        """Remember what a layer's routes were decided on, and by which of `override_routes`; see the attributes."""
        self.layout, self.override, self.rotation, self.pieces = layout, override, rotation, pieces
        self.begin_N = layout.memo("read before", lambda: (layout.past - layout.begin_N).clamp_min(0))

    def modes(self, override: int | Tensor | None, dense: bool, sparse: SparseConfig) -> Tensor:
        """int32 [L, N, K]: what every head does in a decode step; made once and kept until something changes.

        Args:
            override: routes to use instead of the recorded ones.
            dense: every head in route 0's mode.
        """
        if self._modes is not None:
            earlier, settings, modes = self._modes
            if same_override(earlier, override) and settings == (dense, sparse):
                return modes
        route = torch.stack([self.layers[i] for i in sorted(self.layers)])
        if dense:
            route = torch.zeros_like(route)
        elif override is not None and not same_override(override, self.override):
            route = given_routes(override, route)  # else recorded, but for heads that could not follow it
        zero, one = mode_ids(sparse, queries=1)
        modes = torch.where(route > 0.5, one, zero).to(torch.int32)
        self._modes = (override, (dense, sparse), modes)
        return modes

    def keep_pooled(self, layer: int, first_NKD: Tensor, first_N: Tensor, layout: Layout, router: RouterConfig) -> None:
        """Remember a layer's sum of the first P keys, how many they are, and how far they reach."""
        self.heads[layer], self.pooled_N = first_NKD.detach(), first_N
        begin = layout.user_begin_N if router.pool_over == "user" else layout.begin_N
        grown, before = begin + router.pool_tokens, self.pooled_end_N
        if before is None or layout.past:
            end = torch.minimum(grown, layout.end_N)
            self.pooled_end_N = end if before is None else torch.where(grown > layout.past, end, before)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouteRecord":
        """A copy under the same override, which is compared by identity."""
        memo[id(self.override)] = self.override
        twin = RouteRecord.__new__(RouteRecord)
        memo[id(self)] = twin
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def select(self, index: Tensor) -> None:
        """Follow a cache whose samples became `index`, int64 on the device."""
        if self.layers:
            route_LNK = torch.stack(list(self.layers.values()))
            self.layers = dict(zip(self.layers, route_LNK[:, index.to(route_LNK.device)].unbind(0), strict=True))
        self.heads = {layer: total[index.to(total.device)] for layer, total in self.heads.items()}
        self.densities = {layer: density[index.to(density.device)] for layer, density in self.densities.items()}
        self.pooled_N = None if self.pooled_N is None else self.pooled_N[index]
        self.pooled_end_N = None if self.pooled_end_N is None else self.pooled_end_N[index]
        self.begin_N = None if self.begin_N is None else self.begin_N[index]
        self.earlier = [turn.select(index) for turn in self.earlier]
        layout = self.layout
        if layout is not None:
            places = {name: getattr(layout, name)[index] for name in _PLACES}
            row = torch.arange(index.shape[0], device=index.device)
            self.layout = replace(layout, row_N=row, rows=index.shape[0], **places)
        self._modes = None

    def join(self, other: "RouteRecord", moved_N: Tensor) -> None:
        """Follow a cache that took in the samples of another one.

        Args:
            moved_N: int64; by how many key positions each sample, one's own first, was moved.

        Raises:
            ValueError: keys that were rotated by different factors.
        """
        if self.rotation != other.rotation:
            raise ValueError(
                "caches join where RoPE has rotated their keys by the same factors; one of them holds more tokens than "
                "the short factors are for, the other does not"
            )
        if self.begin_N is not None and other.begin_N is not None:
            self.earlier = joined_turns(self.earlier, other.earlier, (self._turn, other._turn))
            self.begin_N = torch.cat([self.begin_N, other.begin_N])
        if self.layers:
            routes = [torch.stack([of.layers[layer] for layer in self.layers]) for of in (self, other)]
            self.layers = dict(zip(self.layers, torch.cat(routes, 1).unbind(0), strict=True))
        for name in ("heads", "densities"):
            ours, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, {layer: torch.cat([ours[layer], theirs[layer]]) for layer in ours})
        if self.pooled_N is not None and other.pooled_N is not None:
            self.pooled_N = torch.cat([self.pooled_N, other.pooled_N])
        if self.pooled_end_N is not None and other.pooled_end_N is not None:
            self.pooled_end_N = torch.cat([self.pooled_end_N, other.pooled_end_N]) + moved_N
        if self.layout is not None and other.layout is not None:
            both = [(getattr(self.layout, name), getattr(other.layout, name)) for name in _PLACES]
            places: dict[str, Any] = {
                name: torch.cat(parts) + moved_N for name, parts in zip(_PLACES, both, strict=True)
            }
            row = torch.arange(moved_N.shape[0], device=moved_N.device)
            self.layout = replace(self.layout, row_N=row, rows=row.shape[0], padded=True, **places)
        self._modes = None


def given_routes(override: int | Tensor, like_LNK: Tensor) -> Tensor:
    """The override's routes of all layers, [L, N, K] on the device of `like_LNK`."""
    if not isinstance(override, Tensor):
        return torch.full_like(like_LNK, override)
    if override.dim() == 3 and override.shape != like_LNK.shape:
        raise ValueError(f"routes of shape {list(override.shape)} do not fit a cache of {list(like_LNK.shape)}")
    route = override.to(like_LNK.device)
    return (route if route.dim() == 3 else route[:, None]).expand_as(like_LNK)


def same_override(one: int | Tensor | None, two: int | Tensor | None) -> bool:
    """Whether `override_routes` gave the same thing twice; tensors are compared by identity, without reading them."""
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return one is two
    return one == two


def find_record(cache: KVCache | None) -> RouteRecord | None:
    """The record on a cache, if there is one."""
    return getattr(cache, _RECORD, None)


def keep_record(cache: KVCache, record: RouteRecord) -> None:
    """Let a cache hold a record."""
    setattr(cache, _RECORD, record)


def new_record(cache: KVCache) -> RouteRecord:
    """Give the cache an empty record, which follows what happens to the cache."""
    record = RouteRecord()
    keep_record(cache, record)
    if not getattr(cache, "keeps_its_record", False):
        for name in _FOLLOWED:
            if hasattr(cache, name) and not isinstance(getattr(cache, name), _Followed):
                setattr(cache, name, _Followed(cache, name))
    return record


_FOLLOWED = ("crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices")


class _Followed:
    """An operation of a stock cache that its record takes part in. Copies with its cache."""

    def __init__(self, cache: KVCache, name: str) -> None:
        self.cache, self.name, self.inner = cache, name, getattr(cache, name)
        self.__wrapped__ = self.inner

    def __call__(self, what: Any) -> Any:
        record = find_record(self.cache)
        if record is None or record.layout is None:
            return self.inner(what)
        if self.name == "crop":
            seen = int(self.cache.get_seq_length())
            _check_crop(record, seen, what)
            check_windows(self.cache, removed_tokens(seen, what))
            return self.inner(what)
        if self.name != "reorder_cache":
            _check_batched(self.cache)
        found = self.inner(what)  # first: a cache that cannot do this must keep its record
        record.select(self._chosen(what, record.layout.row_N))
        return found

    def _chosen(self, what: Any, row_N: Tensor) -> Tensor:
        if self.name == "batch_repeat_interleave":
            return torch.arange(row_N.shape[0], device=row_N.device).repeat_interleave(what)
        index: Tensor = torch.as_tensor(what, device=row_N.device)
        return index.nonzero().flatten() if index.dtype == torch.bool else index


def _check_batched(cache: KVCache) -> None:
    """Refuse to select or repeat rows of a stock cache whose layers can only reorder them (linear attention).

    Raises:
        ValueError: there are such layers.
    """
    lacking = [type(layer).__name__ for layer in cache.layers if not hasattr(layer, "batch_select_indices")]
    if lacking:
        raise ValueError(
            f"a {type(cache).__name__} cannot select or repeat the rows of its {lacking[0]}; use elastic.new_cache"
        )


def _check_crop(record: RouteRecord, seen: int, tokens_to_remove: int) -> None:
    """Refuse to cut what the routes of a later turn are decided on, or a row's first token, short of the whole."""
    left = seen - removed_tokens(seen, tokens_to_remove)
    if record.layout is None or left <= 0:
        return
    needed, what = record.pooled_end_N, "that the routes were decided on"
    if needed is None:  # of routers that pool nothing
        needed, what = record.layout.begin_N + 1, "with which the rows begin"
    kept = needed.tolist()
    if any(left < end for end in kept):
        raise ValueError(f"cropping to {left} tokens cuts the tokens up to {kept} {what}; start from an empty cache")


def removed_tokens(seen: int, asked: int) -> int:
    """How many tokens `crop(asked)` takes from a cache of `seen`: -n takes n; a positive number is the length to keep
    (transformers before 5.20).
    """
    return -asked if asked <= 0 else max(0, seen - asked)


def check_windows(cache: KVCache, removed: int) -> None:
    """Refuse to crop a cache whose sliding layers, the backbone's own, have dropped keys that would be visible again,
    or which has layers of linear attention. A sliding layer that records its past for candidates holds what was read
    since it was last cropped.

    Args:
        removed: tokens that the crop takes.

    Raises:
        ValueError: they have.
    """
    for layer in cache.layers:
        if removed and isinstance(layer, LinearAttentionLayer):
            raise ValueError(
                f"cropping {removed} tokens would take them out of the state of a layer of linear attention, which "
                "keeps no tokens; copy.deepcopy the cache before, or start from an empty one"
            )
        if not getattr(layer, "is_sliding", False):
            continue
        window = getattr(layer, "sliding_window", None) or layer.max_cache_len  # of a static cache
        seen = layer.get_seq_length()
        dropped = seen >= window
        if dropped and getattr(layer, "record_past", False):
            dropped = layer.keys.shape[2] - removed < min(window - 1, seen - removed)
        if dropped:
            raise ValueError(
                f"cropping would make keys visible that the model's sliding layers of {window} tokens have dropped; "
                "copy.deepcopy the cache before, or start from an empty one"
            )


def check_depth(cache: KVCache | None, layers: int, routed: int) -> None:
    """Refuse a cache that was made for, or filled by, a model of another number of layers.

    Args:
        layers, routed: of the model, all and those that have routers.

    Raises:
        ValueError: it was.
    """
    record = find_record(cache)
    if cache is None or record is None:
        return
    made_for, expected = len(cache.layers), layers
    if cache.get_seq_length() and record.layers:
        made_for, expected = len(record.layers), routed
    if made_for not in (0, expected):
        raise ValueError(
            f"this {type(cache).__name__} belongs to a model of {made_for} layers, but this one has "
            f"{expected}; start from an empty cache"
        )


def route_of(cache: KVCache) -> RouteRecord:
    """The decisions stored on a KV cache by the prefill that filled it.

    Raises:
        ValueError: a cache that no attached model filled.
    """
    record = find_record(cache)
    if record is None or not record.layers:
        raise ValueError(f"this {type(cache).__name__} holds no routes; it was not filled by a model with routers")
    return record
