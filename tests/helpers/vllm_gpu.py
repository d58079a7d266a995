"""Engines for programs that run on a GPU, each in a process of its own, which gives its memory back when it ends."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.helpers.vllm_engine import engine


def apart(task: Callable[..., Iterable[Any]], *args: Any) -> Iterator[Any]:
    """What a task yields in a process of its own, as soon as it does.

    Raises:
        RuntimeError: the process ended with an error, after what it had yielded.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_send, args=(there, task, args))
    child.start()
    there.close()
    while here in wait([here, child.sentinel]):  # its own helpers may hold the pipe open after its end
        try:
            yield here.recv()
        except EOFError:
            break
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{task.__name__}{args[1:]} ended with {child.exitcode}; its messages are above")


def _send(there: Connection, task: Callable[..., Iterable[Any]], args: tuple[Any, ...]) -> None:
    for found in task(*args):
        there.send(found)


def started(folder: str, checkpoint: str | None, **options: Any) -> Any:
    """An engine in this process; without a checkpoint stock vLLM."""
    own = None if checkpoint is None else {"checkpoint": checkpoint}
    settings = {"enable_prefix_caching": False, "enable_chunked_prefill": False, "skip_tokenizer_init": True}
    return engine(Path(folder), own, **settings | options)
