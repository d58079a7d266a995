"""A transformers cache whose streaming heads keep only sink + window tokens (docs/design.md section 7).

`kv_cache="elastic"` stores what the routes need; `"full"` keeps every token of every head in the same storage, so that
a new turn may route again freely. Decoding appends in place: nothing is copied, no shape changes and nothing is read
back until a step grows the storage, so a decode step can be captured in a CUDA graph.

A layer's routes decide how much storage it gets, so they must reach the host. They are copied there asynchronously
when the layer is routed and read two layers later, when the GPU still has the work of those layers queued: it never
waits. Until then the layer's keys and values stay as the model made them.
Legend: L layers, B samples, K KV heads, S tokens, D head dim.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from elastic.attention.layout import Layout, right_padding
from elastic.attention.modes import STREAMING
from elastic.cache.decode_attention import Stored
from elastic.cache.kv_pool import KVPool, PromptRows, Visible, heads_of, slot_of, upload, visible_slots
from elastic.cache.layer import ElasticLayer
from elastic.cache.linear_layer import LinearLayer
from elastic.cache.route_record import (
    RouteRecord,
    check_windows,
    find_record,
    new_record,
    removed_tokens,
    route_of,
    same_override,
)
from elastic.cache.sliding_layer import SlidingLayer
from elastic.config import ElasticConfig

STEP = 1024  # tokens by which heads that keep everything grow
_BEHIND = 2  # layers whose routes may still be on their way to the host


def _stock_layer(window: int | None) -> SlidingLayer | LinearLayer:
    return LinearLayer() if window is None else SlidingLayer(window)


class ElasticCache(Cache):
    """Keys and values of a generation, by the routes of its prefill.

    Args:
        num_layers: decoder layers.
        config: the attached model's configuration; `kv_cache` says what streaming heads keep.
        reserve: tokens that the storage has room for beyond a prompt, before it grows by `step`; give the number of
            tokens to be generated and no step will move memory. Of several prompts, for each or for all.
        step: tokens by which the storage grows.
        windows: of the layers without routers, see `elastic.model.layer_types.stock_layers`. Sliding ones keep their
            last tokens, those of linear attention their states, as they do in transformers' cache.

    Attributes:
        routed: the layers whose heads are routed, in order; L counts them.
        version: changes when the storage does; a CUDA graph of a decode step lives until then.
        counts: valid tokens by sample.
    """

    keeps_its_record = True  # its own operations move it

    def __init__(
        self, num_layers: int, config: ElasticConfig, reserve: int | Sequence[int] = 0, step: int = STEP,
        windows: Mapping[int, int | None] | None = None,
    ) -> None:  # fmt: skip
        if min([reserve] if isinstance(reserve, int) else reserve, default=0) < 0 or step < 1:
            raise ValueError(f"reserve={reserve}, step={step}; expected 0 or more and 1 or more tokens")
        self.windows = dict(windows or {})
        made: list[Any] = [
            _stock_layer(self.windows[n]) if n in self.windows else ElasticLayer() for n in range(num_layers)
        ]
        self.routed = [layer for layer in made if isinstance(layer, ElasticLayer)]
        self.sliding = [layer for layer in made if isinstance(layer, SlidingLayer)]
        self.linear = [layer for layer in made if isinstance(layer, LinearLayer)]
        self._places = {n: place for place, n in enumerate(n for n in range(num_layers) if n not in self.windows)}
        super().__init__(layers=made)
        self.config, self.reserve, self.step, self.version = config, reserve, step, 0
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self.counts = list[int]()
        self._tokens: PromptRows | None = None  # of the layers that are not all settled yet
        self.pooled_B = self.begin_B = self.count_B = torch.zeros(0, dtype=torch.int64)
        self.visible_LBK: Visible | None = None
        self.rows_LBK = self.base_LBK = self.ring_LBK = torch.zeros(0)
        for layer in (*self.routed, *self.stock):
            layer.reset()
        new_record(self)

    @property
    def stock(self) -> list[Any]:
        """The layers without routers."""
        return [*self.sliding, *self.linear]

    @property
    def seen(self) -> int:
        """Tokens in the cache, padding included."""
        return self.routed[-1].seen

    # -- one forward pass

    def dropped(self, index: int) -> Tensor | None:
        """Heads [B, K] of a layer that have dropped keys; None while the cache is empty."""
        if self.seen == 0:
            return None
        self.settle()
        sparse = self.config.sparse
        return self.routed[index].held().heads[1] & (self.count_B > sparse.sink + sparse.window)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in a layer's new tokens; see `ElasticLayer.update`."""
        layer = self.layers[layer_idx]
        if isinstance(layer, SlidingLayer):
            return layer.update(key_states, value_states)
        assert isinstance(layer, ElasticLayer)
        place = self._places[layer_idx]
        rows_BK = self.rows_LBK[place] if self.rows_LBK.numel() else self.rows_LBK
        held = layer.update(key_states, value_states, rows_BK, self.begin_B, self.count_B)
        assert layer.layout is not None
        if not layer.layout.decoding:
            if place >= _BEHIND:
                self._settle(self.routed[place - _BEHIND], layer.layout)
            if place == len(self.routed) - 1:
                self._finish(layer.layout)
        return held

    def _finish(self, layout: Layout) -> None:
        """The last layer has taken in a prompt or a turn."""
        if not layout.turn_begin:
            begin = layout.user_begin_N if self.config.router.pool_over == "user" else layout.begin_N
            pooled = torch.minimum(begin + self.config.router.pool_tokens, layout.end_N)
            self.pooled_B = pooled - layout.begin_N
        self.counts = layout.lengths
        self.begin_B, self.count_B = layout.begin_N, layout.end_N - layout.begin_N
        self._forget_rows()

    def begin_pass(self, mode_LBK: Tensor | None, override: int | Tensor | None, config: ElasticConfig) -> None:
        """Before the layers run. For a decode step: room for one token, where it goes, and which slots its query sees,
        for all layers at once, as device work of fixed shapes.

        Args:
            mode_LBK: modes of `elastic.attention.modes` in a decode step; None for a prompt or a turn.
            override: routes given from outside.
            config: what the model runs with now.

        Raises:
            ValueError: other modes or sizes than the cache was made for, or a decode step under other routes than those
                that the storage was made for.
        """
        if config.sparse != self.config.sparse:
            raise ValueError(
                f"the cache was made for {self.config.sparse}, but the model runs with {config.sparse}; make a new "
                "cache with elastic.new_cache(model)"
            )
        self.settle()
        self._tokens = None
        if mode_LBK is None:
            return
        self._check_kept(override, config.dense_decode)
        if any(count >= room for count, room in zip(self.counts, self.routed[0].held().capacity, strict=True)):
            more = self.reserve if isinstance(self.reserve, int) else 0
            self._resize(list(range(len(self.counts))), [self._room(count + 1, more) for count in self.counts])
        if self.base_LBK.numel() == 0:
            samples = range(len(self.counts))
            self.base_LBK, self.ring_LBK = heads_of([layer.held() for layer in self.routed], samples)
        sparse, count = self.config.sparse, self.count_B[:, None]
        self.rows_LBK = self.base_LBK + slot_of(count, self.ring_LBK, sparse)
        self.visible_LBK = visible_slots(count + 1, mode_LBK == STREAMING, self.ring_LBK, sparse)
        self.count_B += 1
        self.counts = [count + 1 for count in self.counts]

    def _check_kept(self, override: int | Tensor | None, dense: bool) -> None:
        record = find_record(self)
        if self.config.kv_cache == "full" or record is None:
            return
        if dense or not self._same_routes(override, record):
            what = "dense_decode was set" if dense else "override_routes changed"
            raise ValueError(
                f"{what} after the prompt was read into an elastic KV cache, whose streaming heads have dropped keys; "
                'read the prompt again, or use kv_cache="full"'
            )

    def _same_routes(self, override: int | Tensor | None, record: RouteRecord) -> bool:
        """Whether these routes were in force at the prompt; tensors are read only where another one came."""
        kept = record.override
        if not same_override(override, kept) and isinstance(override, Tensor) and isinstance(kept, Tensor):
            if override.shape != kept.shape or not bool((override.to(kept.device) == kept).all()):
                return False
            record.override = override
        return same_override(override, record.override)

    def advance(self) -> None:
        """Count a step that a CUDA graph replayed: everything on the device has moved already."""
        self._lengthen(1)
        self.counts = [count + 1 for count in self.counts]

    def count_step(self) -> None:
        """Count a step that was made over a `Frame` of all samples."""
        self.count_B += 1
        self.advance()

    def _lengthen(self, tokens: int) -> None:
        for layer in self.routed:
            layer.seen += tokens

    def _forget_rows(self) -> None:
        self.base_LBK, self.version = torch.zeros(0), self.version + 1

    def stored(self, index: int) -> Stored:
        """A layer in the present decode step."""
        assert self.visible_LBK is not None
        visible = Visible(*(part[index] for part in self.visible_LBK))
        return Stored(self.routed[index].held(), self.base_LBK[index], visible, self.begin_B, self.count_B)

    @property
    def steps_left(self) -> int:
        """Decode steps before the storage grows."""
        return min(room - count for room, count in zip(self.routed[0].held().capacity, self.counts, strict=True))

    # -- storage

    def settle(self) -> None:
        """Give every layer that still waits its storage."""
        for layer in self.routed:
            if layer.waiting is not None and layer.layout is not None:
                self._settle(layer, layer.layout)

    def _settle(self, layer: ElasticLayer, layout: Layout) -> None:
        if layer.waiting is None:
            return
        (k, v), modes = layer.waiting, layer.modes
        if modes is None:
            raise ValueError("a layer was given keys but no routes; its attention must run before the cache is used")
        rings = modes.get() == STREAMING if self.config.kv_cache == "elastic" else torch.zeros(modes.host.shape)
        more = [self.reserve] * len(layout.lengths) if isinstance(self.reserve, int) else self.reserve
        if len(more) != len(layout.lengths):
            raise ValueError(f"reserve={list(more)} is of {len(more)} samples, but {len(layout.lengths)} were read")
        layer.waiting = layer.modes = None
        if self._tokens is None:
            capacity = [self._room(count, extra) for count, extra in zip(layout.lengths, more, strict=True)]
            count = layout.end_N - layout.begin_N
            self._tokens = PromptRows(layout.begin_N, count, capacity, self.config.sparse)
        layer.pool = KVPool.build(k, v, self._tokens, rings.bool().tolist())
        if layer is self.routed[-1]:
            self._tokens = None

    def _room(self, count: int, reserve: int) -> int:
        return -(-(count + reserve) // self.step) * self.step

    def _resize(self, samples: list[int], capacity: list[int]) -> None:
        for layer in self.routed:
            layer.pool = layer.held().rebuilt(samples, capacity)
        self._forget_rows()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, reserved room included."""
        self.settle()
        return sum(layer.held().nbytes for layer in self.routed) + sum(int(layer.nbytes) for layer in self.stock)

    def sample_bytes(self) -> list[int]:
        """`nbytes` by sample."""
        self.settle()
        pools = [layer.held() for layer in self.routed]
        own = sum(layer.nbytes for layer in self.stock) // max(1, len(self.counts))
        return [sum(pool.sample_bytes(b) for pool in pools) + own for b in range(len(self.counts))]

    # -- batch and length

    def _select(self, samples: Sequence[int]) -> None:
        chosen = list(samples)
        if self.seen == 0 or chosen == list(range(len(self.counts))):
            return
        self.settle()
        self._resize(chosen, [self.routed[0].held().capacity[b] for b in chosen])
        self._follow(chosen)

    def keep(self, samples: list[int]) -> None:
        """Let all others go, without moving anything: what they held is for those that join next. None may be left,
        and samples that join such a cache are the first again.

        Args:
            samples: in ascending order.
        """
        self.settle()
        for layer in self.routed:
            layer.pool = layer.held().view(samples)
        self._forget_rows()
        self._follow(samples)

    def _follow(self, chosen: list[int]) -> None:
        index = upload(chosen, self.count_B.device)
        self.begin_B, self.count_B, self.pooled_B = self.begin_B[index], self.count_B[index], self.pooled_B[index]
        self.counts = [self.counts[b] for b in chosen]
        for layer in self.stock:
            layer.select(index)
        record = find_record(self)
        if record is not None:
            record.select(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sample b becomes a copy of sample `beam_idx[b]`, its routes included."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample `repeats` times."""
        self._select([b for b in range(len(self.counts)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these samples (indices, or a bool mask)."""
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select(chosen.tolist())

    def join(self, other: "ElasticCache") -> None:
        """Take in the samples of another cache, after one's own, as under left padding; refused of an empty cache, or
        one of other settings.
        """
        if not (self.seen and other.seen) or self.config.sparse != other.config.sparse:
            raise ValueError("caches join once each has read a prompt under the same sparse settings")
        self.settle()
        other.settle()
        if not self.counts:
            route_of(self).rotation = route_of(other).rotation
        counts, count_B = self.counts + other.counts, torch.cat([self.count_B, other.count_B])
        begin_B = max(counts) - count_B
        mine, theirs = find_record(self), find_record(other)
        if self.linear and theirs is not None and theirs.layout is not None and theirs.layout.padded_right:
            raise right_padding()
        if mine is not None and theirs is not None:
            mine.join(theirs, begin_B - torch.cat([self.begin_B, other.begin_B]))
        for layer, joining in zip(self.routed, other.routed, strict=True):
            layer.pool, layer.seen = layer.held().joined(joining.held()), max(counts)
        for own, joining_own in zip(self.stock, other.stock, strict=True):
            own.join(joining_own, max(counts))
        self.counts, self.count_B, self.begin_B = counts, count_B, begin_B
        self.pooled_B = torch.cat([self.pooled_B, other.pooled_B])
        self._forget_rows()

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes back any new tokens; transformers asks before it verifies candidates."""
        return self.config.kv_cache == "full" and all(layer.is_croppable for layer in self.stock)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: -n removes n; a positive number is the length to keep (transformers before 5.20).

        Raises:
            ValueError: keys that streaming heads have dropped would be visible again, or a prompt's start that the
                router has pooled would be cut.
        """
        removed = removed_tokens(self.seen, tokens_to_remove)
        if self.seen == 0:
            return
        if removed == 0:
            for own in self.sliding:
                own.shrink()
            return
        self.settle()
        left = [count - removed for count in self.counts]
        pooled = self.pooled_B.tolist()
        if any(kept < first for kept, first in zip(left, pooled, strict=True)):
            raise ValueError(
                f"cropping {removed} tokens leaves {left} by sample, fewer than the first {pooled} that the "
                "routes were decided on; start from an empty cache"
            )
        sparse = self.config.sparse
        for sample, (count, kept) in enumerate(zip(self.counts, left, strict=True)):
            lost = range(max(sparse.sink, kept - sparse.window), min(kept, count - sparse.window))
            if lost and any(any(layer.held().ring[sample]) for layer in self.routed):
                raise ValueError(
                    f"cropping {removed} tokens would make keys visible that streaming heads have dropped (sample "
                    f'{sample} holds {count} tokens); use kv_cache="full", or copy.deepcopy the cache before'
                )
        check_windows(self, removed)
        for own in self.sliding:
            own.crop(-removed)
        self._lengthen(-removed)
        self.counts = left
        self.count_B = self.count_B - removed

    def __deepcopy__(self, memo: dict[int, Any]) -> "ElasticCache":
        """A copy that shares nothing: prefix reuse."""
        self.settle()
        twin = memo[id(self)] = type(self).__new__(type(self))
        record = find_record(self)
        if record is not None:
            memo[id(record.override)] = record.override  # known by its identity
        for name, value in self.__dict__.items():
            setattr(twin, name, copy.deepcopy(value, memo))
        return twin
