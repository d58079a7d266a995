"""The folder for what can be made again: converted backbones, compiled kernels."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ELASTIC_CACHE`, else `elastic` in the user's cache directory."""
    chosen = os.environ.get("ELASTIC_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic"
