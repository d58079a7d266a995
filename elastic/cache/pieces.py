"""What the pieces of a prompt leave for its decision, where it is read in pieces (docs/design.md section 7).

Routes that depend on the prompt are decided in its last piece, and every head attends in full until then. Routes that
do not, static or given ones, hold from the first piece.
Legend: N samples, K KV heads, H query heads, P pooled tokens at either end of the prompt, Q last queries, D head dim.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Pieces:
    """A prompt, or a later turn, that is being read.

    Attributes:
        begin, end: its key positions.
        dense: whether pieces before the last attend in full.
        last: by layer, sum [N, K, D] of those of the last P keys that were read.
        last_N: how many they are.
        queries: by layer, the last Q queries [N, H, Q, D] after RoPE of what the user wrote, as far as they were read
            (`elastic.attention.prompt_reach.last_queries`); for routers that look at them.
    """

    begin: int
    end: int
    dense: bool
    last: dict[int, Tensor] = field(default_factory=dict)
    last_N: Tensor | None = None
    queries: dict[int, Tensor] = field(default_factory=dict)

    def keep_last(self, layer: int, last_NKD: Tensor, last_N: Tensor) -> None:
        """Take in a layer's sum of those of the last P keys that are in this piece, and how many were read so far."""
        before = self.last.get(layer)
        self.last[layer], self.last_N = last_NKD if before is None else before + last_NKD, last_N


def next_piece(pending: Pieces | None, past: int, keys: int, end: int | None, dense: bool) -> Pieces | None:
    """The prompt that the tokens [past, keys) are a piece of; None where they are not, or all of it.

    Args:
        pending: what earlier pieces have left on the cache.
        end: key position where the prompt ends that is being read; None: none is, in pieces.
        dense: see `Pieces`.

    Raises:
        ValueError: tokens that do not continue the prompt whose first pieces the cache holds.
    """
    if pending is not None and (end != pending.end or keys > pending.end):
        raise ValueError(
            f"the cache holds {past} of {pending.end} tokens of a prompt that was to be read in pieces, but others "
            "followed, so its routes were never decided; start from an empty cache"
        )
    if end is None or (pending is None and keys >= end):
        return None
    return pending or Pieces(past, end, dense)
