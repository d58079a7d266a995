"""The `elastic` command: finds the subcommand and loads only what that needs."""

import importlib
import os
import sys

from elastic._version import __version__
from elastic.commands.catalogue import COMMANDS, TRAINING
from elastic.console import complain, hint, say

NOT_FINITE = 1  # exit code of a training run that diverged


def main(argv: list[str] | None = None) -> int:
    """Run `elastic <command> ...`; returns the exit code.

    0 success, 1 a failure of the run, 2 a request that cannot be met (one line on standard error; the traceback with
    ELASTIC_TRACEBACK=1).
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
    try:
        code: int
        if name in TRAINING:
            code = importlib.import_module("elastic.commands.training").run(name, rest)
        else:
            code = importlib.import_module(f"elastic.commands.{name}").main(rest)
        return code
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if os.environ.get("ELASTIC_TRACEBACK"):
            raise
        return complain(name, error)
    except FloatingPointError as error:
        if os.environ.get("ELASTIC_TRACEBACK"):
            raise
        complain(name, error)
        return NOT_FINITE


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
