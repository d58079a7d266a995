"""uvicorn as this server needs it: no connection is held by half a request, and whoever is cut off at the end is told.

Plain ASGI and uvicorn's own protocol, of which a connection is all that there is before a request has come.
"""

import asyncio
import contextlib
import json
import math
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from elastic.inference.serving.errors import error_of
from elastic.inference.serving.limits import ServerLimits

_AT_ONCE = 0.1  # seconds
_STOPPED = "the server was stopped before this answer was complete; send the request again"


class Listener(uvicorn.Server):
    """Serves an application until a signal; a second one ends the time that answers have to finish.

    Args:
        app: as `build_app` makes it.
        limits: how long a request may take to come, and an answer to finish.
        **options: of `uvicorn.Config`.
    """

    def __init__(self, app: FastAPI, limits: ServerLimits, **options: Any) -> None:
        protocol = type("Protocol", (_Impatient,), {"seconds": limits.arrival})
        grace = int(limits.grace)
        super().__init__(uvicorn.Config(app, http=protocol, timeout_graceful_shutdown=grace, **options))
        self.state, self._signalled = app.state, -math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn; a signal that came twice at once, from whoever sent it to both processes, counts once."""
        before, self._signalled = self._signalled, time.monotonic()
        if self._signalled - before > _AT_ONCE:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop taking requests, let answers finish, then stop the engine."""
        await super().shutdown(sockets)
        if self.force_exit:
            for task in self.server_state.tasks:
                task.cancel()
            self.state.grace = 0.0
            await self.lifespan.shutdown()


class _Impatient(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # one of two classes
    """A connection that is closed when the head of a request does not come in time."""

    seconds: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a head has come
            self._stop_watching()
        elif self._late is None:
            self._late = self.loop.call_later(self.seconds, self.transport.close)

    def _stop_watching(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class ToldOfTheEnd:
    """ASGI middleware: a request that the server cancels because it stops gets an error like any other, 503.

    Args:
        app: the application that it protects.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun: list[dict[str, Any]] = []

        async def noting(message: dict[str, Any]) -> None:
            if not begun:
                begun.append(message)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except asyncio.CancelledError:
            error = error_of(503, _STOPPED)
            with contextlib.suppress(asyncio.CancelledError):  # of a client that reads nothing
                if not begun:
                    await JSONResponse(error, 503)(scope, receive, send)
                elif b"text/event-stream" in dict(begun[0]["headers"]).get(b"content-type", b""):
                    await send({"type": "http.response.body", "body": f"data: {json.dumps(error)}\n\n".encode()})
