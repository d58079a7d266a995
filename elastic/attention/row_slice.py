"""Which part of each row a process holds, as routing and attention see it."""

from torch import Tensor

from elastic.attention.block_selection import density
from elastic.attention.head_plan import HeadPlan
from elastic.attention.routed import choose_blocks, routed_attention


class RowSlice:
    """Which part of each row this process holds: all of it. `elastic.training.context_parallel` has the other kind.

    Attributes:
        size, rank: number of equal slices of a row, and which of them is here.
    """

    size = 1
    rank = 0

    def sum(self, part: Tensor) -> Tensor:
        """Sum over the slices, with gradient."""
        return part

    def attend(
        self, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, route_NK: Tensor, plan: HeadPlan, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """`routed_attention` of the whole row; takes and returns this slice's tokens. Also the density [N, K] of its
        XAttention heads.
        """
        plan = choose_blocks(q_BHSD, k_BKSD, v_BKSD, route_NK, plan, scale)
        return routed_attention(q_BHSD, k_BKSD, v_BKSD, route_NK, plan, scale), density(plan)
