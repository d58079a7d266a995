"""The table of routes: what is remembered of a request from its first step until it ends.

Legend: L layers, K KV heads here, G query heads of a KV head, Q queries that reach looks at.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elastic.config import ElasticConfig, SparseConfig
from elastic.routing.pooling import Pooling
from elastic.routing.sparsity import causal_pairs, esr

Span = tuple[int, int]


def streams(route: Tensor, sparse: SparseConfig) -> Tensor:
    """Which heads run streaming under these routes, bool of their shape."""
    return route.bool() == (sparse.route1 == "streaming")


@dataclass
class RoutedRequest:
    """One request. It stays through preemption, when its keys are computed again under the routes that it has.

    Attributes:
        name: the engine's.
        prompt_tokens: length of its prompt.
        user: tokens [first, last) of it that the user wrote.
        layers: routes [K] by layer, as far as they are decided.
        reach_R: what routers by level must know of the layers so far.
        dense_until: prompt tokens of chunks before the decision; they run dense, now and when they are computed again.
        read: prompt tokens that are computed so far.
        cached: those of them that came from the prefix cache.
        mass: by layer [K, G, Q], what routers by reach saw of the user's last queries so far.
        pooling: which of its tokens routers pool, once a layer has asked.
        modes: what `ModeTable` made of its routes.
    """

    name: str
    prompt_tokens: int
    user: Span
    layers: list[Tensor] = field(default_factory=list)
    reach_R: Tensor | None = None
    dense_until: int = 0
    read: int = 0
    cached: int = 0
    mass: dict[int, Tensor] = field(default_factory=dict)
    pooling: Pooling | None = None
    modes: dict[bool, Tensor] = field(default_factory=dict)

    def begin_chunk(self, past: int, length: int) -> None:
        """Note that tokens [past, length) are computed next, before the routes are decided: dense, unless the prompt
        ends among them.
        """
        if past != self.read:  # the first chunk, also after preemption
            self.cached = past
        self.read = length
        self.dense_until = length if length < self.prompt_tokens else past

    @property
    def dense_tokens(self) -> int:
        """Prompt tokens that ran dense in chunks before the decision; what the prefix cache gave is none of them."""
        return self.dense_until if self.dense_until > self.cached else 0

    def esr(self, sparse: SparseConfig, route_LK: Tensor) -> float:
        """Share of the prompt's visible query-key pairs that no head computed, over all layers (docs/design.md eq. 5).
        Dense chunks computed all of theirs.
        """
        begin, end = self.dense_tokens, self.prompt_tokens
        _, of_routed = esr(route_LK.float()[:, None], torch.tensor([end]), sparse, begin_N=torch.tensor([begin]))
        return float(of_routed) * (1 - causal_pairs(begin) / causal_pairs(end))


class RouteTable:
    """All requests that the engine's worker knows, and those of the step that it is about to run.

    Args:
        find_user: from prompt tokens to those that the user wrote.
        config: settings of the routers.
        fixed: whether the same routes hold for every input, so that the first chunk of a prompt knows them.
    """

    def __init__(self, find_user: Callable[[list[int]], Span], config: ElasticConfig, fixed: bool = False) -> None:
        self.find_user, self.config, self.fixed = find_user, config, fixed
        self.requests: dict[str, RoutedRequest] = {}
        self._step: list[RoutedRequest] = []

    def forget(self, names: Iterable[str]) -> None:
        """Drop requests that have finished or were aborted; a name may come again for another one."""
        for name in names:
            self.requests.pop(name, None)

    def begin_step(self, batch: Iterable[tuple[str, list[int]]]) -> None:
        """Note the requests of the next step in the order of the batch, each with its prompt."""
        self._step = [self._known(name, prompt) for name, prompt in batch]

    def take_step(self) -> list[RoutedRequest]:
        """Requests of the step that begins; none for steps of the engine's own, such as those that measure memory."""
        step, self._step = self._step, []
        return step

    def undecided(self) -> bool:
        """Whether a request of the step that begins has no routes yet, so that layers must decide in it."""
        return any(not request.layers for request in self._step)

    def _known(self, name: str, prompt: list[int]) -> RoutedRequest:
        if name not in self.requests:
            self.requests[name] = RoutedRequest(name, len(prompt), self.find_user(prompt))
        return self.requests[name]
