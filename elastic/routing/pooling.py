"""Boundary pooling: which of the user's words the router sees, and the sums of their keys (docs/design.md section 3).

Legend: N samples, P pooled tokens at either end of the prompt, M = N * 2P, K KV heads, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.attention.layout import Layout
from elastic.attention.row_slice import RowSlice
from elastic.config import RouterConfig


@dataclass(frozen=True)
class BoundarySlots:
    """Which tokens the boundary pooling averages, per sample: P slots at the start of what the user wrote and P at its
    end.

    A text shorter than 2P counts each token once: its end slots that fall among the first P tokens weigh 0.

    Attributes:
        index_N2P: key positions in the row, clamped into it where the weight is 0.
        weight_N2P: 1.0 for slots that count, else 0.0.
    """

    index_N2P: Tensor
    weight_N2P: Tensor

    @classmethod
    def of(cls, begin_N: Tensor, end_N: Tensor, pool_tokens: int) -> "BoundarySlots":
        """Slots of the texts [begin, end), in int64 row positions; no host synchronisation."""
        step = torch.arange(pool_tokens, device=begin_N.device)
        first = begin_N[:, None] + step
        last = end_N[:, None] - pool_tokens + step
        weight = torch.cat([first < end_N[:, None], last >= begin_N[:, None] + pool_tokens], dim=1)
        index = torch.cat([first, last], dim=1)
        return cls(torch.where(weight, index, begin_N[:, None]), weight.float())


def half_sums(keys_N2PKD: Tensor, weight_N2P: Tensor) -> Tensor:
    """Sums of the P slots at the start and of the P at the end, in fp32, [N, 2, K, D]."""
    sums: Tensor = (keys_N2PKD.float() * weight_N2P[:, :, None, None]).unflatten(1, (2, -1)).sum(2)
    return sums


@dataclass(frozen=True)
class Pooling:
    """Which of the tokens here are pooled; the same in all layers.

    Attributes:
        token_M: place of the N * 2P pooled tokens among all tokens here.
        weight_N2P: 1.0 for those that count, else 0.0.
        first_N: number of tokens among the first P that were pooled so far, in earlier turns and other slices too.
        last_N: number of tokens among the last P that were pooled so far, in earlier pieces and other slices too.
        count_N11: number of pooled tokens per sample, those of earlier turns and other slices included; at least 1.
    """

    token_M: Tensor
    weight_N2P: Tensor
    first_N: Tensor
    last_N: Tensor
    count_N11: Tensor

    @classmethod
    def shared(
        cls, layout: Layout, config: RouterConfig, here: int, row_slice: RowSlice, earlier_N: Tensor | None = None,
        earlier_last_N: Tensor | None = None,
    ) -> "Pooling":  # fmt: skip
        """The pooling of all layers of a forward pass, made by the first of them."""
        earlier = (earlier_N, earlier_last_N)
        return layout.memo(("pooling", config, here), lambda: cls.of(layout, config, here, row_slice, *earlier))

    @classmethod
    def of(
        cls, layout: Layout, config: RouterConfig, here: int, row_slice: RowSlice, earlier_N: Tensor | None = None,
        earlier_last_N: Tensor | None = None,
    ) -> "Pooling":  # fmt: skip
        """For a slice of `here` tokens of every row; `earlier_N` is `first_N` of the turn or piece before,
        `earlier_last_N` is `last_N` of the piece before. Generated tokens among the first P were never pooled and do
        not count.
        """
        spans = {"user": (layout.user_begin_N, layout.user_end_N), "prompt": (layout.begin_N, layout.prompt_end_N)}
        slots = BoundarySlots.of(*spans[config.pool_over], config.pool_tokens)
        position = slots.index_N2P - layout.past - row_slice.rank * here
        weight = slots.weight_N2P * ((position >= 0) & (position < here))
        token = layout.row_N[:, None] * here + position.clamp(0, here - 1)
        counted = slots.weight_N2P * (slots.index_N2P >= layout.past) * (slots.index_N2P < layout.keys)
        first, last = counted.unflatten(1, (2, -1)).sum(2).unbind(1)
        first = first if earlier_N is None else first + earlier_N
        last = last if earlier_last_N is None else last + earlier_last_N
        return cls(token.flatten(), weight, first, last, (first + last).clamp_min(1.0)[:, None, None])
