"""An engine in another process, as the HTTP side of a server sees it.

Python runs one thread of a process at a time, and streams take as much of it as the model's launches do. So the model
and its engine have one process, HTTP has another, and between them goes one message for all that a step has to say.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple

from elastic.data.prompts import EncodedPrompt
from elastic.inference.serving.engine import Engine
from elastic.inference.serving.jobs import Event, Job, QueueFullError, Sampling, check_room
from elastic.inference.serving.metrics import Metrics
from elastic.protocols import Tokenizer

_log = logging.getLogger(__name__)
_ENDED = "the process of the model has ended; the server stops, see what it wrote"
_STOPPED = "the engine has stopped; see what the server wrote, and start it again"


class Ready(NamedTuple):
    """The first message to the HTTP side: a model's configuration, and its tokenizer."""

    config: Any
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Listening:
    """The first message from the HTTP side: requests are taken from now on."""


class Request(NamedTuple):
    """A job as the engine is asked for it; numbers go up by one."""

    number: int
    prompt: EncodedPrompt
    limit: int
    sampling: Sampling
    stops: tuple[str, ...]
    deadline: float


class Cancel(NamedTuple):
    """Nobody wants this answer any more."""

    number: int


@dataclass(frozen=True)
class Close:
    """Answer what was taken, and stop."""


class News(NamedTuple):
    """All that the engine has to say since it last spoke.

    Attributes:
        received: number of the last request that has come.
        waiting: numbers of those in the queue.
        events: of jobs: number, tokens made so far, what happened.
        figures: for `Metrics`: method and arguments.
        closed: whether this is the last message: the engine answers no more requests.
    """

    received: int
    waiting: tuple[int, ...]
    events: list[tuple[int, int, Event]]
    figures: list[tuple[str, tuple[float, ...]]]
    closed: bool = False


class RemoteEngine:
    """Has what the application needs of an `Engine`; made and used within a running event loop.

    Args:
        connection: to a `Host`, which has said that it is ready.
        ready: what it said.
        metrics: told what the other side counts.
        max_queue: requests that may wait; one more is refused.
        lost: called when the other process has ended and was not asked to.
    """

    def __init__(
        self, connection: Connection, ready: Ready, metrics: Metrics, max_queue: int, lost: Callable[[], None]
    ) -> None:
        self.model: Any = SimpleNamespace(config=ready.config)
        self.tokenizer, self.metrics, self.max_queue = ready.tokenizer, metrics, max_queue
        self._connection, self._lost = connection, lost
        self._jobs: dict[int, Job] = {}
        self._sent, self._received, self._queue = 0, 0, tuple[int, ...]()
        self._closing, self._over, self._answered = False, threading.Event(), False
        self._loop, self._outgoing = asyncio.get_running_loop(), SimpleQueue[Any]()
        # Threads, for what is sent may wait until the other side has read what came before, and it until this one has.
        for work in (self._hear, self._say):
            threading.Thread(target=work, name="elastic-remote", daemon=True).start()
        self._outgoing.put(Listening())

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""
        return not self._closing and not self._over.is_set()

    @property
    def waiting(self) -> int:
        """Requests in the queue or on their way to it, without those that nobody waits for any more."""
        numbers = (*self._queue, *range(self._received + 1, self._sent + 1))
        return sum(number in self._jobs and self._jobs[number].given_up is None for number in numbers)

    def submit(self, *jobs: Job) -> None:
        """Queue a request: all of its jobs, or none.

        Raises:
            QueueFullError: too many wait already, or the server is shutting down.
        """
        if not self.alive:
            raise QueueFullError("the server is shutting down" if self._closing else _STOPPED)
        check_room(self.waiting, len(jobs), self.max_queue)
        requests = []
        for job in jobs:
            self._sent += 1
            self._jobs[self._sent] = job
            job.cancelled = _Relayed(self._sent, self._cancel)
            requests.append(Request(self._sent, job.prompt, job.limit, job.sampling, job.stops, job.deadline))
        self._outgoing.put(requests)

    def close(self, seconds: float) -> bool:
        """Let what was taken be answered, for `seconds` at most; whether everything was. From another thread."""
        self._closing = True
        self._outgoing.put(Close())
        return self._over.wait(seconds) and self._answered

    def _cancel(self, number: int) -> None:
        if number in self._jobs:  # else its end has been told
            self._outgoing.put(Cancel(number))

    def _say(self) -> None:
        with contextlib.suppress(OSError):  # `_hear` sees the end of the other side
            for message in iter(self._outgoing.get, None):
                self._connection.send(message)

    def _hear(self) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that has ended no longer listens
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._receive, self._connection.recv())
            except (EOFError, OSError):
                pass
            finally:
                self._outgoing.put(None)
                self._loop.call_soon_threadsafe(self._end)

    def _receive(self, news: News) -> None:
        try:
            for name, figures in news.figures:
                getattr(self.metrics, name)(*figures)
        except Exception:  # noqa: BLE001 - written down; answers do not depend on it
            _log.exception("a figure was not counted")
        self._received, self._queue = news.received, news.waiting
        for number, new_tokens, event in news.events:
            job = self._jobs.get(number)
            if job is None:  # it was told that there will be no answer
                continue
            job.new_tokens = new_tokens
            if event.kind != "text":
                del self._jobs[number]
            job.say(event.kind, event.text, **event.details)
        if news.closed:
            self._answered = self._closing
            self._over.set()
            self._fail(_STOPPED)

    def _end(self) -> None:
        """The other process has ended."""
        asked = self._closing
        self._over.set()
        self._fail(_ENDED)
        if not asked:
            self._lost()

    def _fail(self, message: str) -> None:
        """Tell those that still wait that there will be no answer."""
        jobs = list(self._jobs.values())
        self._jobs.clear()
        for job in jobs:
            job.fail(message)


AnyEngine = Engine | RemoteEngine


class _Relayed(threading.Event):
    """An event that is told elsewhere too when it is set."""

    def __init__(self, number: int, tell: Callable[[int], None]) -> None:
        super().__init__()
        self._number, self._tell = number, tell

    def set(self) -> None:
        super().set()
        self._tell(self._number)
