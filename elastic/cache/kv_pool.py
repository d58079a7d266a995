"""Storage of one layer's keys and values in which streaming heads keep only sink + window (docs/design.md section 7).

All heads of all samples share one flat run of rows of D numbers. A head that keeps everything stores position p in its
slot p. A head with a ring stores the sink in slots [0, sink) and position p >= sink in slot sink + (p - sink) % window,
so the newest `window` positions are always there. Keys carry their rotation, so their order does not matter to
attention. Padding is never stored: position 0 is a sample's first valid token.
Legend: B samples, K KV heads, S tokens, D head dim, R rows of the pool, p positions, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

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


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 tensor of host values; on a GPU from pinned memory, without waiting for the device."""
    return torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@dataclass(frozen=True)
class KVPool:
    """Keys and values of one layer.

    Attributes:
        keys, values: [R, D]; room for more rows than are used.
        base_BK: int64; first row of every head.
        ring_BK: bool; heads that keep sink + window only.
        ring: the same on the host.
        capacity: by sample, tokens that a head without a ring can hold.
        sparse: sizes of the streaming pattern.
        used: rows from the first to the last that is used; samples that have left make gaps.
    """

    keys: Tensor
    values: Tensor
    base_BK: Tensor
    ring_BK: Tensor
    ring: list[list[bool]]
    capacity: list[int]
    sparse: SparseConfig
    used: int

    @classmethod
    def build(
        cls,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        begin_B: Tensor,
        count_B: Tensor,
        ring: list[list[bool]],
        capacity: list[int],
        sparse: SparseConfig,
    ) -> "KVPool":
        """Keep what the heads need of the tokens [begin, begin + count) of every row; no host synchronisation.

        Args:
            begin_B, count_B: int64.
            ring: which heads keep sink + window only.
            capacity: by sample, at least its count.
        """
        device, kv_heads = k_BKSD.device, k_BKSD.shape[1]
        sizes = _sizes(ring, capacity, sparse)
        head, slot, base = _rows(sizes, device)
        ring_BK = upload([int(r) for of_sample in ring for r in of_sample], device).bool()
        sample = head // kv_heads
        position = position_in(slot, count_B[sample], ring_BK[head], sparse).clamp_min(0)
        index = (sample, head % kv_heads, (begin_B[sample] + position).clamp_max(k_BKSD.shape[2] - 1))
        shape = (len(ring), kv_heads)
        return cls(
            k_BKSD[index], v_BKSD[index], base.view(shape), ring_BK.view(shape), ring, capacity, sparse, sum(sizes)
        )

    def rebuilt(self, samples: list[int], capacity: list[int]) -> "KVPool":
        """A pool of these samples of this one (repeats allowed), with other capacities by sample."""
        ring = [self.ring[b] for b in samples]
        old = [min(self._size(b, k), self._size_at(capacity[i], r)) for i, b in enumerate(samples)
               for k, r in enumerate(self.ring[b])]  # fmt: skip
        device, sizes = self.keys.device, _sizes(ring, capacity, self.sparse)
        head, slot, base = _rows(sizes, device)
        chosen = upload(samples, device)
        start = self.base_BK[chosen].flatten()
        source = start[head] + slot.minimum(upload(old, device)[head] - 1)
        shape = (len(samples), self.base_BK.shape[1])
        return KVPool(
            self.keys[source], self.values[source], base.view(shape), self.ring_BK[chosen], ring, capacity, self.sparse,
            sum(sizes),
        )  # fmt: skip

    def view(self, samples: list[int]) -> "KVPool":
        """These samples over the same rows; a repeated one is the same one again, not a copy."""
        chosen = upload(samples, self.keys.device)
        return replace(
            self, base_BK=self.base_BK[chosen], ring_BK=self.ring_BK[chosen], ring=[self.ring[b] for b in samples],
            capacity=[self.capacity[b] for b in samples],
        )  # fmt: skip

    def joined(self, other: "KVPool") -> "KVPool":
        """The samples of this pool, then those of another one, in this pool's rows as long as there is room."""
        mine = self if self.used + other.used <= self.keys.shape[0] else self._closed_up(other.used)
        for rows, theirs in ((mine.keys, other.keys), (mine.values, other.values)):
            rows[mine.used : mine.used + other.used] = theirs[: other.used]
        return replace(
            mine, base_BK=torch.cat([mine.base_BK, other.base_BK + mine.used]),
            ring_BK=torch.cat([mine.ring_BK, other.ring_BK]), ring=mine.ring + other.ring,
            capacity=mine.capacity + other.capacity, used=mine.used + other.used,
        )  # fmt: skip

    def _closed_up(self, more: int) -> "KVPool":
        """Without gaps, and with room for so many rows more: in the same storage, or in a larger one."""
        dense, held = self.rebuilt(list(range(len(self.ring))), self.capacity), self.keys.shape[0]
        room = held if dense.used + more <= held else max(dense.used + more, held + held // 2)
        keys, values = (rows if room == held else rows.new_empty(room, rows.shape[1]) for rows in self.rows)
        keys[: dense.used], values[: dense.used] = dense.rows
        return replace(dense, keys=keys, values=values)

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
        ring, count = self.ring_BK[:, :, None], count_B[:, None, None]
        kept = is_kept(position, count, ring, self.sparse)
        row = torch.where(kept, self.base_BK[:, :, None] + slot_of(position, ring, self.sparse), 0)
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
        rows = sum(self._size(sample, k) for k in range(len(self.ring[sample])))
        return 2 * rows * self.keys.shape[1] * self.keys.element_size()

    def _size(self, sample: int, head: int) -> int:
        return self._size_at(self.capacity[sample], self.ring[sample][head])

    def _size_at(self, capacity: int, ring: bool) -> int:
        return min(capacity, self.sparse.sink + self.sparse.window) if ring else capacity


def _sizes(ring: list[list[bool]], capacity: list[int], sparse: SparseConfig) -> list[int]:
    """Rows of every head, samples first; a ring never needs more than the sample's capacity."""
    most = sparse.sink + sparse.window
    return [min(c, most) if r else c for of_sample, c in zip(ring, capacity, strict=True) for r in of_sample]


def _rows(sizes: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Head and slot of every row of a pool, and the heads' first rows; int64, made on the device."""
    size = upload(sizes, device)
    base = size.cumsum(0) - size
    heads = torch.arange(len(sizes), device=device)
    head = torch.repeat_interleave(heads, size, output_size=sum(sizes))
    return head, torch.arange(sum(sizes), device=device) - base[head], base
