"""Requests to batches: one thread owns the model, waiting requests of the same sampling settings share a left-padded
batch in which every sample has its own routes, and each request's text leaves as it is made.
"""

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteriaList

from elastic.inference.generate import answer_tokens, eos_ids
from elastic.inference.serving.jobs import Job, QueueFullError
from elastic.inference.serving.rows import Done, Rows
from elastic.protocols import CausalLM, Tokenizer

if TYPE_CHECKING:
    from elastic.inference.serving.metrics import Metrics

_log = logging.getLogger(__name__)
_LONGEST_WAIT = 3600.0  # seconds


class Engine:
    """The model and its queue.

    Args:
        model, tokenizer: as `elastic.load` returns them.
        max_batch: requests in one batch.
        max_queue: requests that may wait; one more is refused.
        batch_seconds: how long the first request of a batch waits for others.
        metrics: told about waiting, running and finished requests.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        max_batch: int,
        max_queue: int,
        batch_seconds: float,
        metrics: "Metrics",
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue)):
            if value < 1:
                raise ValueError(f"{name}={value} is below 1; the server must take at least one request")
        if not 0 <= batch_seconds <= _LONGEST_WAIT:
            raise ValueError(f"batch_seconds={batch_seconds} is not 0 to {_LONGEST_WAIT:.0f}; 0 starts a batch at once")
        self.model, self.tokenizer, self.metrics = model, tokenizer, metrics
        self.max_batch, self.max_queue, self.batch_seconds = max_batch, max_queue, batch_seconds
        self._waiting: deque[Job] = deque()
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="elastic-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Requests in the queue, without those that nobody waits for any more."""
        return sum(job.given_up is None for job in tuple(self._waiting))

    def submit(self, job: Job) -> None:
        """Queue a request.

        Raises:
            QueueFullError: too many wait already, or the server is shutting down.
        """
        with self._news:
            if self._closing:
                raise QueueFullError("the server is shutting down")
            self._drop_late()
            if len(self._waiting) >= self.max_queue:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting, the most this server lets wait")
            self._waiting.append(job)
            self._news.notify()

    def close(self, seconds: float) -> bool:
        """Answer what was taken, for `seconds` at most, then stop; whether everything was answered."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._answer(batch)

    def _next_batch(self) -> list[Job] | None:
        """Requests that go together, oldest first; None when all is done and the engine closes."""
        with self._news:
            while not self._waiting:
                if self._closing:
                    return None
                self._news.wait()
            until = time.monotonic() + self.batch_seconds
            while not self._closing and len(self._waiting) < self.max_batch and (left := until - time.monotonic()) > 0:
                self._news.wait(left)
            self._drop_late()
            batch: list[Job] = []
            for job in list(self._waiting):
                if len(batch) < self.max_batch and (not batch or _together(batch[0], job)):
                    self._waiting.remove(job)
                    batch.append(job)
            return batch

    def _drop_late(self) -> None:
        """Drop requests that nobody waits for any more."""
        for job in list(self._waiting):
            if reason := job.given_up:
                self._waiting.remove(job)
                if reason == "cancelled":
                    job.fail("the request was cancelled while it waited for its turn", 499)
                else:
                    job.fail("the request timed out while it waited for its turn", 504)

    def _answer(self, batch: list[Job]) -> None:
        """Answer a batch; whatever goes wrong, its callers hear of it and the thread lives on."""
        try:
            self.metrics.started([time.monotonic() - job.arrived for job in batch])
            self._run(batch)
        except Exception as error:  # noqa: BLE001 - told to the callers, and written down
            _log.exception("a batch of %d failed", len(batch))
            left = [job for job in batch if not job.ended]
            for job in left:
                job.fail(f"the model failed: {type(error).__name__}: {error}")
            self.metrics.failed(len(left))

    def _run(self, batch: list[Job]) -> None:
        rows = Rows(batch, self.tokenizer, eos_ids(self.model))
        if batch[0].sampling.seed is not None:
            torch.manual_seed(batch[0].sampling.seed)
        results = answer_tokens(
            self.model,
            self.tokenizer,
            [job.prompt for job in batch],
            max_new_tokens=max(job.limit for job in batch),
            streamer=rows,
            stopping_criteria=StoppingCriteriaList([Done(rows)]),
            **batch[0].sampling.options(),
        )
        for row, (job, result) in enumerate(zip(batch, results, strict=True)):
            rows.finish(row, {"msr": result.report.msr, "esr": result.report.esr_all, "backend": result.report.backend})
            self.metrics.finished(len(job.prompt), job.new_tokens, result.report.msr)


def _together(first: Job, other: Job) -> bool:
    """A seeded request runs alone: its draws must not depend on who else is there."""
    return first.sampling == other.sampling and first.sampling.seed is None
