"""Commands of `elastic` in processes that begin with everything imported, for tests that run many of them."""

import os
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

PRELOADED = ["lightning.pytorch.cli", "elastic.cli", "elastic.training.module", "elastic.training.evaluation_module"]


def _run(words: Sequence[str], folder: Path, log: Path) -> None:
    from elastic import cli

    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    raise SystemExit(cli.main(list(words)))


def forked_command(words: Sequence[str], folder: Path, log: Path) -> int:
    """Return code of `elastic <words>` in this folder; what it says goes to the log."""
    context = get_context("forkserver")  # it forks processes from one that has no threads
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(words, folder, log))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
