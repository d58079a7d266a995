"""The `elastic` command: finds the subcommand and loads only what that needs."""

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elastic._version import __version__
from elastic.commands.catalogue import COMMANDS, RESUMED, TRAINING
from elastic.console import complain, end_bars, hint, say, was_stopped

NOT_FINITE = 1  # exit code of a training run that diverged
STOPPED = 130  # of a command that was stopped by Ctrl-C or SIGTERM
PATIENCE = 20.0  # seconds that a stopped process lets the one that started it end first


def main(argv: list[str] | None = None) -> int:
    """Run `elastic <command> ...`; returns the exit code.

    0 success, 1 a failure of the run, 2 a request that cannot be met (one line on standard error; the traceback with
    ELASTIC_TRACEBACK=1), 130 stopped by Ctrl-C or SIGTERM (one line that says how to resume).
    """
    argv = sys.argv[1:] if argv is None else argv
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help", "help"):
        say(usage())
        return 0
    if name == "--version":
        say(f"elastic {__version__}")
        return 0
    if name not in {**TRAINING, **COMMANDS}:
        return complain(name, _unknown(name))
    # Threads that spin while they wait make a shared machine many times slower. OpenMP reads this once, with torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parent = os.getppid()
    try:
        with _stoppable(name):
            return _run(name, rest)
    except KeyboardInterrupt:
        return _stopped(name, rest, parent)
    except (ValueError, OSError) as error:
        if os.environ.get("ELASTIC_TRACEBACK"):
            raise
        return complain(name, error)
    except FloatingPointError as error:
        if os.environ.get("ELASTIC_TRACEBACK"):
            raise
        complain(name, error)
        return NOT_FINITE
    except (RuntimeError, MemoryError) as error:
        if os.environ.get("ELASTIC_TRACEBACK") or not _ran_out_of_memory(error):
            raise
        return complain(
            name,
            f"{str(error).partition(chr(10))[0] or 'out of memory'}; use smaller batches, shorter prompts or --dtype "
            "bfloat16, or a device whose memory no other process fills",
        )


def _run(name: str, rest: list[str]) -> int:
    try:
        code: int
        if name in TRAINING:
            code = importlib.import_module("elastic.commands.training").run(name, rest)
        else:
            code = importlib.import_module(f"elastic.commands.{name}").main(rest)
        return code
    except BaseException as error:
        if was_stopped(error):
            raise KeyboardInterrupt from error
        raise


def _ran_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory, told by torch, by CuPy or by the interpreter."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words


@contextmanager
def _stoppable(name: str) -> Iterator[None]:
    """Inside, SIGTERM stops this process as Ctrl-C does, so that it can end what it has started. Where something else
    handles the signal it stays so: a caller, or Lightning under SLURM, which requeues the job of `fit`.
    """
    requeued = name == "fit" and "SLURM_JOB_ID" in os.environ
    mine = threading.current_thread() is threading.main_thread() and not requeued
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def stop(number: int, _frame: Any) -> None:
        if os.getpid() == process:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a fork of this process, which has nothing to end
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stopped(name: str, rest: list[str], parent: int) -> int:
    """Say how to resume, once for all processes of a run."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        _let_end(parent)
    else:
        way = RESUMED.get(name) or RESUMED.get(" ".join([name, *rest[:1]])) or "repeated, it begins again"
        end_bars()
        start = "\n" if sys.stderr.isatty() else ""  # below the terminal's ^C
        say(f"{start}elastic {name}: stopped; {way}", stream=sys.stderr)
    return STOPPED


def _let_end(parent: int) -> None:
    """Wait for rank 0 where it is what started this process: as soon as one of those that it started ends, Lightning
    kills it, also before it has said how to resume. torchrun waits for all.
    """
    end = time.monotonic() + (0 if "TORCHELASTIC_RUN_ID" in os.environ else PATIENCE)
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.05)


def usage() -> str:
    """The list of commands."""
    width = max(map(len, (*TRAINING, *COMMANDS)))

    def listed(commands: dict[str, str]) -> list[str]:
        return [f"  {name.ljust(width)}  {summary}" for name, summary in commands.items()]

    return "\n".join(
        [
            "usage: elastic <command> [options]",
            "",
            "Attention routers for frozen causal language models: full or sparse attention per input and KV head.",
            "",
            "Training (settings from YAML files, later ones win: -c tiny -c mine.yaml):",
            *listed(TRAINING),
            "",
            "Using:",
            *listed(COMMANDS),
            "",
            "`elastic <command> --help` lists the options of a command. Errors come with their traceback where",
            "ELASTIC_TRACEBACK=1 is set.",
        ]
    )


def _unknown(name: str) -> str:
    return f"there is no command {name!r}; {hint(name, [*TRAINING, *COMMANDS], 'commands')} (elastic --help)"


if __name__ == "__main__":
    raise SystemExit(main())
