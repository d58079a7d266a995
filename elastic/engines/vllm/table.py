"""The table of routes: what is remembered of a request from its first step until it ends.

Legend: K KV heads, R numbers of reach in the layers so far.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

Span = tuple[int, int]


@dataclass
class RoutedRequest:
    """One request. It stays through preemption, when its keys are computed again under the routes that it has.

    Attributes:
        name: the engine's.
        prompt_tokens: length of its prompt.
        user: tokens [first, last) of it that the user wrote.
        layers: routes [K] by layer, as far as they are decided.
        reach_R: what routers by level must know of the layers so far.
    """

    name: str
    prompt_tokens: int
    user: Span
    layers: list[Tensor] = field(default_factory=list)
    reach_R: Tensor | None = None

    @property
    def msr(self) -> float:
        """Share of the heads decided so far that run sparse (docs/design.md eq. 4)."""
        return sum(float(route.float().mean()) for route in self.layers) / max(1, len(self.layers))


class RouteTable:
    """All requests that the engine's worker knows, and those of the step that it is about to run.

    Args:
        find_user: from prompt tokens to those that the user wrote.
    """

    def __init__(self, find_user: Callable[[list[int]], Span]) -> None:
        self.find_user = find_user
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

    def _known(self, name: str, prompt: list[int]) -> RoutedRequest:
        if name not in self.requests:
            self.requests[name] = RoutedRequest(name, len(prompt), self.find_user(prompt))
        return self.requests[name]
