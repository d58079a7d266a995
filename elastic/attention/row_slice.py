"""Which part of each row a process holds, as routing and attention see it."""

from torch import Tensor

from elastic.attention.routed import routed_attention


class RowSlice:
    """Which part of each row this process holds: all of it. `elastic.training.context_parallel` has the other kind.

    Attributes:
        size, rank: number of equal slices of a row, and which of them is here; where it does not divide the row, the
            last slices reach beyond its end.
        attend: `routed_attention` of the whole row; takes and returns this slice's tokens, with the density of all
            heads.
    """

    size = 1
    rank = 0
    attend = staticmethod(routed_attention)

    def sum(self, part: Tensor) -> Tensor:
        """Sum over the slices, with gradient."""
        return part
