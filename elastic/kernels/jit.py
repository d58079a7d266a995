"""Compiles `cuda_src` with NVRTC on first use, keeps the binaries on disk, launches them on torch's current stream.

The only importer of CuPy. The cache key covers the sources, every header, the options and the compiler's version, so an
edited header never runs an old kernel. Files appear by an atomic rename and are loaded only where their checksum, kept
beside them, is right; processes that need the same one wait for the first to compile it.
"""

import ctypes
import importlib.util
import logging
import threading
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic.files import alone, cache_folder, file_sha256, new_file, shipped, text_sha256, write_atomic

CUDA_SRC = shipped("cuda_src")
_log = logging.getLogger("elastic.kernels")


@dataclass(frozen=True)
class Variant:
    """One compiled file of `cuda_src`, its entry point (default: like the file), target (sm_90a, ...) and macros."""

    file: str
    arch: str
    head_dim: int
    bf16: bool
    debug: tuple[str, ...] = ()  # more macros: ELASTIC_WARPS=4; of the tests, ELASTIC_WATCHDOG=1, ELASTIC_STRESS=1
    entry: str = ""

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.entry or self.file

    @property
    def options(self) -> tuple[str, ...]:
        """Compiler options, in the order in which they are hashed."""
        macros = (f"ELASTIC_HEAD_DIM={self.head_dim}", f"ELASTIC_BF16={int(self.bf16)}", *self.debug)
        return (f"-arch={self.arch}", "-std=c++17", "--ptxas-options=-v", *(f"-D{macro}" for macro in macros))


@cache
def _source_hash() -> str:
    files = sorted(CUDA_SRC.rglob("*.cu*"))
    return text_sha256("".join(f"{file.relative_to(CUDA_SRC)}\0{file.read_text('utf-8')}\0" for file in files))


def is_installed() -> bool:
    """Whether CuPy can be imported; does not import it."""
    return importlib.util.find_spec("cupy") is not None


def _import_nvrtc() -> Any:
    try:
        import cupy  # noqa: F401  (loads the libraries)
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        raise ModuleNotFoundError(
            "the CUDA kernels need CuPy, which is not installed; run `pip install elastic-attention[cuda12]` or "
            "`[cuda13]`, by the CUDA version of torch, or run on the CPU"
        ) from error
    return nvrtc


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    return cache_folder() / "kernels"


def compile_cubin(variant: Variant) -> tuple[bytes, str]:
    """Compile; needs no GPU.

    Returns:
        the binary and the compiler's log with its resource report.

    Raises:
        RuntimeError: the compiler is too old for the target, or refused the source; the message carries its log.
    """
    nvrtc = _import_nvrtc()
    version = nvrtc.getVersion()
    if variant.arch.endswith("a") and version < (12, 9):
        raise RuntimeError(
            f"NVRTC {version[0]}.{version[1]} is too old for {variant.arch}, 12.9 or newer is needed; run "
            "`pip install -U nvidia-cuda-nvrtc-cu12`"
        )
    source = (CUDA_SRC / f"{variant.file}.cu").read_text()
    program = nvrtc.createProgram(source, f"{variant.file}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*variant.options, f"-I{CUDA_SRC / 'include'}"))
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"NVRTC {version} could not compile {variant}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def cubin_path(variant: Variant) -> Path:
    """The cached binary of a variant, compiled now if it is missing or damaged.

    Raises:
        RuntimeError: as `compile_cubin`.
        OSError: a cache folder that cannot be written, or a full disk.
    """
    version = _import_nvrtc().getVersion()
    key = text_sha256(repr((_source_hash(), variant.file, variant.options, version)))[:24]
    path = cache_directory() / f"{variant.file}-{variant.arch}-d{variant.head_dim}-{key}.cubin"
    if _is_whole(path):
        return path
    with alone(path.with_suffix(".lock")):
        if _is_whole(path):  # compiled by another process meanwhile
            return path
        start = time.perf_counter()
        _log.warning("compiling %s for %s, D %d (%s)", variant.file, variant.arch, variant.head_dim, _reason(path))
        cubin, _ = compile_cubin(variant)
        with new_file(path) as scratch:
            scratch.write_bytes(cubin)
            checksum = file_sha256(scratch)
        write_atomic(_checksum(path), checksum)
        _log.warning("compiled in %.1f s, kept in %s", time.perf_counter() - start, path.parent)
    return path


def _checksum(binary: Path) -> Path:
    return binary.with_suffix(".sha256")


def _is_whole(binary: Path) -> bool:
    """Whether a binary is there as it was compiled. One without a checksum (earlier versions) counts as damaged."""
    checksum = _checksum(binary)
    return binary.is_file() and checksum.is_file() and checksum.read_text("utf-8") == file_sha256(binary)


def _reason(binary: Path) -> str:
    return f"{binary} is damaged, or of an earlier version" if binary.exists() else "first use"


@cache
def load_kernel(variant: Variant, device: int) -> Any:
    """The CuPy kernel object of a variant on a device, allowed to use all the shared memory that a CTA can have."""
    path = cubin_path(variant)
    import cupy

    with cupy.cuda.Device(device):
        kernel = cupy.RawModule(path=str(path)).get_function(variant.name)
        # CuPy hands out one function object per binary, so this is set once and to the limit, not per launch.
        properties = torch.cuda.get_device_properties(device)
        limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        kernel.max_dynamic_shared_size_bytes = limit - kernel.shared_size_bytes
    return kernel


@lru_cache(maxsize=256)
def _external_stream(address: int, device: int) -> Any:
    import cupy

    return cupy.cuda.ExternalStream(address, device)


@cache
def _by_value(size: int) -> np.dtype:
    return np.dtype(f"V{size}")


def current_stream(index: int) -> int:
    """Address of torch's current stream on a device (the raw accessor: the public one builds an object per call)."""
    return torch._C._cuda_getCurrentRawStream(index)


@cache
def _capture_info() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2


def capture_id(index: int) -> int:
    """Number of the graph capture that torch's current stream is in; 0 outside of one."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(current_stream(index))
    failed = _capture_info()(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    if failed:
        raise RuntimeError(f"cuStreamGetCaptureInfo failed with CUDA error {failed}")
    return number.value


_thread = threading.local()


def bind_thread(index: int) -> None:
    """Make the device's context current on this thread, once: autograd's threads start without one, and torch's own
    allocator and streams do not create it.
    """
    if getattr(_thread, "bound", False):
        return
    import cupy

    cupy.cuda.runtime.setDevice(index)
    _thread.bound = True


def launch(kernel: Any, grid: tuple[int, ...], threads: int, params: bytes, shared_bytes: int, index: int) -> None:
    """Launch on torch's current stream of device `index`; `params` is the one by-value argument."""
    bind_thread(index)
    argument = np.frombuffer(params, _by_value(len(params)))
    stream = _external_stream(current_stream(index), index)
    if torch.cuda.current_device() == index:
        kernel(grid, (threads,), (argument,), shared_mem=shared_bytes, stream=stream)
    else:
        with torch.cuda.device(index):
            kernel(grid, (threads,), (argument,), shared_mem=shared_bytes, stream=stream)
