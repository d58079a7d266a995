"""The cache of compiled kernels: verified, compiled once for all processes, nothing left of a full disk. Needs neither
a compiler nor a GPU: what compiles is a stand-in.
"""

import errno
import logging
import multiprocessing
import os
import time

import pytest

from elastic.kernels import jit

VARIANT = jit.Variant("attention_decode", "sm_80", 64, True)
BINARY = bytes(range(256)) * 64


class Compiler:
    """Says which version it is, as NVRTC does."""

    @staticmethod
    def getVersion():  # noqa: N802
        return 12, 9


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Number of compilations so far, over all processes; each takes a moment."""
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    log = tmp_path / "log"
    log.touch()

    def compile_cubin(_):
        with open(log, "a") as stream:
            stream.write("x")
        time.sleep(0.3)
        return BINARY, ""

    monkeypatch.setattr(jit, "_import_nvrtc", lambda: Compiler)
    monkeypatch.setattr(jit, "compile_cubin", compile_cubin)
    return lambda: len(log.read_text())


def test_a_kernel_is_compiled_once(compiled):
    path = jit.cubin_path(VARIANT)
    assert jit.cubin_path(VARIANT) == path and path.read_bytes() == BINARY and compiled() == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda binary: binary.write_bytes(b""),
        lambda binary: binary.write_bytes(BINARY[:100]),
        lambda binary: binary.write_bytes(BINARY[:77] + b"\xff" + BINARY[78:]),
        lambda binary: binary.write_bytes(b"of something else"),
        lambda binary: binary.with_suffix(".sha256").unlink(),
        lambda binary: binary.with_suffix(".sha256").write_text(""),
        lambda binary: binary.unlink(),
    ],
    ids=["empty", "cut", "flipped", "foreign", "no checksum", "empty checksum", "missing"],
)
def test_a_damaged_kernel_is_compiled_again(damage, compiled, caplog):
    path = jit.cubin_path(VARIANT)
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert jit.cubin_path(VARIANT).read_bytes() == BINARY
    assert compiled() == 2 and ("is damaged" in caplog.text) == (damage.__code__.co_names != ("unlink",))
    jit.cubin_path(VARIANT)
    assert compiled() == 2


def test_eight_processes_compile_it_once(compiled):
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=jit.cubin_path, args=(VARIANT,)) for _ in range(8)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 8 and compiled() == 1


def test_a_full_disk_leaves_no_scratch_file_and_names_the_cache(compiled, monkeypatch):
    folder = jit.cache_directory()
    whole = type(folder).write_bytes

    def half(path, data):
        whole(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(folder), "write_bytes", half)
    with pytest.raises(OSError, match=r"No space left on device .*ELASTIC_CACHE") as caught:
        jit.cubin_path(VARIANT)
    assert caught.value.errno == errno.ENOSPC and str(folder) in str(caught.value)
    assert {path.suffix for path in folder.iterdir()} <= {".lock"}
    monkeypatch.undo()


def test_a_cache_that_cannot_be_made_names_the_variable(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="ELASTIC_CACHE"):
        jit.cubin_path(VARIANT)
    assert compiled() == 0
