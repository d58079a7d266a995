"""The HTTP application: an OpenAI-compatible chat endpoint over the engine, with limits, time-outs, health and metrics.

FastAPI rather than LitServe or transformers' server: LitServe fails a whole batch with one bad request, reports no
finish reason and has no bounded queue; transformers' server loads models itself, without routers.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from elastic.data.prompts import check_length, encode_messages
from elastic.inference.serving.engine import Engine
from elastic.inference.serving.jobs import Event, Job, QueueFullError, Sampling
from elastic.inference.serving.limits import MaxBody, ServerLimits
from elastic.inference.serving.metrics import Metrics
from elastic.inference.serving.protocol import ChatRequest, Envelope, error_body

_KINDS = {404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error", 504: "timeout_error"}
CHAT = "/v1/chat/completions"


class _RefusedError(Exception):
    """A request that gets an error, with its HTTP status."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


def build_app(model_name: str, limits: ServerLimits, make_engine: Callable[[Metrics], Engine]) -> FastAPI:
    """The application; its engine starts and stops with it.

    Args:
        model_name: under which clients ask for the model.
        limits: of a request.
        make_engine: called once at start.
    """
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = make_engine(metrics)
        yield
        await asyncio.to_thread(app.state.engine.close, limits.grace)

    app = FastAPI(title="Elastic Attention", lifespan=lifespan)
    app.add_middleware(MaxBody, limit=limits.max_body)
    app.add_exception_handler(_RefusedError, _on_refused)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)

    @app.post(CHAT)
    async def chat(body: ChatRequest, request: Request) -> Response:
        answer = _Answer(app.state.engine, metrics, body, model_name, limits)
        if not body.stream:
            return JSONResponse(await answer.whole(request))
        first = await answer.next_event()  # errors that come before any text get their HTTP status
        return StreamingResponse(answer.stream(first), media_type="text/event-stream")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model_name, "object": "model", "owned_by": "elastic"}]}

    @app.get("/health")
    async def health() -> Response:
        alive = app.state.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return PlainTextResponse(metrics.page(app.state.engine.waiting))

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        if request.url.path == CHAT:
            metrics.requests.labels(str(response.status_code)).inc()
        return response

    return app


class _Answer:
    """One request on its way through the engine."""

    def __init__(
        self, engine: Engine, metrics: Metrics, body: ChatRequest, model_name: str, limits: ServerLimits
    ) -> None:
        if body.model != model_name:
            raise _RefusedError(404, f"model {body.model!r} is not served here; use {model_name!r}", "model")
        wanted = body.limit or limits.max_new_tokens
        if wanted > limits.max_new_tokens:
            raise _RefusedError(
                400, f"{wanted} new tokens were asked for; this server makes {limits.max_new_tokens}", "max_tokens"
            )
        try:
            prompt = encode_messages([message.plain() for message in body.messages], engine.tokenizer)
            room = engine.model.config.max_position_embeddings - len(prompt)
            limit = wanted if body.limit else max(1, min(wanted, room))
            check_length([prompt], engine.model, limit)
        except ValueError as error:
            raise _RefusedError(400, str(error), "messages") from error
        sampling = Sampling(body.temperature, body.top_p, body.seed, body.sparsity_bias)
        if body.temperature == 0:
            sampling = Sampling(sparsity_bias=body.sparsity_bias)
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.body, self.envelope, self.metrics = body, Envelope(model_name), metrics
        self.job = Job(
            prompt,
            limit,
            sampling,
            body.stops,
            time.monotonic() + limits.timeout,
            _teller(self.events),
        )
        try:
            engine.submit(self.job)
        except QueueFullError as error:
            raise _RefusedError(429, f"{error}; try again later") from error

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        prompt, new = len(self.job.prompt), self.job.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def next_event(self) -> Event:
        """The next news, or `_RefusedError` for an error or when the time is up."""
        try:
            event = await asyncio.wait_for(self.events.get(), self.job.deadline + 1 - time.monotonic())
        except TimeoutError:
            self.job.cancelled.set()
            raise _RefusedError(504, "the request timed out") from None
        except asyncio.CancelledError:
            self.job.cancelled.set()
            raise
        if event.kind == "error":
            raise _RefusedError(event.details["status"], event.text)
        return event

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer in one piece; given up when the client goes away."""
        watcher = asyncio.create_task(self._cancel_if_gone(request))
        try:
            texts, event = [], await self.next_event()
            self.metrics.first.observe(time.monotonic() - self.job.arrived)
            while event.kind == "text":
                texts.append(event.text)
                event = await self.next_event()
        finally:
            watcher.cancel()
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
        except _RefusedError as error:
            yield _sse(error_body(str(error), _kind(error.status)))
        finally:
            self.job.cancelled.set()  # the client went away, or all is said

    async def _cancel_if_gone(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)
        self.job.cancelled.set()


def _teller(events: "asyncio.Queue[Event]") -> Callable[[Event], None]:
    """Puts events into a queue of this loop from another thread; a loop that has ended no longer listens."""
    loop = asyncio.get_running_loop()

    def tell(event: Event) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    return tell


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _kind(status: int) -> str:
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")


def _error(status: int, message: str, param: str | None = None) -> Response:
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(error_body(message, _kind(status), param), status, headers=headers)


async def _on_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, _RefusedError)
    return _error(error.status, str(error), error.param)


async def _on_invalid(_: Request, error: Exception) -> Response:
    """400 with the first thing that is wrong, named by its place in the body."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    return _error(400, f"{place}: {first['msg']}" if place else first["msg"], place or None)


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail))
