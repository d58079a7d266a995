"""A layer of `ElasticCache` for the backbone's own layers of linear attention: transformers' own, with what a batch of
requests needs.

Such a layer keeps no keys: a state of the same size after any number of tokens, and the last inputs of its convolution.
It has no positions, so rows with padding on their left join as they are, and it cannot forget a token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from elastic.protocols import KVCache


def state_bytes(cache: KVCache) -> int:
    """Bytes of all states in a cache, for all its rows; 0 without linear attention."""
    return sum(_bytes(layer) for layer in cache.layers if isinstance(layer, LinearAttentionLayer))


def _bytes(layer: LinearAttentionLayer) -> int:
    return sum(state.nbytes for kind in _kinds(layer) for state in kind.values() if state is not None)


def _kinds(layer: LinearAttentionLayer) -> tuple[dict[int, Tensor | None], dict[int, Tensor | None]]:
    return layer.conv_states, layer.recurrent_states


class LinearLayer(LinearAttentionLayer):
    """States [B, ...] after all tokens so far."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return _bytes(self)

    def select(self, index: Tensor) -> None:
        """Sample b becomes a copy of sample `index[b]`."""
        for kind in _kinds(self):
            for number, state in kind.items():
                kind[number] = None if state is None else state[index.to(state.device)]

    def join(self, other: "LinearLayer", _seen: int) -> None:
        """Take in the samples of another cache."""
        for mine, theirs in zip(_kinds(self), _kinds(other), strict=True):
            for number, state in mine.items():
                joining = theirs[number]
                if state is not None and joining is not None:
                    mine[number] = torch.cat([state, joining])

    def reset(self) -> None:
        """Empty the layer; the next batch may have another number of rows."""
        states: Any = self
        states.__init__(self.number_of_states)
