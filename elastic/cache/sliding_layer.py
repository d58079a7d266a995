"""A layer of `ElasticCache` for the backbone's own sliding layers: transformers' own, with what a batch of requests
needs.

Legend: B samples, K KV heads, S tokens, D head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicSlidingWindowLayer


class SlidingLayer(DynamicSlidingWindowLayer):
    """Keys and values [B, K, S, D] of the last tokens that the next one sees."""

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values.

        Raises:
            ValueError: there are none yet.
        """
        if self.keys is None or self.values is None:
            raise ValueError("the cache is empty; run the prompt through the model first")
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.held) if self.is_initialized else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take in new tokens; keys and values that their queries see, also where more is recorded for a crop."""
        seen = self.sliding_window - 1 + key_states.shape[2]
        keys, values = super().update(key_states, value_states)
        return keys[:, :, -seen:], values[:, :, -seen:]

    def shrink(self) -> None:
        """Drop what was recorded for a crop that takes nothing back."""
        if self.record_past and self.is_initialized:
            self.keys, self.values = (held[:, :, -self.sliding_window + 1 :] for held in self.held)

    def select(self, index: Tensor) -> None:
        """Sample b becomes a copy of sample `index[b]`."""
        keys, values = self.held
        self.keys, self.values = keys[index.to(keys.device)], values[index.to(values.device)]

    def join(self, other: "SlidingLayer", seen: int) -> None:
        """Take in the samples of another cache, which end where one's own do.

        Args:
            seen: tokens of the longest sample; what lies before is padding.
        """
        kept = min(seen, self.sliding_window - 1)
        self.keys, self.values = (
            torch.cat([_last(mine, kept), _last(theirs, kept)])
            for mine, theirs in zip(self.held, other.held, strict=True)
        )
        self.cumulative_length = seen

    def reset(self) -> None:
        """Empty the layer."""
        self.cumulative_length, self.is_initialized = 0, False
        self.keys = self.values = None


def _last(held: Tensor, kept: int) -> Tensor:
    """The last `kept` tokens; zeros where there are fewer."""
    held = held[:, :, max(0, held.shape[2] - kept) :]
    return F.pad(held, (0, 0, kept - held.shape[2], 0))
