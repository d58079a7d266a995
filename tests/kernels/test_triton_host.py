"""Triton runs only where its part of the host can be compiled; elsewhere everything runs without it."""

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic.kernels import triton_host
from elastic.kernels.triton_host import triton_reason
from elastic.model.fused_parts import unfused_reason


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A GPU that Triton knows, with a compiler and headers."""
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(triton_host, "has_triton", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: None)
    triton_reason.cache_clear()
    yield tmp_path
    triton_reason.cache_clear()


def test_a_machine_that_has_everything() -> None:
    assert triton_reason() is None and unfused_reason("cuda") is None


def test_a_gpu_that_triton_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_host, "has_triton", lambda: False)
    assert triton_reason() == unfused_reason("cuda") == "Triton does not run on this GPU"


@pytest.mark.parametrize("compiler", ["clang", None])
def test_a_machine_without_gcc(compiler: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As images of CUDA's runtime are: a model ran there before its parts were compiled, and still does."""
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    assert (triton_reason() is None) == (compiler is not None)
    if compiler is None:
        assert "neither gcc nor clang" in str(unfused_reason("cuda"))
        triton_reason.cache_clear()
        monkeypatch.setenv("CC", "/opt/cc")
        assert triton_reason() is None


def test_a_machine_without_headers(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "Python.h").unlink()
    assert "no Python.h" in str(triton_reason())
    triton_reason.cache_clear()
    monkeypatch.setenv("CPATH", "/opt/include")
    assert triton_reason() is None
