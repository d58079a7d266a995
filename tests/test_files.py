"""Files and folders that appear whole or not at all, and the one place where they do."""

import errno
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic import files
from elastic.files import (
    alone,
    file_sha256,
    is_foreign,
    new_file,
    new_folder,
    put_in_place,
    sealed,
    set_aside,
    sole_writer,
    text_sha256,
    unsealed,
)

ROOT = Path(__file__).parents[1]
WRITERS, TIMES = 4, 40
ONCE = re.compile(r"os\.replace|\.rename\(|hashlib|file_digest|mkstemp|mkdtemp|NamedTemporaryFile|f\"\.\{[^\"]*writing")


def together(work, *given):
    """Run `work(number, *given)` in several processes at once; their exit codes."""
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=work, args=(number, *given)) for number in range(WRITERS)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    return [process.exitcode for process in running]


def test_renaming_and_hashing_are_written_once():
    sources = [*(ROOT / "elastic").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]
    assert len(sources) > 100
    found = {str(path.relative_to(ROOT)) for path in sources if ONCE.search(path.read_text(encoding="utf-8"))}
    assert found == {"elastic/files.py"}


def write_file(number, file):
    for _ in range(TIMES):
        with new_file(file) as scratch:
            scratch.write_text(f"{number}" * 50_000 * (number + 1))
        text = file.read_text()
        assert len(text) == 50_000 * (int(text[0]) + 1) and len(set(text)) == 1


