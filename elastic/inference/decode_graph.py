"""Decode steps replayed as one CUDA graph: no Python, no launches, the same numbers.

A decode step over an `ElasticCache` has fixed shapes and reads nothing back, so it is captured once and replayed until
the cache grows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from elastic.attention.routed import backend_for
from elastic.cache.elastic_cache import ElasticCache
from elastic.cache.frame import Frame
from elastic.cache.keyword import cache_of, given
from elastic.cache.kv_pool import upload
from elastic.cache.route_record import route_of
from elastic.config import SparseConfig
from elastic.model.attach import elastic_config, is_reading
from elastic.model.fused_parts import always_fused
from elastic.model.layer_types import stock_layers
from elastic.model.long_rope import check_one_rotation, switch_lengths
from elastic.protocols import CausalLM, CausalLMOutput


class DecodeGraph:
    """Runs decode steps of one generation.

    Args:
        model: an attached model in eval mode on a GPU that the decode kernel runs on.
        cache: filled by the prompt; routes, overrides and settings must stay as they are.
    """

    def __init__(self, model: CausalLM, cache: ElasticCache) -> None:
        self.forward, self.cache, self.switches = model.forward, cache, switch_lengths(model.config)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.version = -1
        self.token_B1 = self.logits_B1V = torch.zeros(0)

    @torch.no_grad()
    def step(self, token_B1: Tensor) -> Tensor:
        """Append a token [B, 1] and return the logits [B, 1, V] that follow it; the next step overwrites them."""
        if self.switches:  # a replay runs no hook
            check_one_rotation(self.switches, route_of(self.cache).rotation, max(self.cache.counts) + 1)
        if self.cache.steps_left < 1 or self.version != self.cache.version:
            self.graph = None
            logits = self.run(token_B1)  # grows the storage, and warms up what a capture must find in place
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

    def run(self, token_B1: Tensor) -> Tensor:
        """The same step, launched operation by operation, on any device."""
        position = self.cache.count_B[:, None].clone()
        with always_fused():  # also to warm up, and so that both ways give the same numbers
            found: CausalLMOutput = self.forward(token_B1, position_ids=position, use_cache=True, **given(self.cache))
        return found.logits

    def _capture(self, token_B1: Tensor) -> None:
        """Record a step without running it; on the host it counts, the replay does the rest."""
        self.token_B1, self.graph = token_B1.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_B1V = self.run(self.token_B1)


class RowGraphs:
    """Runs decode steps of a cache whose samples come and go, as graphs that outlive them: one for each number of rows,
    rounded up to a power of two, in which the first row fills those that are missing.

    Args:
        model: as for `DecodeGraph`.
        cache: filled by a prompt.
    """

    def __init__(self, model: CausalLM, cache: ElasticCache) -> None:
        self.model, self.cache = model, cache
        self._graphs: dict[int, tuple[Frame, DecodeGraph]] = {}
        self._shown, self._rows = -1, torch.zeros(0)  # at which version of the cache, and which rows

    @torch.no_grad()
    def step(self, token_B1: Tensor) -> Tensor:
        """Append a token [B, 1] and return the logits [B, 1, V] that follow it; the next step overwrites them."""
        self.cache.settle()
        if self.cache.steps_left < 1:
            return self.run(token_B1)  # grows the storage
        graph = self._graph(token_B1.shape[0])
        logits_B1V = graph.step(token_B1[self._rows])
        self.cache.count_step()
        return logits_B1V[: token_B1.shape[0]]

    def run(self, token_B1: Tensor) -> Tensor:
        """The same step, launched operation by operation, on any device."""
        return DecodeGraph(self.model, self.cache).run(token_B1)

    def _graph(self, rows: int) -> DecodeGraph:
        """The graph for so many rows, which shows those of the cache."""
        cache, size = self.cache, 1 << (rows - 1).bit_length()
        shown = [*range(rows), *[0] * (size - rows)]
        if self._shown != cache.version:
            self._graphs = {n: pair for n, pair in self._graphs.items() if pair[0].shares(cache)}
            if size in self._graphs:
                self._graphs[size][0].show(cache, shown)
            else:
                frame = Frame(cache, shown)
                self._graphs[size] = frame, DecodeGraph(self.model, frame)
            self._shown, self._rows = cache.version, upload(shown, cache.count_B.device)
        return self._graphs[size][1]


class _Graphed:
    """A model's forward that replays the decode steps of one cache; other calls go to the model as before."""

    def __init__(self, model: CausalLM, graph: DecodeGraph) -> None:
        self.model, self.graph = model, graph
        self.__wrapped__ = graph.forward  # `generate` reads the signature

    def __call__(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        cache = self.graph.cache
        ours = cache_of(kwargs) is cache and cache.seen > 0 and not is_reading(self.model)
        if not ours or input_ids is None or input_ids.shape[1] != 1:
            return self.graph.forward(input_ids, **kwargs)
        return CausalLMOutputWithPast(logits=self.graph.step(input_ids), **given(cache))


@contextmanager
def graphed(model: CausalLM, cache: ElasticCache) -> Iterator[None]:
    """Inside the context, `model.generate` over `cache` replays its decode steps as CUDA graphs.

    Positions are those of `generate`: a sample's tokens counted from its first valid one.
    """
    before = vars(model).get("forward")
    part: Any = model  # of which the protocol lets nobody assign a method
    part.forward = _Graphed(model, DecodeGraph(model, cache))
    try:
        with torch.cuda.device(model.device):  # whose stream is captured
            yield
    finally:
        del part.forward
        if before is not None:
            part.forward = before


def can_graph(model: CausalLM, head_dim: int, sparse: SparseConfig | None = None) -> bool:
    """Whether decode steps of this model run through the decode kernel, as a graph needs: in this process alone,
    without choosing key blocks, and with routers in all layers: caches of sliding ones grow by concatenation, as in
    transformers, and linear ones run its code.

    Args:
        sparse: modes and sizes that will be in force; default those that are.
    """
    alone = (getattr(model, "tp_size", None) or 1) == 1
    chooses = (sparse or elastic_config(model).sparse).chooses_in_steps
    if not alone or chooses or stock_layers(model.config):
        return False
    return not backend_for(model.device, model.dtype, head_dim).startswith("torch")
