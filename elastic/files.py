"""Files that come with the code, found wherever it is installed; and files that several processes share: the folder for
what can be made again, locks, and writes that readers see whole or not at all. Loads neither torch nor numpy.
"""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
NOT_SETTINGS = ("mixture", "eval")  # folders of configs/ whose files `elastic fit -c` cannot read


def shipped(folder: str) -> Path:
    """A folder that comes with the code: `assets`, `configs`, `cuda_src` or `data_prep`. An installed package holds all
    of them (`_configs`, `_cuda_src`); in a clone the last three lie beside it, installed or only on the path.
    """
    inside = (PACKAGE / folder, PACKAGE / f"_{folder}")
    return next((place for place in inside if place.is_dir()), PACKAGE.parent / folder)


def config_names(kind: str | None = None) -> list[str]:
    """Names of the shipped configurations in the folder `kind`, such as mixture/offline; None: settings of training,
    such as train and model/qwen3-4b.
    """
    root = shipped("configs")
    files = (file.relative_to(root) for file in root.rglob("*.yaml"))
    return sorted(
        file.with_suffix("").as_posix()
        for file in files
        if (file.parts[0] == kind if kind else file.parts[0] not in NOT_SETTINGS)
    )


def find_config(given: str, kind: str | None = None) -> Path:
    """The file at a path, or else the shipped configuration of that name among `config_names(kind)`.

    Raises:
        FileNotFoundError: neither; the message lists the names, those like it first.
    """
    path, names = Path(given).expanduser(), config_names(kind)
    if path.exists() and not path.is_dir():
        return path
    if given in names:
        return shipped("configs") / f"{given}.yaml"
    close = difflib.get_close_matches(given.removeprefix("configs/").removesuffix(".yaml"), names)
    raise FileNotFoundError(
        f"there is neither a file {given} nor a shipped configuration of that name"
        f"{', did you mean ' + ' or '.join(close) + '?' if close else ';'} names are {', '.join(names)}"
    )


def cache_folder() -> Path:
    """`$ELASTIC_CACHE`, else `elastic` in the user's cache directory."""
    chosen = os.environ.get("ELASTIC_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic"


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same lock file; the others wait, and a process that dies leaves. The
    folder of the lock is made if needed.

    Raises:
        OSError: a folder that cannot be written.
    """
    from filelock import FileLock

    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        yield


def write_atomic(file: Path, text: str) -> None:
    """Write a file, as UTF-8, that readers see whole or as it was before; inside `alone`, because the scratch file
    beside it has one name.

    Raises:
        OSError: a full disk; the file is as it was before.
    """
    writing = file.with_name(f".{file.name}.writing")
    try:
        writing.write_text(text, encoding="utf-8")
        os.replace(writing, file)
    except OSError:
        writing.unlink(missing_ok=True)
        raise
