"""One answer in the making: its text, and whether it is done. What goes wrong with it ends it alone."""

import logging
import time
from collections.abc import Collection
from typing import Any

from elastic.inference.serving.jobs import Job
from elastic.inference.serving.text import TextCutter
from elastic.inference.stepwise import Drawing

_log = logging.getLogger(__name__)
# Seconds between two pieces of an answer's text. Each piece is a message to another thread and a write to a socket, and
# with one for every token of a large batch the server would spend as much time on them as on the model.
PACE = 0.02


class Row:
    """Follows one answer, token by token, and tells its text in pieces, `PACE` apart.

    Args:
        job: the request.
        drawing: where its tokens come from.
        cutter: turns them into text.
        ends: tokens that end an answer.

    Attributes:
        reason: why no more tokens are needed; None while they are.
        details: what the end tells beside the reason.
        held: bytes of its keys and values.
    """

    def __init__(self, job: Job, drawing: Drawing, cutter: TextCutter, ends: Collection[int]) -> None:
        self.job, self.drawing, self.cutter, self.ends = job, drawing, cutter, ends
        self.reason: str | None = None
        self.details: dict[str, Any] = {}
        self.held = 0
        self._untold, self._told_at = "", -PACE

    def take(self, token: int) -> None:
        """The next token."""
        try:
            self.reason = self._take(token)
        except Exception as error:  # noqa: BLE001 - it ends this answer alone
            self._break(error)

    def finish(self) -> None:
        """Tell the end, after what the cutter still held back."""
        job, reason = self.job, self.reason or "length"
        if reason in ("cancelled", "timeout"):
            self._tell()
            job.give_up(reason, f"after {job.new_tokens} new tokens")
        else:
            try:
                self._untold += self.cutter.rest()
            except Exception as error:  # noqa: BLE001 - it ends this answer alone
                self._break(error)
                return
            self._tell()
            job.say("end", reason, **self.details)

    def _take(self, token: int) -> str | None:
        """The reason for which the answer is done now, or None."""
        job, cutter = self.job, self.cutter
        job.new_tokens += 1
        if token in self.ends:
            return "stop"
        self._untold += cutter.add(token)
        if time.monotonic() - self._told_at >= PACE:
            self._tell()
        if cutter.stopped:
            return "stop"
        return job.given_up or ("length" if job.new_tokens >= job.limit else None)

    def _tell(self) -> None:
        """Text that has come since the last piece. The first is told at once."""
        if self._untold:
            self.job.say("text", self._untold)
            self._untold, self._told_at = "", time.monotonic()

    def _break(self, error: Exception) -> None:
        _log.error("one answer failed", exc_info=error)
        self.reason = "error"
        self._tell()
        self.job.fail(f"the text of this answer failed: {type(error).__name__}: {error}")
