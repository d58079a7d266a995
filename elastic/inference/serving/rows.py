"""One answer in the making: its text, and whether it is done. What goes wrong with it ends it alone."""

import logging
from collections.abc import Collection
from typing import Any

from elastic.inference.serving.jobs import Job
from elastic.inference.serving.text import TextCutter
from elastic.inference.stepwise import Drawing

_log = logging.getLogger(__name__)


class Row:
    """Follows one answer, token by token, and tells its text.

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
            job.give_up(reason, f"after {job.new_tokens} new tokens")
        else:
            try:
                rest = self.cutter.rest()
            except Exception as error:  # noqa: BLE001 - it ends this answer alone
                self._break(error)
                return
            if rest:
                job.say("text", rest)
            job.say("end", reason, **self.details)

    def _take(self, token: int) -> str | None:
        """The reason for which the answer is done now, or None."""
        job, cutter = self.job, self.cutter
        job.new_tokens += 1
        if token in self.ends:
            return "stop"
        if text := cutter.add(token):
            job.say("text", text)
        if cutter.stopped:
            return "stop"
        return job.given_up or ("length" if job.new_tokens >= job.limit else None)

    def _break(self, error: Exception) -> None:
        _log.error("one answer failed", exc_info=error)
        self.reason = "error"
        self.job.fail(f"the text of this answer failed: {type(error).__name__}: {error}")
