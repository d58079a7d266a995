"""One thread per test process, because the suite runs in parallel processes; no test ever reaches for a network; and
none believes that another has launched it.
"""

import os
import signal
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; the commands under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _launched_by_nobody() -> Iterator[None]:
    """Lightning notes in the environment what it has launched. A later test's command, which inherits the notes, would
    launch no processes of its own and wait for them for ever.
    """
    yield
    for name in LAUNCHED:
        os.environ.pop(name, None)
