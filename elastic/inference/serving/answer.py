"""One request on its way through the engine, from its body to its answer; given up as soon as its client leaves."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from elastic.data.prompts import check_length, encode_messages
from elastic.inference.serving.engine import Engine
from elastic.inference.serving.errors import RefusedError
from elastic.inference.serving.jobs import Event, Job, QueueFullError, Sampling
from elastic.inference.serving.limits import ServerLimits
from elastic.inference.serving.metrics import Metrics
from elastic.inference.serving.protocol import ChatRequest, Envelope

_T = TypeVar("_T")


class Answer:
    """One request in the engine.

    Args:
        engine: that answers.
        metrics: told when the first text comes.
        body: what was asked.
        model_name: served name.
        limits: of a request.

    Raises:
        RefusedError: a request that the engine cannot take.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, body: ChatRequest, model_name: str, limits: ServerLimits
    ) -> None:
        if body.model != model_name:
            raise RefusedError(404, f"model {body.model!r} is not served here; use {model_name!r}", "model")
        wanted = body.limit or limits.max_new_tokens
        if wanted > limits.max_new_tokens:
            raise RefusedError(
                400, f"{wanted} new tokens were asked for; this server makes {limits.max_new_tokens}", "max_tokens"
            )
        try:
            prompt = encode_messages([message.plain() for message in body.messages], engine.tokenizer)
            room = engine.model.config.max_position_embeddings - len(prompt)
            limit = wanted if body.limit else max(1, min(wanted, room))
            check_length([prompt], engine.model, limit)
        except ValueError as error:
            raise RefusedError(400, str(error), "messages") from error
        sampling = Sampling(body.temperature, body.top_p, body.seed, body.sparsity_bias)
        if body.temperature == 0:
            sampling = Sampling(sparsity_bias=body.sparsity_bias)
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.body, self.envelope, self.metrics = body, Envelope(model_name), metrics
        deadline = time.monotonic() + limits.timeout
        self.job = Job(prompt, limit, sampling, body.stops, deadline, _teller(self.events))
        try:
            engine.submit(self.job)
        except QueueFullError as error:
            raise RefusedError(429, f"{error}; try again later") from error

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
