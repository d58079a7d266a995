"""`elastic data_prep`: the steps that make training data, each a module of the folder data_prep."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from elastic.commands.catalogue import COMMANDS
from elastic.console import complain, hint, say
from elastic.files import shipped

STEPS = {
    "build_mixture": "write records of generators, task by task, for tokenize_and_pack",
    "published": "turn published data sets, or files of your own, into records",
    "tokenize_and_pack": "tokenise records and pack them into rows",
    "pack_mixture": "a mixture file to packed rows in one go, in several processes",
    "inspect_shards": "show what a model will see: shares, samples, label masks",
}


def main(argv: list[str]) -> int:
    """Run the command."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help"):
        say(usage())
        return 0
    if name not in STEPS:
        return complain("data_prep", f"there is no step {name!r}; {hint(name, list(STEPS), 'steps')}")
    code: int = part(name).main(rest, f"elastic data_prep {name}")
    return code


def usage() -> str:
    """The list of steps."""
    width = max(map(len, STEPS))
    listed = [f"  {name.ljust(width)}  {summary}" for name, summary in STEPS.items()]
    return "\n".join(
        [
            "usage: elastic data_prep <step> [options]",
            "",
            f"{COMMANDS['data_prep'][0].upper()}{COMMANDS['data_prep'][1:]}.",
            "",
            *listed,
            "",
            "`elastic data_prep <step> --help` lists the options of a step.",
        ]
    )


def part(name: str) -> Any:
    """A module of data_prep: installed it is `elastic.data_prep`, in a clone that is only on the path `data_prep`. An
    editable installation of another clone is not meant.
    """
    found = importlib.util.find_spec("elastic.data_prep")
    own = found is not None and Path(found.origin or "").resolve().parent == shipped("data_prep")
    return importlib.import_module(f"elastic.data_prep.{name}" if own else f"data_prep.{name}")
