"""What each head of each sample does: `HeadPlan`, with its layout all that one attention launch reads.

Legend: N samples, K KV heads.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.attention.layout import Layout
from elastic.attention.modes import BLOCK_SPARSE, mode_ids
from elastic.config import SparseConfig
from elastic.kernels import Pattern


def modes_of(route: Tensor, zero: int, one: int) -> Tensor:
    """int32; mode `one` where the route, bool, is 1, else `zero`."""
    if (zero, one) == (0, 1):  # as of full and streaming heads, in one launch
        return route.to(torch.int32)
    return torch.where(route, one, zero).to(torch.int32)


@dataclass(frozen=True)
class HeadPlan:
    """Metadata of one attention launch: mode per (sample, KV head), pattern sizes, and the layout.

    Attributes:
        mode_NK: int32, ids of `elastic.attention.modes`.
        sparse: pattern sizes and the two modes.
        layout: where the samples lie.
        gradient_share: share of the queries from which the kernels estimate the route's gradient; 1 is exact.
        bits: key blocks of the heads whose mode chooses them, see `elastic.kernels.block_bits`; None until
            `elastic.attention.block_selection` has chosen them from queries and keys.
        sinks_H: attention sinks, a logit for each query head that takes its share of every softmax; None: there are
            none.
    """

    mode_NK: Tensor
    sparse: SparseConfig
    layout: Layout
    gradient_share: float = 1.0
    bits: Tensor | None = None
    sinks_H: Tensor | None = None

    @classmethod
    def build(
        cls, route_NK: Tensor, sparse: SparseConfig, layout: Layout, gradient_share: float = 1.0,
        mode_NK: Tensor | None = None,
    ) -> "HeadPlan":  # fmt: skip
        """Plan of a route [N, K] in {0, 1}, on the route's device without synchronising; `mode_NK` where the modes of
        that route are known already.

        Raises:
            ValueError: a route of another number of samples.
        """
        samples = layout.row_N.shape[0]
        if route_NK.dim() != 2 or route_NK.shape[0] != samples:
            raise ValueError(
                f"route has shape {list(route_NK.shape)}, expected [{samples}, KV heads]: one row per sample of "
                "this batch; "
                "was the cache filled by another batch?"
            )
        if mode_NK is None or layout.queries == 1:  # which may run other modes
            zero, one = mode_ids(sparse, layout.queries)
            mode_NK = modes_of(route_NK.detach() > 0.5, zero, one)
        return cls(mode_NK, sparse, layout, gradient_share)

    @property
    def chooses_blocks(self) -> bool:
        """Whether key blocks must be chosen before some head of either mode can run."""
        return BLOCK_SPARSE in mode_ids(self.sparse, self.layout.queries)

    def pattern(self, scale: float) -> Pattern:
        """Sizes and softmax scale as the operators of `elastic.kernels` take them."""
        sparse = self.sparse
        return Pattern(sparse.sink, sparse.window, sparse.granule, sparse.block, scale)

    def flipped(self) -> "HeadPlan":
        """The plan in which every head runs its other mode."""
        return replace(self, mode_NK=sum(mode_ids(self.sparse, self.layout.queries)) - self.mode_NK)
