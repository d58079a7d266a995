"""Files that come with the code, found wherever it is installed; JSON files that somebody else may have written, read
with one kind of error; and files that several processes share: the folder for what can be made again, locks, checksums,
and files and folders that readers see whole or as they were. Loads neither torch nor numpy.
"""

import ctypes
import difflib
import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parent
SEAL = "sha256"  # key of a JSON object's own checksum
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of file systems that have none
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
_WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
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


def read_json(path: Path) -> Any:
    """The value in a JSON file of UTF-8.

    Raises:
        OSError: a file that cannot be read.
        ValueError: not UTF-8, not JSON, or nested too deeply for any of this project's files.
    """
    return _parsed(path.read_text(encoding="utf-8"))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def member(values: Any, name: str, kind: type[T]) -> T:
    """The field `name` of an object, which must be a dict, list, str or int.

    Raises:
        ValueError: no object, no such field, or a value of another type; a bool is not an int.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{name!r} is looked for in {values!r:.40}, expected {_WORDS[dict]}")
    if name not in values:
        raise ValueError(f"{name!r} is missing")
    value = values[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise ValueError(f"{name!r} is {value!r:.40}, expected {_WORDS[kind]}")
    return value


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Settings of a YAML file, none of which is there twice: YAML takes the last one and forgets the others.

    Raises:
        ValueError: a file that is not UTF-8 or YAML, a key that is there twice, or no settings; with the file's name.
    """
    import yaml

    class Once(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.MarkedYAMLError(problem=f"{twice[0]} is there twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        settings = yaml.load(Path(file).read_text(encoding="utf-8-sig"), Once)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML in UTF-8: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds {'nothing' if settings is None else repr(settings)[:40]}, expected settings")
    return settings


def cache_folder() -> Path:
    """`$ELASTIC_CACHE`, else `elastic` in the user's cache directory."""
    chosen = os.environ.get("ELASTIC_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic"


@contextmanager
def _cache_errors(file: Path) -> Iterator[None]:
    """Inside, where `file` is of `cache_folder`, a file that cannot be written is an error of the same number that
    names ELASTIC_CACHE.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE or cache_folder() not in file.parents:
            raise
        reason = f"{error.strerror} (the cache; set ELASTIC_CACHE to a folder that can be written)"
        raise OSError(error.errno, reason, error.filename or str(cache_folder())) from error


@contextmanager
def named(target: Path) -> Iterator[None]:
    """Inside, an error of the system that names no file, as that of a full disk, gets `target`'s name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same lock file; the others wait, and a process that dies leaves. The
    folder of the lock is made if needed.

    Raises:
        OSError: a folder that cannot be written; one of the cache, also inside, with the way out.
    """
    from filelock import FileLock

    with _cache_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            yield


def text_sha256(text: str) -> str:
    """sha256 of a text in UTF-8, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(values: dict[str, Any]) -> str:
    """JSON text of an object, with a checksum of it under the key `sha256`."""
    return json.dumps({**values, SEAL: _seal(values)}, indent=1) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """The object of such a text; earlier versions wrote no checksum.

    Raises:
        ValueError: no JSON object, or one that was changed after it was written.
    """
    values = _parsed(text)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    if values.pop(SEAL, known := _seal(values)) != known:
        raise ValueError("it was changed after it was written: its sha256 is another")
    return values


def _seal(values: dict[str, Any]) -> str:
    plain = json.loads(json.dumps({key: value for key, value in values.items() if key != SEAL}))
    return text_sha256(json.dumps(plain, sort_keys=True))


def file_sha256(*files: Path) -> str:
    """sha256 of a file's content, or of the contents of several, one after the other; hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


@contextmanager
def new_file(target: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Yields a path beside `target` to write to, which becomes `target` at the end. Readers see the old file or the
    whole new one; after an exception it is the old one, and the scratch file is gone. Where `target` is a link, what it
    points to is replaced. Folders are made as needed.

    Args:
        target: the file to write.
        sync: flush the content to the disk first, so that not even a power failure leaves half a file.

    Raises:
        OSError: a full disk, or a folder that cannot be written; the file is as it was before.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(target)
    try:
        with named(target):
            yield scratch
            if sync:
                _flush(scratch)
        os.replace(scratch, target)
    except BaseException:
        _remove(scratch)
        raise


def write_atomic(target: str | Path, text: str) -> None:
    """Write a text, as UTF-8, by `new_file`."""
    with new_file(target) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(target: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target` to write to, which becomes `target` at the end (`put_in_place`). After an
    exception what was there before is there still, and the scratch folder is gone. Where `target` is a link, what it
    points to is replaced.

    Args:
        target: the folder to write; what it holds is deleted, so check it with `is_foreign` first.
        sync: flush every file to the disk first, so that the rename never precedes the contents.

    Raises:
        OSError: a full disk, or a folder that cannot be written.
    """
    target = Path(os.path.realpath(target))
    if not target.exists() and set_aside(target).exists():
        set_aside(target).rename(target)  # a process was killed between the two renames of `put_in_place`
    scratch = _scratch(target)
    try:
        scratch.mkdir(parents=True)
        with named(target):
            yield scratch
            for file in scratch.rglob("*") if sync else ():
                if file.is_file():
                    _flush(file)
        put_in_place(scratch, target)
    except BaseException:
        _remove(scratch)
        raise


def put_in_place(made: Path, target: str | Path) -> None:
    """Give a finished folder its final name. Readers, and other writers, meet the folder that was there or the new one.
    Where the system cannot exchange them in one step, what is replaced is set aside first and deleted last, so that a
    kill in between loses neither.
    """
    target = Path(os.path.realpath(target))
    aside = set_aside(target)
    if _exchange(made, target):
        _remove(made)
    else:
        if target.exists():
            _remove(aside)
            target.rename(aside)
        try:
            made.rename(target)
        except BaseException:
            if not _exchange(made, target):  # unless another writer was first
                if aside.exists():
                    aside.rename(target)
                raise
            _remove(made)
    _remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where one is missing, or the system or disk cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # no Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE, linux/fcntl.h and linux/fs.h
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


@contextmanager
def sole_writer(target: str | Path) -> Iterator[None]:
    """Inside, this process is the only one of all that ask that writes `target`, a file or folder; one that dies makes
    room. Its lock file beside `target` names it and is gone at the end.

    Raises:
        ValueError: another process is writing it.
        OSError: a folder that cannot be written.
    """
    target = Path(os.path.realpath(target))
    lock = target.with_name(f".{target.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, target) as stream:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}")
        stream.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(lock: Path, target: Path) -> TextIO:
    """The open file, locked. The lock is the process's own: workers forked from it do not keep it."""
    while True:
        stream = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 - the caller closes it
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                stream.seek(0)
                other = stream.read() or "another process"
                stream.close()
                raise ValueError(
                    f"{target} is being written by {other}; wait until it has ended, or choose another place"
                ) from error
            if error.errno not in NO_LOCKS:
                raise
            return stream
        if lock.exists() and os.path.samestat(os.fstat(stream.fileno()), lock.stat()):
            return stream
        stream.close()  # its owner has just ended and removed it


def set_aside(target: str | Path) -> Path:
    """Where `put_in_place` keeps what it replaces for a moment. With nothing at `target`, it is what was there when a
    process was killed in that moment.
    """
    target = Path(os.path.realpath(target))
    return target.with_name(f".{target.name}.old")


def check_place(option: str, path: str | Path, *, folder: bool = False) -> None:
    """Refuse a place for a result before work is begun.

    Args:
        option: what named it.
        path: of the file, or of the folder.
        folder: whether a folder will be written.

    Raises:
        ValueError: a file where a folder will be, or above the place; a folder where a file will be.
    """
    path = Path(path)
    if path.is_dir() and not folder:
        raise ValueError(f"{option} {path} is a folder; expected a file, so choose another")
    if path.exists() and folder and not path.is_dir():
        raise ValueError(f"{option} {path} is a file; expected a folder, so choose another")
    for above in path.absolute().parents:
        if above.exists() and not above.is_dir():
            raise ValueError(f"{option} {path} is to be in {above}, which is a file; choose another folder")


def is_foreign(folder: Path, marker: str) -> bool:
    """Whether something is at `folder` that must not be replaced: neither an empty folder nor one that holds a file
    named `marker`.
    """
    return folder.exists() and not (folder / marker).is_file() and (not folder.is_dir() or any(folder.iterdir()))


def _scratch(target: Path) -> Path:
    """A name beside `target` that no other writer uses, of any thread, process or machine. What processes of this
    machine left under such names when they were killed is removed.
    """
    prefix = f".{target.name}.{platform.node()}."
    for left in target.parent.glob(f"{glob.escape(prefix)}*.writing"):
        writer = left.name.removeprefix(prefix).split(".")[0]
        if writer.isdecimal() and not _is_running(int(writer)):
            _remove(left)
    scratch = target.with_name(f"{prefix}{os.getpid()}.{threading.get_native_id()}.writing")
    _remove(scratch)  # of a killed process that had the same numbers
    return scratch


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
