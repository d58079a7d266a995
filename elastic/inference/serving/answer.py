"""One request on its way through the engine, from its body to its answer; given up as soon as its client leaves."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from elastic.inference.serving.engine import Engine
from elastic.inference.serving.errors import RefusedError
from elastic.inference.serving.jobs import Event, Job, QueueFullError
from elastic.inference.serving.limits import ServerLimits
from elastic.inference.serving.metrics import Metrics
from elastic.inference.serving.protocol import ChatRequest, Envelope
from elastic.inference.serving.reading import PromptReader

_T = TypeVar("_T")


class Answer:
    """One request in the engine; `ask` makes it.

    Args:
        job: in the engine.
        events: news of the job.
        body: what was asked.
        model_name: served name.
        metrics: told when the first text comes.
    """

    def __init__(
        self, job: Job, events: "asyncio.Queue[Event]", body: ChatRequest, model_name: str, metrics: Metrics
    ) -> None:
        self.job, self.events, self.body, self.metrics = job, events, body, metrics
        self.envelope = Envelope(model_name)

    @classmethod
    async def ask(
        cls,
        engine: Engine,
        reader: PromptReader,
        metrics: Metrics,
        body: ChatRequest,
        model_name: str,
        limits: ServerLimits,
    ) -> "Answer":
        """Read the prompt and queue the request.

        Raises:
            RefusedError: a request that the engine cannot take.
        """
        deadline = time.monotonic() + limits.timeout
        if body.model != model_name:
            raise RefusedError(404, f"model {body.model!r} is not served here; use {model_name!r}", "model")
        wanted = body.limit or limits.max_new_tokens
        if wanted > limits.max_new_tokens:
            raise RefusedError(
                400, f"{wanted} new tokens were asked for; this server makes {limits.max_new_tokens}", "max_tokens"
            )
        prompt = await reader.read([message.plain() for message in body.messages])
        room = reader.room_after(len(prompt))
        if body.limit and wanted > room:
            raise RefusedError(
                400,
                f"the messages have {len(prompt)} tokens and {wanted} new ones were asked for, but this model reads at "
                f"most {len(prompt) + room}; shorten the messages, or set max_tokens to {room} or less",
                "max_tokens",
            )
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = Job(prompt, min(wanted, room), body.sampling, body.stops, deadline, _teller(events))
        try:
            engine.submit(job)
        except QueueFullError as error:
            raise RefusedError(429, f"{error}; try again later") from error
        return cls(job, events, body, model_name, metrics)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        prompt, new = len(self.job.prompt), self.job.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def next_event(self) -> Event:
        """The next news, or `RefusedError` for an error or when the time is up."""
        try:
            event = await asyncio.wait_for(self.events.get(), self.job.deadline + 1 - time.monotonic())
        except TimeoutError:
            self.job.cancelled.set()
            raise RefusedError(504, "the request timed out") from None
        except asyncio.CancelledError:
            self.job.cancelled.set()
            raise
        if event.kind == "error":
            raise RefusedError(event.details["status"], event.text)
        return event

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        texts, event = [], await self.next_event()
        self.metrics.first.observe(time.monotonic() - self.job.arrived)
        while event.kind == "text":
            texts.append(event.text)
            event = await self.next_event()
        return self.envelope.whole("".join(texts), event.text, self.usage, event.details)

    async def stream(self, event: Event) -> AsyncIterator[str]:
        """Server-sent events of the protocol, `elastic` with the routes in the last chunk of the text."""
        self.metrics.first.observe(time.monotonic() - self.job.arrived)
        try:
            yield _sse(self.envelope.piece({"role": "assistant", "content": ""}))
            while event.kind == "text":
                yield _sse(self.envelope.piece({"content": event.text}))
                event = await self.next_event()
            yield _sse(self.envelope.piece({}, event.text, elastic=event.details))
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield _sse(self.envelope.usage(self.usage))
            yield "data: [DONE]\n\n"
        except RefusedError as error:
            yield _sse(error.body())
        finally:
            self.job.cancelled.set()  # the client went away, or all is said


async def while_listening(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns; it is cancelled when the client leaves before.

    Raises:
        RefusedError: the client left (status 499, which nobody will read).
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RefusedError(499, "the client closed the connection")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _teller(events: "asyncio.Queue[Event]") -> Callable[[Event], None]:
    """Puts events into a queue of this loop from another thread; a loop that has ended no longer listens."""
    loop = asyncio.get_running_loop()

    def tell(event: Event) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    return tell


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
