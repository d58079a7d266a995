"""The HTTP side of a server as a process of its own, which lives as long as the one that owns the model.

It is forked before a model is loaded: it needs the same packages, and neither a GPU nor weights.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import FrameType

from elastic.inference.serving.app import build_app
from elastic.inference.serving.door import Door
from elastic.inference.serving.limits import ServerLimits
from elastic.inference.serving.listening import Listener
from elastic.inference.serving.metrics import Metrics
from elastic.inference.serving.remote import Ready, RemoteEngine

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def front_of(
    listening: socket.socket, name: str, limits: ServerLimits, door: Door, max_queue: int
) -> Iterator[tuple[int, Connection]]:
    """A process that answers HTTP at `listening` once the model is ready; the connection is for a `Host`.

    Returns:
        Its number, and the connection. At the end of the context it is waited for.

    Raises:
        OSError: it ended otherwise than by a signal.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_listen, args=(theirs, ours, listening, name, limits, door, max_queue), name="elastic-http"
    )
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        yield process.pid, ours
    finally:
        ours.close()
        process.join()
    if process.exitcode not in (0, *(-number for number in _SIGNALS)):
        raise OSError(f"the process that listens at {listening.getsockname()} ended with exit code {process.exitcode}")


@contextlib.contextmanager
def passed_on(process: int) -> Iterator[None]:
    """Inside the context, signals that end a server go to a process, whose end ends the context."""

    def pass_on(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    before = [signal.signal(number, pass_on) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def _listen(
    connection: Connection, other_end: Connection, listening: socket.socket, name: str, limits: ServerLimits,
    door: Door, max_queue: int,
) -> None:  # fmt: skip
    other_end.close()  # so that the end of the other process is seen
    os.setsid()  # Ctrl-C in a terminal is the other process's, which passes it on
    with contextlib.suppress(KeyboardInterrupt, EOFError):  # signals end a server; EOF: the model was not loaded
        from transformers import PreTrainedTokenizerFast  # noqa: F401 - what `Ready` is made of, while the model loads

        ready = connection.recv()
        assert isinstance(ready, Ready)

        def engine(metrics: Metrics) -> RemoteEngine:
            return RemoteEngine(connection, ready, metrics, max_queue, lambda: signal.raise_signal(signal.SIGTERM))

        Listener(build_app(name, limits, engine, door), limits, log_level="warning").run(sockets=[listening])
