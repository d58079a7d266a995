"""One request on its way through the engine, from its body to its answer; given up as soon as its client leaves."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from elastic.inference.serving.errors import RefusedError
from elastic.inference.serving.jobs import Event, Job, QueueFullError
from elastic.inference.serving.limits import ServerLimits
from elastic.inference.serving.mail import Mail
from elastic.inference.serving.metrics import Metrics
from elastic.inference.serving.protocol import ChatRequest, Envelope
from elastic.inference.serving.reading import PromptReader
from elastic.inference.serving.remote import AnyEngine

_T = TypeVar("_T")
News = tuple[int, Event]  # and of which choice


class Answer:
    """One request in the engine; `ask` makes it.

    Args:
        jobs: in the engine, one for each choice.
        events: news of the jobs, each with the number of its choice.
        body: what was asked.
        model_name: served name.
        metrics: told when the first text comes.
    """

    def __init__(
        self, jobs: list[Job], events: "asyncio.Queue[News]", body: ChatRequest, model_name: str, metrics: Metrics
    ) -> None:
        self.jobs, self.events, self.body, self.metrics = jobs, events, body, metrics
        self.envelope = Envelope(model_name)
        # The engine says so itself; this is for one that does not come round to it.
        late = 0, Event("error", "the request timed out", {"status": 504})
        wait = jobs[0].deadline + 1 - time.monotonic()
        self._late = asyncio.get_running_loop().call_later(wait, events.put_nowait, late)

    @classmethod
    async def ask(
        cls,
        engine: AnyEngine,
        reader: PromptReader,
        mail: Mail,
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
        prompt = await reader.read([message.plain() for message in body.messages], body.chat_template_kwargs)
        room = reader.room_after(len(prompt))
        if body.limit and wanted > room:
            raise RefusedError(
                400,
                f"the messages have {len(prompt)} tokens and {wanted} new ones were asked for, but this model reads at "
                f"most {len(prompt) + room}; shorten the messages, or set max_tokens to {room} or less",
                "max_tokens",
            )
        events: asyncio.Queue[News] = asyncio.Queue()
        jobs = [
            Job(prompt, min(wanted, room), sampling, body.stops, deadline, _teller(mail, events, choice))
            for choice, sampling in enumerate(body.samplings)
        ]
        try:
            engine.submit(*jobs)
        except QueueFullError as error:
            raise RefusedError(429, f"{error}; try again later") from error
        return cls(jobs, events, body, model_name, metrics)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read, once for all choices, and written."""
        prompt, new = len(self.jobs[0].prompt), sum(job.new_tokens for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def next_event(self) -> News:
        """The next news, or `RefusedError` for an error of any choice."""
        try:
            choice, event = await self.events.get()
            if event.kind == "error":
                raise _refusal(event)
            return choice, event
        except (asyncio.CancelledError, RefusedError):
            self._leave()
            raise

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        texts: list[list[str]] = [[] for _ in self.jobs]
        ends: dict[int, Event] = {}
        choice, event = await self.next_event()
        self.metrics.first.observe(time.monotonic() - self.jobs[0].arrived)
        while True:
            if event.kind == "text":
                texts[choice].append(event.text)
            else:
                ends[choice] = event
                if len(ends) == len(self.jobs):
                    break
            choice, event = await self.next_event()
        self._leave()
        choices = [("".join(parts), ends[number].text) for number, parts in enumerate(texts)]
        return self.envelope.whole(choices, self.usage, event.details)  # routes are the prompt's, the same for all

    async def stream(self, news: News) -> AsyncIterator[str]:
        """Server-sent events of the protocol, `elastic` with the routes in the last chunk of each choice's text. What
        has come by the time that it can be sent goes out in one piece.
        """
        self.metrics.first.observe(time.monotonic() - self.jobs[0].arrived)
        begun, left = set[int](), len(self.jobs)
        try:
            while True:
                told = ""
                for choice, event in (news, *self._come()):
                    if event.kind == "error":
                        if told:
                            yield told
                        raise _refusal(event)
                    told += self._chunks(choice, event, choice not in begun)
                    begun.add(choice)
                    left -= event.kind == "end"
                if not left:
                    break
                yield told
                news = await self.next_event()
            if self.body.stream_options and self.body.stream_options.include_usage:
                told += _sse(self.envelope.usage(self.usage))
            yield f"{told}data: [DONE]\n\n"
        except RefusedError as error:
            yield _sse(error.body())
        finally:
            self._leave()  # the client went away, or all is said

    def _chunks(self, choice: int, event: Event, first: bool) -> str:
        head = _sse(self.envelope.piece({"role": "assistant", "content": ""}, choice)) if first else ""
        if event.kind == "text":
            return head + _sse(self.envelope.piece({"content": event.text}, choice))
        return head + _sse(self.envelope.piece({}, choice, event.text, elastic=event.details))

    def _come(self) -> list[News]:
        """News that are there already."""
        return [self.events.get_nowait() for _ in range(self.events.qsize())]

    def _leave(self) -> None:
        self._late.cancel()
        for job in self.jobs:
            job.cancelled.set()


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


def _teller(mail: Mail, events: "asyncio.Queue[News]", choice: int) -> Callable[[Event], None]:
    """Sends events of a choice to a queue."""
    return lambda event: mail.send(events, (choice, event))


def _refusal(event: Event) -> RefusedError:
    return RefusedError(event.details["status"], event.text)


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