def test_writers_without_a_lock_share_no_scratch_file(tmp_path):
    """Processes, then threads."""
    file = tmp_path / "new" / "result"
    assert together(write_file, file) == [0] * WRITERS
    threads = [threading.Thread(target=write_file, args=(number, file)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write_file(0, file)
    assert [path.name for path in file.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_what_a_killed_writer_leaves_is_removed_by_the_next(make, tmp_path):
    target = tmp_path / "result"

    def dying(_):
        with make(target) as scratch:
            scratch.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert together(dying) == [-signal.SIGKILL] * WRITERS
    left = list(tmp_path.iterdir())
    assert left and target not in left
    with make(target) as scratch:
        scratch.touch()
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_running_writer_makes_is_left_alone(tmp_path):
    target = tmp_path / "result"
    begun, end = multiprocessing.Event(), multiprocessing.Event()

    def slow():
        with new_file(target) as scratch:
            scratch.write_text("slow")
            begun.set()
            end.wait(60)

    process = multiprocessing.get_context("fork").Process(target=slow)
    process.start()
    assert begun.wait(60)
    files.write_atomic(target, "fast")
    assert target.read_text() == "fast" and len(list(tmp_path.iterdir())) == 2
    end.set()
    process.join(60)
    assert process.exitcode == 0 and target.read_text() == "slow" and list(tmp_path.iterdir()) == [target]


def write_folder(number, folder):
    for _ in range(TIMES):
        with new_folder(folder) as scratch:
            for name in ("one", "two"):
                (scratch / name).write_text(str(number))
        for name in ("one", "two"):
            assert (folder / name).read_text() in "0123"


def test_writers_and_readers_of_a_folder_meet_a_whole_one(tmp_path):
    """Also where nothing was there before."""
    assert together(write_folder, tmp_path / "result") == [0] * WRITERS
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    one, two = ((tmp_path / "result" / name).read_text() for name in ("one", "two"))
    assert one == two


@contextmanager
def another_writer(target, held=sole_writer):
    """A process that writes `target` until the context ends, with a worker of its own that outlives it."""
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()

    def write():
        with held(target):
            if os.fork():
                begun.set()
            time.sleep(60)
            os._exit(0)

    process = fork.Process(target=write)
    process.start()
    assert begun.wait(60)
    try:
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("name", ["result", "new/folder/result"])
def test_a_second_writer_hears_of_the_first(name, tmp_path):
    target = tmp_path / name
    with another_writer(target) as first:
        for _ in range(2):
            said = rf"result is being written by process {first.pid} on .*; wait until it has ended, or choose another"
            with pytest.raises(ValueError, match=said), sole_writer(target):
                pass
        with sole_writer(tmp_path / "other"):
            pass
    for _ in range(2):  # the first is dead, and its worker holds nothing
        with sole_writer(target):
            assert target.with_name(".result.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(target.parent.glob(".*"))


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_written_all_the_same(error, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(files.fcntl, "lockf", none)
    with sole_writer(tmp_path / "result"):
        pass
    error = errno.EIO
    with pytest.raises(OSError, match="Input/output"), sole_writer(tmp_path / "result"):
        pass


@pytest.mark.parametrize("error", [OSError("full"), ValueError("bad"), KeyboardInterrupt()])
@pytest.mark.parametrize("make", [new_file, new_folder])
def test_an_exception_leaves_what_was_there(make, error, tmp_path):
    target = tmp_path / "result"
    with make(target) as scratch:
        scratch.touch()
    before = target.stat().st_ino
    with pytest.raises(type(error)), make(target) as scratch:
        scratch.touch()
        raise error
    assert list(tmp_path.iterdir()) == [target] and target.stat().st_ino == before


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_an_error_of_the_disk_names_the_file(make, tmp_path):
    """The system's own names none where a write fails."""
    with pytest.raises(OSError, match=r"No space left on device: .*result'$"), make(tmp_path / "result"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"Permission denied: 'other'$"), make(tmp_path / "result"):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), "other")


def test_a_cache_that_cannot_be_written_says_how_to_choose_another(tmp_path, monkeypatch):
    """The cache is named where its folder cannot be made or its disk is full, and nowhere else."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "file"))
    way = r"\(the cache; set ELASTIC_CACHE to a folder that can be written\): '{}'$"
    lock = files.cache_folder() / "ruler" / "lock"
    with pytest.raises(OSError, match=way.format(lock.parent)), alone(lock):
        pass
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    for folder, said in (("cache", way.format(tmp_path / "cache" / "file")), ("own", r"device: '.*file'$")):
        with (
            pytest.raises(OSError, match=said),
            alone(tmp_path / folder / "lock"),
            new_file(tmp_path / folder / "file"),
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_a_link_stays_and_what_it_points_to_is_replaced(make, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "result"
    link.symlink_to(Path("disk") / "real")
    for _ in range(2):  # dangling, then not
        with make(link) as scratch:
            scratch.touch()
            assert scratch.parent == tmp_path / "disk"
        assert link.is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "result"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_an_ordinary_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        files.write_atomic(tmp_path / "file", "text")
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_only_what_asks_for_it_is_flushed_and_before_the_rename(make, tmp_path, monkeypatch):
    target = tmp_path / "result"
    flushed = []
    monkeypatch.setattr(files, "_flush", lambda path: flushed.append((path.name, target.exists())))
    for sync in (False, True):
        with make(target, sync=sync) as scratch:
            (scratch / "part" if make is new_folder else scratch).write_text("text")
        assert len(flushed) == sync
        files._remove(target)
    assert flushed[0][1] is False


def test_a_folder_is_replaced_where_the_system_cannot_exchange_two(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    write_folder(0, tmp_path / "result")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_an_exchange_that_fails_puts_the_old_folder_back(tmp_path):
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "missing", target)
    assert [path.name for path in target.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_a_kill_left_set_aside_is_back_while_the_next_is_made(tmp_path):
    target = tmp_path / "result"
    set_aside(target).mkdir()
    (set_aside(target) / "old").touch()
    with new_folder(target) as scratch:
        assert (target / "old").exists()
        (scratch / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [target]


def test_what_must_not_be_replaced(tmp_path):
    folder = tmp_path / "folder"
    assert not is_foreign(folder, "marker")
    folder.mkdir()
    assert not is_foreign(folder, "marker")
    (folder / "notes").touch()
    assert is_foreign(folder, "marker") and is_foreign(folder / "notes", "marker")
    (folder / "marker").touch()
    assert not is_foreign(folder, "marker")


def test_checksums(tmp_path):
    """The first is the published digest of the empty input, the second that of `abc` (FIPS 180-2, appendix B.1)."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"a")
    second.write_bytes(b"bc")
    assert text_sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert text_sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(first, second) == text_sha256("abc") and file_sha256() == text_sha256("")


def test_a_changed_object_is_told_from_its_checksum():
    """A single bit anywhere is noticed, or changes nothing but the checksum's own name."""
    values = {"name": "code", "rows": 12, "share": 0.25, "lists": [1, {"deep": None}], "by number": {3: True}}
    text = sealed(values)
    plain = json.loads(json.dumps(values))
    assert unsealed(text) == unsealed(json.dumps(values)) == plain
    for place in range(len(text) * 8):
        changed = bytearray(text.encode())
        changed[place // 8] ^= 1 << place % 8
        try:
            found = unsealed(changed.decode())
        except ValueError:
            continue
        assert {key: value for key, value in found.items() if key in plain} == plain, changed
    with pytest.raises(ValueError, match="not a JSON object"):
        unsealed("[1]")
