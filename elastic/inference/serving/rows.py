"""The rows of a running batch, token by token: the text of each, and which are done. What goes wrong with one row ends
that row alone.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from elastic.inference.serving.jobs import Job
from elastic.inference.serving.text import TextCutter
from elastic.protocols import Tokenizer

_log = logging.getLogger(__name__)


class Rows(BaseStreamer):
    """Follows every row of a batch: tells its text, and knows which rows are done.

    Args:
        batch: requests in the order of the rows.
        tokenizer: of the model.
        ends: tokens that end an answer.
    """

    def __init__(self, batch: list[Job], tokenizer: Tokenizer, ends: list[int]) -> None:
        self.batch, self.ends = batch, set(ends)
        self.cutters = [TextCutter(tokenizer, job.stops) for job in batch]
        self.reasons: list[str | None] = [None] * len(batch)
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the next token of every row; transformers hands over the prompt first."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in enumerate(value.flatten().tolist()):
            if self.reasons[row] is None:
                try:
                    self.reasons[row] = self._take(row, token)
                except Exception as error:  # noqa: BLE001 - it ends this row alone
                    self._break(row, error)

    def end(self) -> None:
        """Part of the interface; rows end one by one."""

    def finish(self, row: int, details: dict[str, Any]) -> None:
        """Tell the end of a row, after what its cutter still held back."""
        job, reason = self.batch[row], self.reasons[row] or "length"
        if reason == "cancelled":
            job.fail("the request was cancelled", 499)
        elif reason == "timeout":
            job.fail(f"the request timed out after {job.new_tokens} new tokens", 504)
        else:
            try:
                rest = self.cutters[row].rest()
            except Exception as error:  # noqa: BLE001 - it ends this row alone
                self._break(row, error)
                return
            if rest:
                job.say("text", rest)
            job.say("end", reason, **details)

    def _take(self, row: int, token: int) -> str | None:
        """The reason for which this row is done now, or None."""
        job, cutter = self.batch[row], self.cutters[row]
        job.new_tokens += 1
        if token in self.ends:
            return "stop"
        if text := cutter.add(token):
            job.say("text", text)
        if cutter.stopped:
            return "stop"
        return job.given_up or ("length" if job.new_tokens >= job.limit else None)

    def _break(self, row: int, error: Exception) -> None:
        _log.error("one answer of a batch failed", exc_info=error)
        self.reasons[row] = "error"
        self.batch[row].fail(f"the text of this answer failed: {type(error).__name__}: {error}")


class Done(StoppingCriteria):
    """Rows that need no more tokens."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        return torch.tensor([reason is not None for reason in self.rows.reasons], device=input_ids.device)
