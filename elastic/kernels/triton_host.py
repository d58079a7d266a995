"""Whether Triton's kernels can be built here: also those of `torch.compile`, which are Triton's on a GPU."""

import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

from torch.utils._triton import has_triton


@cache
def triton_reason() -> str | None:
    """Why Triton runs nothing here; None where it does. It compiles its own part of the host in C, against Python's
    headers, for which images of CUDA's runtime have no compiler.
    """
    if not has_triton():
        return "Triton does not run on this GPU"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, but there is neither gcc nor clang; install gcc, or name one in CC"
    asked = any(os.environ.get(name) for name in ("CPATH", "C_INCLUDE_PATH"))
    if not asked and not any((Path(folder) / "Python.h").is_file() for folder in _header_folders()):
        return "Triton needs Python's headers, but there is no Python.h; install them (python3-dev)"
    return None


def _header_folders() -> list[str]:
    """Where Python's headers may be, by what it says of itself."""
    paths = [sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")]
    return [folder for folder in (*paths, sysconfig.get_config_var("INCLUDEPY")) if folder]
