"""The engine's side of a server in two processes: requests come in, and news go out, one message for a whole step."""

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

from elastic.inference.serving.engine import Engine
from elastic.inference.serving.jobs import Event, Job, QueueFullError
from elastic.inference.serving.metrics import Figures
from elastic.inference.serving.remote import Cancel, Close, Listening, News, Ready, Request

_MOMENT = 0.5  # seconds that an engine with nothing to do has to stop in


class Host:
    """Runs an engine for a `RemoteEngine` at the other end of a connection.

    Args:
        connection: to it.
        make_engine: called with the metrics, and with what the engine calls when it has told its news.
    """

    def __init__(
        self, connection: Connection, make_engine: Callable[[Figures, Callable[[Engine], None]], Engine]
    ) -> None:
        self._connection, self._jobs, self._received = connection, dict[int, Job](), 0
        self._figures, self._events = Figures(), list[tuple[int, int, Event]]()
        self._queue, self._telling = tuple[int, ...](), threading.RLock()
        self.engine = make_engine(self._figures, self._tell)

    def run(self, listening: Callable[[], None] = lambda: None) -> None:
        """Take requests until the other side is gone.

        Args:
            listening: called when it takes requests.
        """
        threading.Thread(target=self._watch, name="elastic-host", daemon=True).start()
        with contextlib.suppress(EOFError, OSError):
            self._connection.send(Ready(self.engine.model.config, self.engine.tokenizer))
            while True:
                message = self._connection.recv()
                if isinstance(message, Listening):
                    listening()
                else:
                    self._take(message)
        self.engine.close(_MOMENT)

    def _watch(self) -> None:
        """Say so when the engine has stopped, as it was asked to or by an error of its own."""
        self.engine.join()
        self._tell(self.engine, closed=True)

    def _take(self, message: Cancel | Close | list[Request]) -> None:
        if isinstance(message, Cancel):
            job = self._jobs.get(message.number)
            if job is not None:
                job.cancelled.set()
        elif isinstance(message, Close):
            self.engine.close(0.0)
        else:
            self._submit(message)

    def _submit(self, requests: list[Request]) -> None:
        jobs = []
        for number, prompt, limit, sampling, stops, deadline in requests:
            job = Job(prompt, limit, sampling, stops, deadline, partial(self._event, number), number=number)
            self._jobs[number], self._received = job, number
            jobs.append(job)
        try:
            self.engine.submit(*jobs)
        except QueueFullError as error:
            for job in jobs:
                job.fail(f"{error}; try again later", 429)
        self._tell(self.engine)

    def _event(self, number: int, event: Event) -> None:
        with self._telling:
            job = self._jobs[number] if event.kind == "text" else self._jobs.pop(number)
            self._events.append((number, job.new_tokens, event))

    def _tell(self, engine: Engine, closed: bool = False) -> None:
        """Send what is new."""
        with self._telling:
            queue = tuple(job.number for job in engine.queue)
            events, self._events = self._events, []
            figures = self._figures.take()
            if events or figures or queue != self._queue or closed:
                self._queue = queue
                with contextlib.suppress(OSError):  # `run` sees the end of the other side
                    self._connection.send(News(self._received, queue, events, figures, closed))
