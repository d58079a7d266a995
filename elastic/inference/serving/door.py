"""What stands before the application. Plain ASGI: starlette's `http` middleware would hide from the application that a
client has left.
"""

from collections.abc import Callable
from typing import Any


class Counted:
    """ASGI middleware: tells the HTTP status of every answer at one path.

    Args:
        app: the application behind it.
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
