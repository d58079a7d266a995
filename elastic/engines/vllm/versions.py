"""Which versions of vLLM the plugin runs on. No import of vLLM or torch."""

import re

SUPPORTED = ((0, 24), (0, 32))  # the releases whose engine the tests ran in; none between them
_ON_GPU = "0.24"
_SHOWN = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)


def check_version(version: str) -> None:
    """Refuse a vLLM whose internals were not tested with the plugin: what it builds on promises no stability.

    Args:
        version: such as `0.32.0` or `0.32.1+cpu`.

    Raises:
        RuntimeError: another release.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else None
    if release not in SUPPORTED:
        raise RuntimeError(
            f"vLLM {version} is installed, but the plugin of elastic-attention was tested with vLLM {_SHOWN} only and "
            f"builds on internals of it; install 'vllm=={SUPPORTED[-1][0]}.{SUPPORTED[-1][1]}.*', or leave `elastic` "
            "out of --additional-config"
        )


def untested_on_gpu(version: str, gpus: int) -> str | None:
    """What of an engine on so many GPUs ran on the CPU only; None where all of it was tested on a GPU."""
    on_cpu = [] if version.startswith(f"{_ON_GPU}.") else [f"vLLM {version}"]
    on_cpu += ["several processes"] if gpus > 1 else []
    if not on_cpu:
        return None
    return (
        f"tested on the CPU only: {', '.join(on_cpu)}; on a GPU it was vLLM {_ON_GPU} in one process. Compare its "
        "answers (tests/engines/gpu_engine.py does)"
    )
