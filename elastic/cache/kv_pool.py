"""Storage of one layer's keys and values in which streaming heads keep only sink + window (docs/design.md section 7).

All heads of all samples share one flat run of rows of D numbers. A head that keeps everything stores position p in its
slot p. A head with a ring stores the sink in slots [0, sink) and position p >= sink in slot sink + (p - sink) % window,
so the newest `window` positions are always there. Keys carry their rotation, so their order does not matter to
attention. Padding is never stored: position 0 is a sample's first valid token.
Legend: B samples, K KV heads, S tokens, D head dim, R rows of the pool, p positions, L layers.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from elastic.attention.layout import sent
from elastic.config import SparseConfig
from elastic.visibility import lower_bound


class Visible(NamedTuple):
    """What the decode kernel reads of every head, int32 [..., B, K]: its slots t < end with t < sink or t >= begin."""

    sink: Tensor
    begin: Tensor
    end: Tensor


def slot_of(position: Tensor, ring: Tensor, sparse: SparseConfig) -> Tensor:
    """Slot of a position. Broadcasts."""
    wrapped = sparse.sink + (position - sparse.sink) % sparse.window
    return torch.where(ring & (position >= sparse.sink), wrapped, position)


def position_in(slot: Tensor, count: Tensor, ring: Tensor, sparse: SparseConfig) -> Tensor:
    """Position that a slot holds once `count` tokens are stored, -1 where it is empty: the inverse of `slot_of`."""
    newest = slot + (count - 1 - slot) // sparse.window * sparse.window
    position = torch.where(ring & (slot >= sparse.sink), newest, slot)
    return torch.where(slot < count, position, -1)


def is_kept(position: Tensor, count: Tensor, ring: Tensor, sparse: SparseConfig) -> Tensor:
    """Whether a head still holds a position once `count` tokens went in."""
    recent = (position < sparse.sink) | (position >= count - sparse.window)
    return (position >= 0) & (position < count) & (~ring | recent)


def visible_slots(count: Tensor, streaming: Tensor, ring: Tensor, sparse: SparseConfig) -> Visible:
    """Slots that the query at position count - 1, the newest, sees; `count` counts its own key.

    A streaming head sees its sink and the positions from `lower_bound` on. In a ring that has wrapped these are all
    slots but a hole after the newest one: positions that the block granule has already dropped.
    """
    newest = count - 1
    low = lower_bound(newest, sparse.window, sparse.granule, sparse.block)
    after, hole = slot_of(newest, ring, sparse) + 1, low - (newest - (sparse.window - 1))
    wrapped = ring & (count > sparse.sink + sparse.window)
    found = (
        torch.where(wrapped, torch.where(hole > 0, after, 0), torch.where(streaming, sparse.sink, 0)),
        torch.where(wrapped, torch.where(hole > 0, after + hole, 0), torch.where(streaming, low, 0)),
        torch.where(wrapped, sparse.sink + sparse.window, count),
    )
    return Visible(*(x.to(torch.int32) for x in found))


def upload(values: Iterable[int], device: torch.device) -> Tensor:
    """int64 tensor of host values; on a GPU from pinned memory, without waiting for the device."""
    numbers = array("q", values)
    host = torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)
    return sent(host, device)


class PromptRows:
    """Which tokens of a prompt or a turn go into a pool: what the layers share, of which each takes the parts that its
    rings say. No host synchronisation.

    Args:
        begin_B, count_B: int64; the tokens [begin, begin + count) of every row are valid.
        capacity: by sample, tokens that a head without a ring can hold; at least its count.
        sparse: sizes of the streaming pattern.
    """

    def __init__(self, begin_B: Tensor, count_B: Tensor, capacity: list[int], sparse: SparseConfig) -> None:
        self.begin_B, self.count_B, self.capacity, self.sparse = begin_B, count_B, capacity, sparse
        self._parts: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}

    def taken(self, new: Sequence[Tensor], ring: list[list[bool]]) -> list[Tensor]:
        """Rows [R, D] of a pool with these rings, of each of these tensors [B, K, S, D]; empty slots hold any of the
        tokens.
        """
        found, index = list[Tensor](), dict[tuple[int, ...], Tensor]()
        for one in new:
            samples, heads, length, dim = one.shape
            if one.stride(3) != 1 or any(stride % dim for stride in one.stride()[:3]):
                one = one.contiguous()
            steps = tuple(stride // dim for stride in one.stride()[:3])
            if steps not in index:
                parts = self._parts_of(heads, length, *steps)
                chosen = [parts[2 * b + r][k] for b, of_sample in enumerate(ring) for k, r in enumerate(of_sample)]
                index[steps] = torch.cat(chosen)
            last = sum((size - 1) * step for size, step in zip((samples, heads, length), steps, strict=True))
            found.append(one.as_strided((last + 1, dim), (dim, 1)).index_select(0, index[steps]))
        return found

    def _parts_of(self, kv_heads: int, length: int, sample: int, head: int, token: int) -> list[tuple[Tensor, ...]]:
        """For every sample without and with a ring, by head: which row, of D numbers, each slot takes of keys or values
        in whose memory samples, heads and tokens are so many rows apart.
        """
        key = (kv_heads, length, sample, head, token)
        if key not in self._parts:
            sizes = [size for c in self.capacity for size in (c, _ring_size(c, self.sparse))]
            of_part, slot = _rows(upload(sizes, self.begin_B.device), sum(sizes))
            which, ring = of_part // 2, of_part % 2 == 1
            position = position_in(slot, self.count_B[which], ring, self.sparse).clamp_min(0)
            row = which * sample + (self.begin_B[which] + position).clamp_max(length - 1) * token
            heads = torch.arange(kv_heads, device=row.device)[:, None] * head
            self._parts[key] = [part.unbind(0) for part in (row + heads).split(sizes, 1)]
        return self._parts[key]


@dataclass(frozen=True)
class KVPool:
    """Keys and values of one layer.

    Attributes:
        keys, values: [R, D]; room for more rows than are used.
        base: by sample and head, the head's first row; on the host, as all but the tensors.
        ring: heads that keep sink + window only.
        capacity: by sample, tokens that a head without a ring can hold.
        sparse: sizes of the streaming pattern.
        used: rows from the first to the last that is used; samples that have left make gaps.
    """

    keys: Tensor
    values: Tensor
    base: list[list[int]]
    ring: list[list[bool]]
    capacity: list[int]
    sparse: SparseConfig
    used: int

    @classmethod
    def build(cls, k_BKSD: Tensor, v_BKSD: Tensor, tokens: PromptRows, ring: list[list[bool]]) -> "KVPool":
        """Keep what heads with and without rings need of a prompt or a turn."""
        sizes = _sizes(ring, tokens.capacity, tokens.sparse)
        keys, values = tokens.taken((k_BKSD, v_BKSD), ring)
        return cls(keys, values, _bases(sizes), ring, tokens.capacity, tokens.sparse, _total(sizes))

    def rebuilt(self, samples: list[int], capacity: list[int]) -> "KVPool":
        """A pool of these samples of this one (repeats allowed), with other capacities by sample."""
        ring = [self.ring[b] for b in samples]
        sizes, old = _sizes(ring, capacity, self.sparse), _sizes(self.ring, self.capacity, self.sparse)
        base, total, heads = _bases(sizes), _total(sizes), range(len(ring[0]) if ring else 0)
        each = [(n, b, k) for n, b in enumerate(samples) for k in heads]  # sample and head, and which they were
        columns = [
            [sizes[n][k] for n, _, k in each],
            [self.base[b][k] - base[n][k] for n, b, k in each],
            [self.base[b][k] + min(sizes[n][k], old[b][k]) - 1 for n, b, k in each],
        ]
        table = upload(chain.from_iterable(columns), self.keys.device).view(3, len(each))
        moved, last = table[1:].repeat_interleave(table[0], 1, output_size=total).unbind(0)
        source = (torch.arange(total, device=moved.device) + moved).minimum(last)
        return KVPool(self.keys[source], self.values[source], base, ring, capacity, self.sparse, total)

    def view(self, samples: list[int]) -> "KVPool":
        """These samples over the same rows; a repeated one is the same one again, not a copy."""
        return replace(
            self, base=[self.base[b] for b in samples], ring=[self.ring[b] for b in samples],
            capacity=[self.capacity[b] for b in samples],
        )  # fmt: skip

    def joined(self, other: "KVPool") -> "KVPool":
        """The samples of this pool, then those of another one, in this pool's rows as long as there is room."""
        mine = self if self.used + other.used <= self.keys.shape[0] else self._closed_up(other.used)
        for rows, theirs in ((mine.keys, other.keys), (mine.values, other.values)):
            rows[mine.used : mine.used + other.used] = theirs[: other.used]
        moved = [[first + mine.used for first in of_sample] for of_sample in other.base]
        return replace(
            mine, base=mine.base + moved, ring=mine.ring + other.ring, capacity=mine.capacity + other.capacity,
            used=mine.used + other.used,
        )  # fmt: skip

    def _closed_up(self, more: int) -> "KVPool":
        """Without gaps, and with room for so many rows more: in the same storage, or in a larger one."""
        dense, held = self.rebuilt(list(range(len(self.ring))), self.capacity), self.keys.shape[0]
        room = held if dense.used + more <= held else max(dense.used + more, held + held // 2)
        keys, values = (rows if room == held else rows.new_empty(room, rows.shape[1]) for rows in self.rows)
        keys[: dense.used], values[: dense.used] = dense.rows
        return replace(dense, keys=keys, values=values)

    @cached_property
    def heads(self) -> tuple[Tensor, Tensor]:
        """`base` and `ring` on the device, int64 and bool [B, K]."""
        base_1BK, ring_1BK = heads_of([self], range(len(self.ring)))
        return base_1BK[0], ring_1BK[0]

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.keys, self.values

    def append(self, rows_BK: Tensor, k_BK1D: Tensor, v_BK1D: Tensor) -> None:
        """Write one token per head into its row, in place."""
        rows, dim = rows_BK.flatten(), self.keys.shape[1]
        self.keys.index_copy_(0, rows, k_BK1D.reshape(-1, dim))
        self.values.index_copy_(0, rows, v_BK1D.reshape(-1, dim))

    def dense(self, begin_B: Tensor, count_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values by position, [B, K, length, D]: sample b's tokens start at `begin_B` as before, with
        zeros for padding and for what was dropped.
        """
        position = torch.arange(length, device=self.keys.device) - begin_B[:, None, None]
        base_BK, ring_BK = self.heads
        ring, count = ring_BK[:, :, None], count_B[:, None, None]
        kept = is_kept(position, count, ring, self.sparse)
        row = torch.where(kept, base_BK[:, :, None] + slot_of(position, ring, self.sparse), 0)
        return (
            self.keys[row].masked_fill_(~kept[..., None], 0.0),
            self.values[row].masked_fill_(~kept[..., None], 0.0),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, the reserved rows included."""
        return self.keys.nbytes + self.values.nbytes

    def sample_bytes(self, sample: int) -> int:
        """Bytes of one sample."""
        (sizes,) = _sizes([self.ring[sample]], [self.capacity[sample]], self.sparse)
        return 2 * sum(sizes) * self.keys.shape[1] * self.keys.element_size()


def heads_of(pools: Sequence[KVPool], samples: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`base` and `ring` of samples in several layers, int64 and bool [L, B, K] on the device, in one transfer."""
    tables: list[Sequence[Sequence[int]]] = [*(pool.base for pool in pools), *(pool.ring for pool in pools)]
    entries = [entry for of_pool in tables for b in samples for entry in of_pool[b]]
    both = upload(entries, pools[0].keys.device).view(2, len(pools), len(samples), -1)
    return both[0], both[1].bool()


def _ring_size(capacity: int, sparse: SparseConfig) -> int:
    """Rows of a head with a ring, which never needs more than the sample's capacity."""
    return min(capacity, sparse.sink + sparse.window)


def _sizes(ring: list[list[bool]], capacity: list[int], sparse: SparseConfig) -> list[list[int]]:
    """Rows of every head by sample."""
    return [[_ring_size(c, sparse) if r else c for r in of_sample] for of_sample, c in zip(ring, capacity, strict=True)]


def _total(sizes: list[list[int]]) -> int:
    return sum(map(sum, sizes))


def _bases(sizes: list[list[int]]) -> list[list[int]]:
    """First row of every head by sample, each after the one before."""
    before = accumulate(chain.from_iterable(sizes), initial=0)
    return [[next(before) for _ in of_sample] for of_sample in sizes]


def _rows(size: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Part and slot in it of every row of parts of these sizes, which are so many in all; int64, made on the device."""
    parts = torch.arange(size.shape[0], device=size.device)
    of_part = torch.repeat_interleave(parts, size, output_size=total)
    return of_part, torch.arange(total, device=size.device) - (size.cumsum(0) - size)[of_part]
