"""Which versions of vLLM the plugin runs on. No import of vLLM or torch."""

import re

FIRST, BEFORE = (0, 32), (0, 33)  # tested: 0.32.0
READ = (0, 24)  # its source was read, it never ran; for machines whose torch is 2.11
_SHOWN = "0.32"


def check_version(version: str, untested: bool = False) -> None:
    """Refuse a vLLM whose internals were not tested with the plugin: what it builds on promises no stability.

    Args:
        version: such as `0.32.0` or `0.32.1+cpu`.
        untested: let `READ` pass too.

    Raises:
        RuntimeError: another release.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (FIRST <= release < BEFORE or (untested and release == READ)):
        raise RuntimeError(
            f"vLLM {version} is installed, but the plugin of elastic-attention was tested with vLLM {_SHOWN} only and "
            f"builds on internals of it; install 'vllm=={_SHOWN}.*', or leave `elastic` out of --additional-config"
        )
