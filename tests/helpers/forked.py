"""Functions and commands of `elastic` in processes that begin with everything imported, for tests that run many of
them: importing takes longer than what most of them do.
"""

import ctypes
import gc
import os
import runpy
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = [  # what is not installed is left out
    *("lightning.pytorch.cli", "elastic.cli", "elastic.commands.training", "elastic.training.evaluation_module"),
    *("elastic.evaluation.runner", "lm_eval.tasks", "data_prep.pack_mixture", "data_prep.tokenize_and_pack"),
    *("transformers.models.auto.tokenization_auto", "tests.helpers.training"),
]
ROOT = Path(__file__).parents[2]
RUNNER = ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST")  # by which libraries would take a process for a test


def forked(function: Callable[..., None], *given: Any, **environment: str) -> BaseProcess:
    """A process that runs `function(*given)` on one thread once it is started. The function is of a module."""
    context = get_context("forkserver")  # it forks processes from one that has no threads
    context.set_forkserver_preload(PRELOADED)
    return context.Process(target=_run, args=(function, given, environment))


def forked_program(
    words: Sequence[str], folder: Path, log: Path, script: Path | None = None, **environment: str
) -> BaseProcess:
    """A process that is `python -m elastic <words>`, or another script, in this folder once it is started: first of a
    session of its own, with this process's environment and what is given, and to the end of the interpreter. Only its
    imports are there before. What it says goes to the log.
    """
    kept = {name: value for name, value in os.environ.items() if name not in RUNNER}
    return forked(_program, list(words), folder, log, script, {**kept, "PYTHONPATH": str(ROOT), **environment})


def forked_command(words: Sequence[str], folder: Path, log: Path, **environment: str) -> int:
    """Return code of `elastic <words>` in this folder; what it says goes to the log."""
    return _codes([forked(run_command, words, folder, log, **environment)])[0]


def forked_ranks(count: int, function: Callable[..., None], *given: Any, **environment: str) -> list[int]:
    """Exit codes of `count` processes of one group that run the function, as `torchrun` would start them."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = str(chosen.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} for rank in range(count))
    return _codes([forked(function, *given, **group, **rank, **environment) for rank in ranks])


def run_command(words: Sequence[str], folder: Path, log: Path) -> None:
    """For `forked_ranks`: `elastic <words>`."""
    from elastic import cli

    say_to(log)
    os.chdir(folder)
    raise SystemExit(cli.main(list(words)))


def _program(words: list[str], folder: Path, log: Path, script: Path | None, environment: dict[str, str]) -> None:
    os.setsid()
    say_to(log)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    sys.argv = [str(script or "elastic"), *words]
    code: Any = 0
    try:
        if script is None:
            runpy.run_module("elastic", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter ends
        sys.excepthook(*sys.exc_info())
        code = 1
    gc.freeze()  # what the process began with takes no time
    ctypes.pythonapi.Py_Exit(int(code or 0))  # with threads, exit handlers and all, which os._exit leaves out


def say_to(log: Path) -> None:
    """Send what this process prints to the end of a file."""
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _run(function: Callable[..., None], given: Sequence[Any], environment: dict[str, str]) -> None:
    import torch
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = int(environment.get("RANK", "0"))  # Lightning asks when it is imported
    for name in RUNNER:
        os.environ.pop(name, None)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*given)


def _codes(processes: Sequence[BaseProcess]) -> list[int]:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [int(process.exitcode or 0) for process in processes]
