"""Routers by reach alone: without training or calibration, the heads that reach least run sparse (docs/design.md
section 3).

    logit[n, k] = STEEPNESS (1/2 - reach[n, k])

so a `sparsity_bias` of 1 moves the threshold by a tenth of a head's attention. The rival that shows what an order of
heads and a fit add to the signal itself.
Legend: N samples, K KV heads.
"""

import torch
from torch import Tensor, nn

from elastic.config import SparseConfig
from elastic.routing.router import STEEPNESS, Router


class ReachRouter(Router):
    """Decides each head by the attention that it puts on keys which a streaming head does not show it."""

    after_rope = True

    def with_earlier(
        self, largest_NK: Tensor, _recent_NK: Tensor, _earlier_NR: Tensor | None, dropped_NK: Tensor | None
    ) -> Tensor:
        """Largest reach [N, K]; none where a head's keys are not all there."""
        return largest_NK if dropped_NK is None else torch.where(dropped_NK, 0.0, largest_NK)

    def features(self, reach_NR: Tensor, _length_N: Tensor, _sparse: SparseConfig) -> Tensor:
        """The reach itself, [N, K]."""
        return reach_NR

    def with_length(self, reach_NR: Tensor, _log_N: Tensor) -> Tensor:
        """The reach itself, [N, K]."""
        return reach_NR

    def forward(self, reach_NK: Tensor) -> Tensor:
        """Logits [N, K, 2] (route 0 first), fp32."""
        sparse_NK = STEEPNESS * (0.5 - reach_NK.float())
        return torch.stack([torch.zeros_like(sparse_NK), sparse_NK], -1)

    def head_logits(self) -> list[nn.Parameter]:
        """None: nothing is learned."""
        return []

    def begin_at(self, _sparse_logit: float) -> None:
        """Nothing begins anywhere."""

    def begin_in_order(self, _place_K: Tensor, _level: float) -> None:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError("routers of kind reach follow no order of heads; use kind level, static or paper")
