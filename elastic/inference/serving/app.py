"""The HTTP application: an OpenAI-compatible chat endpoint over the engine, with limits, time-outs, health and metrics.

FastAPI rather than LitServe or transformers' server: LitServe fails a whole batch with one bad request, reports no
finish reason and has no bounded queue; transformers' server loads models itself, without routers.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from elastic.inference.serving.answer import Answer, while_listening
from elastic.inference.serving.door import Counted, Door, Guarded
from elastic.inference.serving.errors import RefusedError, handle_errors
from elastic.inference.serving.limits import MaxBody, ServerLimits
from elastic.inference.serving.listening import ToldOfTheEnd
from elastic.inference.serving.mail import Mail
from elastic.inference.serving.metrics import Metrics
from elastic.inference.serving.protocol import ChatRequest
from elastic.inference.serving.reading import PromptReader
from elastic.inference.serving.remote import AnyEngine

CHAT = "/v1/chat/completions"


def build_app(
    model_name: str, limits: ServerLimits, make_engine: Callable[[Metrics], AnyEngine], door: Door | None = None
) -> FastAPI:
    """The application; its engine starts and stops with it.

    Args:
        model_name: under which clients ask for the model.
        limits: of a request.
        make_engine: called once at start.
        door: who is let in; default: this machine, without a key.
    """
    metrics = Metrics()
    card = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "elastic"}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = engine = make_engine(metrics)
        app.state.reader = PromptReader(engine.model, engine.tokenizer, limits.sanitize_control_tokens)
        app.state.mail = Mail()
        yield
        app.state.reader.close()
        await asyncio.to_thread(engine.close, app.state.grace)

    app = FastAPI(title="Elastic Attention", lifespan=lifespan)
    app.state.grace = limits.grace
    _add_middleware(app, limits, door or Door(), metrics)
    handle_errors(app)

    @app.post(CHAT)
    async def chat(body: ChatRequest, request: Request) -> Response:
        asked = Answer.ask(app.state.engine, app.state.reader, app.state.mail, metrics, body, model_name, limits)
        answer = await while_listening(request, asked)
        if not body.stream:
            return JSONResponse(await while_listening(request, answer.whole()))
        # Errors that come before any text get their HTTP status.
        told = answer.stream(await while_listening(request, answer.next_event()))
        return StreamingResponse(told, media_type="text/event-stream")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != model_name:
            raise RefusedError(404, f"model {name!r} is not served here; use {model_name!r}", "model")
        return card

    @app.get("/health")
    async def health() -> Response:
        alive = app.state.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return PlainTextResponse(metrics.page(app.state.engine.waiting))

    return app


def _add_middleware(app: FastAPI, limits: ServerLimits, door: Door, metrics: Metrics) -> None:
    """The last one sees a request first."""
    app.add_middleware(MaxBody, limit=limits.max_body, seconds=limits.arrival)
    app.add_middleware(Guarded, door=door)
    app.add_middleware(ToldOfTheEnd)
    app.add_middleware(Counted, path=CHAT, tell=lambda status: metrics.requests.labels(str(status)).inc())
