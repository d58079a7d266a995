"""Device arithmetic compiled for the host, so that tests can call it without a GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from elastic.kernels.jit import CUDA_SRC


def build(source: str, folder: Path) -> ctypes.CDLL:
    """The library of a C++ file beside this one; skips the test where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler to build device arithmetic for the host")
    library = folder / Path(source).with_suffix(".so").name
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{CUDA_SRC / 'include'}"]
    subprocess.run([compiler, *options, str(Path(__file__).with_name(source)), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
