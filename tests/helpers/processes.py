"""Processes of a command, and whether they have ended."""

import os
import signal
import time
from pathlib import Path


def gone(session: int, seconds: float = 20) -> bool:
    """Whether all processes of a session end within a time. Those that have ended and wait for a parent to notice
    count as ended: where the first process of a machine is a plain program, that takes it many seconds.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not _running(session):
            return True
        time.sleep(0.05)
    os.killpg(session, signal.SIGKILL)
    return False


def _running(group: int) -> bool:
    if not Path("/proc/self/stat").is_file():  # no Linux
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        return True
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of, *_ = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if int(of) == group and state not in "ZX":
            return True
    return False
