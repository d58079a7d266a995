"""Decode steps replayed as one CUDA graph: no Python, no launches, the same numbers.

A decode step over an `ElasticCache` has fixed shapes and reads nothing back, so it is captured once and replayed until
the cache grows.
"""

from typing import Any

import torch
from torch import Tensor

from elastic.elastic_cache import ElasticCache


class DecodeGraph:
    """Runs decode steps of one generation.

    Args:
        model: an attached model in eval mode on a GPU that the decode kernel runs on.
        cache: filled by the prompt; routes, overrides and settings must stay as they are.
    """

    def __init__(self, model: Any, cache: ElasticCache) -> None:
        self.model, self.cache = model, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.version = -1
        self.token_B1 = self.logits_B1V = torch.zeros(0)

    @torch.no_grad()
    def step(self, token_B1: Tensor) -> Tensor:
        """Append a token [B, 1] and return the logits [B, 1, V] that follow it; the next step overwrites them."""
        if self.cache.steps_left < 1 or self.version != self.cache.version:
            self.graph = None
            logits = self._run(token_B1)  # grows the storage, and warms up what a capture must find in place
            self.version = self.cache.version
            return logits
        if self.graph is None:
            self._capture(token_B1)
        else:
            self.token_B1.copy_(token_B1)
            self.cache.advance()
        assert self.graph is not None
        self.graph.replay()
        return self.logits_B1V

    def _run(self, token_B1: Tensor) -> Tensor:
        position = self.cache.count_B[:, None].clone()
        return self.model(token_B1, position_ids=position, past_key_values=self.cache, use_cache=True).logits

    def _capture(self, token_B1: Tensor) -> None:
        """Record a step without running it; on the host it counts, the replay does the rest."""
        self.token_B1, self.graph = token_B1.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_B1V = self._run(self.token_B1)
