"""Which versions of vLLM the plugin runs on. No import of vLLM or torch."""

import re

FIRST, BEFORE = (0, 32), (0, 33)  # tested: 0.32.0
_SHOWN = "0.32"


def check_version(version: str) -> None:
    """Refuse a vLLM whose internals were not tested with the plugin: what it builds on promises no stability.

    Args:
        version: such as `0.32.0` or `0.32.1+cpu`.

    Raises:
        RuntimeError: another release.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not FIRST <= (int(found[1]), int(found[2])) < BEFORE:
        raise RuntimeError(
            f"vLLM {version} is installed, but the plugin of elastic-attention was tested with vLLM {_SHOWN} only and "
            f"builds on internals of it; install 'vllm=={_SHOWN}.*', or leave `elastic` out of --additional-config"
        )
