"""Clients of a real `elastic serve`, for its benchmark: what they ask for, and how long each answer took."""

import contextlib
import http.client
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

NAME = "model"
_STARTING, _ANSWERING = 600.0, 300.0  # seconds at most
_WORDS = (
    "the", "night", "watch", "wrote", "down", "every", "ship", "that", "passed", "lighthouse", "and", "of",
    "its", "captains", "crews", "cargo", "harbour", "winter", "storms", "letters", "maps", "tides", "rope",
    "bread", "salt", "silver", "copper", "wool", "timber", "north", "south", "east", "west", "river", "island",
    "bell",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """Requests whose lengths are log-uniform: as many between 16 and 32 words as between 1024 and 2048.

    Attributes:
        clients: at a time; each sends its next request as soon as it has an answer.
        requests: of all clients together.
        seconds: after which no client sends another one.
        words: of a prompt, fewest and most.
        new_tokens: of an answer, likewise; a model may end it before.
        seed: of all that is drawn.
    """

    clients: int
    requests: int
    seconds: float
    words: tuple[int, int]
    new_tokens: tuple[int, int]
    seed: int

    def __post_init__(self) -> None:
        for name in ("words", "new_tokens"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(f"{name} from {least} to {most}; expected 1 or more, the fewest first")
        for name in ("clients", "requests", "seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0")

    def bodies(self) -> list[dict[str, Any]]:
        """All requests; no two prompts begin alike."""
        draw = random.Random(self.seed)
        return [
            body_of(_drawn(draw, self.words), _drawn(draw, self.new_tokens), draw.randrange(2**32))
            for _ in range(self.requests)
        ]


def _drawn(draw: random.Random, between: tuple[int, int]) -> int:
    return round(math.exp(draw.uniform(*map(math.log, between))))


def body_of(words: int, new_tokens: int, seed: int) -> dict[str, Any]:
    """A greedy request with a prompt of so many random words."""
    text = " ".join(random.Random(seed).choices(_WORDS, k=words))
    messages = [{"role": "user", "content": f"{text}\n\nGo on in the same way."}]
    return {"model": NAME, "messages": messages, "max_tokens": new_tokens, "temperature": 0}


@dataclass(frozen=True)
class Answered:
    """One answer.

    Attributes:
        first_s, whole_s: seconds to its first text (or its end, where it has none) and to its end.
        prompt_tokens, new_tokens: read and written.
    """

    first_s: float
    whole_s: float
    prompt_tokens: int
    new_tokens: int


class RequestFailedError(Exception):
    """The server gave no complete answer."""


def ask(port: int, body: dict[str, Any]) -> Answered:
    """One streamed request.

    Raises:
        RequestFailedError: a status other than 200, or a stream that ends in an error or before its end.
        OSError: the connection broke.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWERING)
    asked = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    with contextlib.closing(connection):
        begun, first = time.perf_counter(), None
        connection.request("POST", "/v1/chat/completions", asked, {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RequestFailedError(f"status {response.status}: {response.read().decode()[:200]}")
        usage: dict[str, int] | None = None
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RequestFailedError(event["error"]["message"])
            usage = event.get("usage") or usage
            if first is None and any(c["delta"].get("content") or c["finish_reason"] for c in event["choices"]):
                first = time.perf_counter()
        if usage is None or first is None:
            raise RequestFailedError("the stream ended before the answer did")
        return Answered(first - begun, time.perf_counter() - begun, usage["prompt_tokens"], usage["completion_tokens"])


def run_load(port: int, load: Load) -> tuple[list[Answered], float]:
    """Let all clients ask until no request or no time is left; the answers, and the seconds until the last of them."""
    waiting, lock, begun = iter(load.bodies()), threading.Lock(), time.perf_counter()

    def client(_: int) -> list[Answered]:
        found = []
        while time.perf_counter() - begun < load.seconds:
            with lock:
                body = next(waiting, None)
            if body is None:
                break
            found.append(ask(port, body))
        return found

    with ThreadPoolExecutor(load.clients) as pool:
        answers = [answer for found in pool.map(client, range(load.clients)) for answer in found]
    return answers, time.perf_counter() - begun


@contextlib.contextmanager
def repeated(port: int, make: Callable[[int], dict[str, Any]]) -> Iterator[None]:
    """Inside the context one client asks for `make(0)`, `make(1)`, ..., one after the other; the first has been sent
    for a moment when it is entered, and the last is waited for when it is left.
    """
    over = threading.Event()

    def client() -> None:
        number = 0
        while not over.is_set():
            ask(port, make(number))
            number += 1

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(client)
        time.sleep(0.2)
        try:
            yield
        finally:
            over.set()
            asking.result()


@contextlib.contextmanager
def served(options: Sequence[str]) -> Iterator[int]:
    """The port of an `elastic serve` with these options, a process of its own that ends with the context.

    Raises:
        ValueError: it did not start; its last line says why.
    """
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    command = [sys.executable, "-m", "elastic", "serve", "--port", str(port), "--name", NAME, *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
        try:
            late = time.monotonic() + _STARTING
            while not _listening(port):
                if process.poll() is not None or time.monotonic() > late:
                    log.seek(0)
                    last = (log.read().strip().splitlines() or ["it said nothing"])[-1]
                    raise ValueError(f"the server did not start: {last}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False
