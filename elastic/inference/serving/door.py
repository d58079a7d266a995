"""Who may use the application, and the count of its answers.

Plain ASGI: starlette's `http` middleware would hide from the application that a client has left.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

from elastic.inference.serving.errors import error_of

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Door:
    """Who is let in.

    Attributes:
        api_keys: one of them must come with every request under /v1; none: whoever reaches the address is let in.
        allowed_hosts: names under which the server answers, from the Host header, so that a page whose name was made
            to point at this machine (DNS rebinding) cannot use it; `*` is any name.
    """

    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = LOOPBACK

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not key.strip() or not key.isascii() or key != key.strip():
                raise ValueError("an API key is empty, not ASCII or has spaces around it; no client could send it")
        if not all(self.allowed_hosts) or not self.allowed_hosts:
            raise ValueError("an allowed host is empty; name a host, or * for any")


class Guarded:
    """ASGI middleware: 403 for a foreign Host header, 401 without a key.

    Args:
        app: the application that it protects.
        door: who is let in.
    """

    def __init__(self, app: Any, door: Door) -> None:
        self.app, self.door = app, door
        self.hosts = {host.lower() for host in door.allowed_hosts}
        self.keys = [key.encode() for key in door.api_keys]

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            status, message = refusal
            headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
            await JSONResponse(error_of(status, message), status, headers=headers)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        host = _name(headers.get(b"host", b"").decode("latin-1"))
        if "*" not in self.hosts and host not in self.hosts:
            return 403, f"this server does not answer as {host!r}; start it with --allowed-hosts {host or 'NAME'}"
        if self.keys and scope["path"].startswith("/v1") and scope["method"] != "OPTIONS":
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = key.strip()
            known = [secrets.compare_digest(given, one) for one in self.keys]  # all of them: equal time
            if kind.lower() != b"bearer" or not any(known):
                return 401, "this server wants a key that it knows: Authorization: Bearer KEY"
        return None


def _name(host: str) -> str:
    """The Host header without its port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


class Counted:
    """ASGI middleware: tells the HTTP status of every answer at one path.

    Args:
        app: the application that it protects.
        path: whose answers are counted.
        tell: called with each status.
    """

    def __init__(self, app: Any, path: str, tell: Callable[[int], None]) -> None:
        self.app, self.path, self.tell = app, path, tell

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http" or scope["path"] != self.path:
            await self.app(scope, receive, send)
            return

        async def counting(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.tell(message["status"])
            await send(message)

        await self.app(scope, receive, counting)
