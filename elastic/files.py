"""Files that several processes share: the folder for what can be made again, locks, and writes that readers see whole
or not at all. Loads neither torch nor numpy.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
