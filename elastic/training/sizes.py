"""Sizes of a pass from a GPU's memory: rows of a micro-batch, recomputation of layers, positions of logits. The first
that fit by the estimate of `elastic.model.memory`, the fastest before the leaner ones; what is given stays.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from elastic.model.memory import Footprint, Shape, footprint

GIB = 2**30
MARGIN, RESERVE = 1.1, GIB  # of the estimate: fragments, and what is in no tensor of ours (CUDA's context, libraries)
MOST_TOKENS = 65536  # of a pass; with more a GPU does not gain speed
LOSS_CHUNKS, LOGITS_SHARE = (1024, 512, 256, 128), 16  # the first whose logits take at most this part of the memory


@dataclass(frozen=True)
class Room:
    """Memory that a process may fill.

    Attributes:
        free: bytes.
        device: its name.
    """

    free: int
    device: str

    @classmethod
    def of(cls, indices: Sequence[int]) -> "Room":
        """What is free on a GPU now. Of several, all that the smallest one has: every process must find the same."""
        name = torch.cuda.get_device_name(indices[0])
        if len(indices) == 1:
            return cls(torch.cuda.mem_get_info(indices[0])[0], name)
        return cls(min(torch.cuda.get_device_properties(index).total_memory for index in indices), name)

    def holds(self, needed: Footprint) -> bool:
        """Whether a step of this footprint fits."""
        return needed.total * MARGIN + RESERVE <= self.free


@dataclass(frozen=True)
class Pass:
    """What a pass is like.

    Attributes:
        tokens: of all its rows.
        checkpointing: whether layers are recomputed in the backward pass.
        loss_chunk: positions whose logits exist at a time.
        needed: memory of it.
    """

    tokens: int
    checkpointing: bool
    loss_chunk: int
    needed: Footprint


@dataclass(frozen=True)
class Backbone:
    """Frozen weights as memory sees them.

    Attributes:
        shape: its widths.
        element_size: bytes of a weight.
        shards: processes that its weights are sharded over.
    """

    shape: Shape
    element_size: int
    shards: int = 1

    def loss_chunk(self, room: Room) -> int:
        """Positions whose logits take little of the memory."""
        small = (
            chunk
            for chunk in LOSS_CHUNKS
            if footprint(self.shape, 0, self.element_size, False, chunk).logits * LOGITS_SHARE <= room.free
        )
        return next(small, LOSS_CHUNKS[-1])

    def passes(self, tokens: Sequence[int], checkpointing: Sequence[bool], loss_chunk: int) -> Iterator[Pass]:
        """Every one of these, the order of the second argument outermost."""
        for again, count in product(checkpointing, tokens):
            needed = footprint(self.shape, count, self.element_size, again, loss_chunk, self.shards)
            yield Pass(count, again, loss_chunk, needed)


def choose(candidates: Sequence[Pass], room: Room) -> Pass:
    """The first that fits; where none does, the one that needs least."""
    fitting = (one for one in candidates if room.holds(one.needed))
    return next(fitting, min(candidates, key=lambda one: one.needed.total))


def training_sizes(
    backbone: Backbone, room: Room, row_tokens: int, rows_per_step: int, given: Mapping[str, Any], slices: int = 1
) -> tuple[dict[str, Any], str]:
    """Sizes of a training run, and a line about them.

    Args:
        row_tokens: tokens of a packed row.
        given: of `micro_batch_rows`, `gradient_checkpointing` and `loss_chunk`, what is not None stays as it is.
        slices: processes that share a row.
    """
    asked = given.get("micro_batch_rows")
    usual = [
        n for n in range(rows_per_step, 0, -1) if rows_per_step % n == 0 and n * row_tokens <= MOST_TOKENS * slices
    ]
    rows = [asked] if asked is not None else usual or [1]
    again, chunk = given.get("gradient_checkpointing"), given.get("loss_chunk")
    chunk = backbone.loss_chunk(room) if chunk is None else chunk
    tokens = [-(-n * row_tokens // slices) for n in rows]
    found = choose(list(backbone.passes(tokens, (False, True) if again is None else (again,), chunk)), room)
    sizes = {
        "micro_batch_rows": rows[tokens.index(found.tokens)],
        "gradient_checkpointing": found.checkpointing,
        "loss_chunk": chunk,
    }
    return sizes, told(sizes, given, found, room, f"rows of {row_tokens} tokens")


def calibration_sizes(
    backbone: Backbone, room: Room, longest: int, given: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Tokens of a batch of `elastic calibrate` and whether it recomputes layers, and a line about them.

    Args:
        longest: tokens of the longest sample, of which a batch holds at least one.
        given: of `batch_tokens` and `checkpointing`, what is not None stays as it is.
    """
    asked, again = given.get("batch_tokens"), given.get("checkpointing")
    halves = [MOST_TOKENS >> n for n in range(1, 6)]  # 32768 is usual: the same batches wherever they fit
    tokens = [asked] if asked is not None else [n for n in halves if n >= longest] or [longest]
    ways = (False, True) if again is None else (again,)
    every = [one for count in tokens for one in backbone.passes([max(count, longest)], ways, LOSS_CHUNKS[0])]
    found = choose(every, room)
    sizes = {"batch_tokens": tokens[every.index(found) // len(ways)], "checkpointing": found.checkpointing}
    return sizes, told(sizes, given, found, room, f"samples up to {longest} tokens")


def told(sizes: Mapping[str, Any], given: Mapping[str, Any], of: Pass, room: Room, what: str) -> str:
    """One line: sizes, which of them were given, and the memory by parts."""
    shown = ", ".join(
        f"{name} {str(value).lower()}{'' if given.get(name) is None else ' (given)'}" for name, value in sizes.items()
    )
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in vars(of.needed).items())
    fits = "" if room.holds(of.needed) else "; more than fits by this estimate, -c strategy/fsdp shares the weights out"
    return (
        f"sizes for {what}: {shown}; about {of.needed.total / GIB:.1f} GiB of {room.free / GIB:.1f} on {room.device} "
        f"({parts}){fits}"
    )
