"""Decode steps of a stock model that pay neither for a growing cache nor for Python: the dense rival of
`elastic.inference.decode_graph`.

transformers' DynamicCache copies all keys and values for every new token, and its StaticCache wants a mask, under which
SDPA's fast backends do not run. Here a step writes its token into the last place of a cache that has room for it, and
attention reads the whole cache without a mask, as for one token it may. All steps of a timing write that same place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from elastic.cache.keyword import given
from elastic.protocols import CausalLM

_UNMASKED_SDPA = "elastic-bench-unmasked"


class LastPlaceLayer(DynamicLayer):
    """Keys and values [B, K, S + 1, D] of a filled layer; the token that comes goes to place S."""

    keys: Tensor
    values: Tensor

    def __init__(self, filled: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers annotates no constructor of a layer
        self.dtype, self.device, self.is_initialized = filled.keys.dtype, filled.keys.device, True
        self.keys, self.values = (torch.cat([x, x[:, :, -1:]], 2) for x in (filled.keys, filled.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the token in place."""
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before the one that comes."""
        return self.keys.shape[2] - 1


def give_room(cache: Cache) -> None:
    """Turn a filled DynamicCache into one whose steps write in place, layer by layer."""
    for index, layer in enumerate(cache.layers):
        cache.layers[index] = LastPlaceLayer(layer)


def in_place_step(model: CausalLM, cache: Cache) -> Callable[[Tensor], Tensor]:
    """Logits [1, 1, V] of a token [1, 1], over a cache that `give_room` made."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_UNMASKED_SDPA, sdpa_attention_forward)
    AttentionMaskInterface.register(_UNMASKED_SDPA, lambda **_settings: None)

    @torch.no_grad()
    def step(token_B1: Tensor) -> Tensor:
        before = model.config._attn_implementation
        model.set_attn_implementation(_UNMASKED_SDPA)
        try:
            return model(token_B1, use_cache=True, **given(cache)).logits
        finally:
            model.set_attn_implementation(before)

    return step


def captured(step: Callable[[Tensor], Tensor], token_B1: Tensor) -> Callable[[Tensor], Tensor]:
    """The step as a CUDA graph; the next call overwrites the logits it returns."""
    step(token_B1)  # what a capture must find in place
    place, graph = token_B1.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(place)

    def replay(token: Tensor) -> Tensor:
        place.copy_(token)
        graph.replay()
        return logits

    return replay
