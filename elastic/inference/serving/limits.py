"""What one client can ask for, and bodies that are refused before they are read into memory."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from elastic.inference.serving.protocol import error_body

_LONGEST = 1e6  # seconds
_SLOWEST_REQUEST = 30.0  # seconds


@dataclass(frozen=True)
class ServerLimits:
    """What one client can ask for.

    Attributes:
        max_new_tokens: of one answer; also the default.
        timeout: seconds from a request's arrival to its last token.
        max_body: bytes of a request.
        grace: seconds that requests have to finish when the server is stopped.
        sanitize_control_tokens: control tokens that messages spell out, such as `<|im_start|>`, stay text.
    """

    max_new_tokens: int = 512
    timeout: float = 300.0
    max_body: int = 8 << 20
    grace: float = 30.0
    sanitize_control_tokens: bool = False

    @property
    def arrival(self) -> float:
        """Seconds in which a request's head must have come, and then its body."""
        return min(self.timeout, _SLOWEST_REQUEST)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "timeout", "max_body"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0; no request could be answered")
        if not self.grace >= 0:
            raise ValueError(f"grace={self.grace} is below 0; 0 stops at once")
        for name in ("timeout", "grace"):
            if getattr(self, name) > _LONGEST:  # clocks of the system count no further than some years
                raise ValueError(f"{name}={getattr(self, name)} is above {_LONGEST:.0f} seconds; make it shorter")


class MaxBody:
    """ASGI middleware: 413 for a request of more than `limit` bytes, declared or found while reading; 408 for one that
    does not come in time.

    Args:
        app: the application that it protects.
        limit: bytes.
        seconds: from the head of a request to the end of its body.
    """

    def __init__(self, app: Any, limit: int, seconds: float) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        large = f"the request is larger than {self.limit} bytes; shorten it"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            await self._refuse(send, 413, large)
            return
        try:
            async with asyncio.timeout(self.seconds):
                parts = await self._read(receive)
        except TimeoutError:
            await self._refuse(send, 408, f"the request did not come within {self.seconds:g} seconds; send it faster")
            return
        if parts is None:
            await self._refuse(send, 413, large)
            return
        waiting = iter(parts)

        async def replay() -> Any:
            read = next(waiting, None)
            return await receive() if read is None else read

        await self.app(scope, replay, send)

    async def _read(self, receive: Any) -> list[Any] | None:
        """The parts of the body, read here so that one without a declared length can still be refused with a proper
        answer; None if it is too large.
        """
        parts, size = [], 0
        while True:
            message = await receive()
            parts.append(message)
            size += len(message.get("body", b""))
            if size > self.limit:
                return None
            if message["type"] != "http.request" or not message.get("more_body", False):
                return parts

    async def _refuse(self, send: Any, status: int, text: str) -> None:
        body = json.dumps(error_body(text, "invalid_request_error")).encode()
        head = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": body})
