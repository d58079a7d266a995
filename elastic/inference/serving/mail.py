"""News from the engine's thread to the event loop."""

import asyncio
import contextlib
from collections import deque
from typing import TypeVar

_T = TypeVar("_T")


class Mail:
    """Puts what other threads say into queues of the event loop that makes it. The loop is woken once for all that is
    said until it comes round to it: a wake-up is a system call, and every step of the engine has news for all answers.
    """

    def __init__(self) -> None:
        self._loop, self._sent = asyncio.get_running_loop(), deque[tuple["asyncio.Queue[object]", object]]()
        self._called = False

    def send(self, queue: "asyncio.Queue[_T]", item: _T) -> None:
        """From any thread; a loop that has ended no longer listens."""
        self._sent.append((queue, item))  # type: ignore[arg-type]
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # first: what is sent from now on calls again, or is seen below
        while self._sent:
            queue, item = self._sent.popleft()
            queue.put_nowait(item)
