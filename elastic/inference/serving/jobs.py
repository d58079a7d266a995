"""What goes through the engine: a request, its sampling settings, and the news of it."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from elastic.data.prompts import EncodedPrompt
from elastic.inference.stepwise import Asked

_log = logging.getLogger(__name__)


class Sampling(NamedTuple):
    """How the tokens of an answer are drawn, and its routes; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    sparsity_bias: float | None = None

    def options(self) -> dict[str, Any]:
        """Options of `model.generate`."""
        options: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return options


class Event(NamedTuple):
    """News of a request: `text` (more of the answer), `end` (finish reason; `details`: its routes) or `error` (message;
    `details`: the HTTP status).
    """

    kind: str
    text: str
    details: dict[str, Any] = {}  # noqa: RUF012 - never written to


@dataclass(eq=False)
class Job:
    """One request in the engine.

    Attributes:
        prompt: in tokens.
        limit: new tokens at most.
        sampling: how tokens are drawn.
        stops: texts that end the answer and are not part of it.
        deadline: `time.monotonic()` after which it is given up.
        tell: called with every `Event`, from the engine's thread.
        new_tokens: tokens made so far.
        cancelled: set by whoever no longer wants the answer.
        ended: its last event was told.
        number: under which another process knows it.
    """

    prompt: EncodedPrompt
    limit: int
    sampling: Sampling
    stops: tuple[str, ...]
    deadline: float
    tell: Callable[[Event], None]
    new_tokens: int = 0
    arrived: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: bool = False
    number: int = 0

    @property
    def asked(self) -> Asked:
        """As it is begun."""
        return Asked(self.prompt, self.limit, self.sampling.seed, self.sampling.options())

    @property
    def given_up(self) -> str | None:
        """Why nobody waits for the answer any more, or None."""
        if self.cancelled.is_set():
            return "cancelled"
        return "timeout" if time.monotonic() > self.deadline else None

    def say(self, kind: str, text: str, **details: Any) -> None:
        """Tell the caller, once at most how it ended; a listener that fails harms nobody but itself."""
        if self.ended:
            return
        self.ended = kind != "text"
        try:
            self.tell(Event(kind, text, details))
        except Exception:  # noqa: BLE001 - written down
            _log.exception("a listener failed")

    def give_up(self, reason: str, when: str) -> None:
        """Tell the caller that it was `given_up`."""
        if reason == "cancelled":
            self.fail(f"the request was cancelled {when}", 499)
        else:
            self.fail(f"the request timed out {when}", 504)

    def fail(self, message: str, status: int = 500) -> None:
        """Tell the caller that there will be no answer."""
        self.say("error", message, status=status)


class QueueFullError(Exception):
    """As many requests wait as the engine lets wait."""


def check_room(waiting: int, more: int, most: int) -> None:
    """Whether more requests may wait.

    Raises:
        QueueFullError: they would be more than `most`.
    """
    if waiting + more > most:
        at_once = f", and {more} more came at once" if more > 1 else ""
        raise QueueFullError(f"{waiting} requests are waiting{at_once}; this server lets {most} wait")
