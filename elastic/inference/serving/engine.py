"""Requests to batches: one thread owns the model, waiting requests of the same sampling settings share a left-padded
batch in which every sample has its own routes, and each request's text leaves as it is made.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from elastic.data.prompts import EncodedPrompt
from elastic.inference.generate import answer_tokens, eos_ids
from elastic.inference.serving.text import TextCutter
from elastic.protocols import CausalLM, Tokenizer

if TYPE_CHECKING:
    from elastic.inference.serving.metrics import Metrics


class Sampling(NamedTuple):
    """What the requests of one batch have in common; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    sparsity_bias: float | None = None

    def options(self) -> dict[str, Any]:
        """Options of `model.generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "sparsity_bias": self.sparsity_bias}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"do_sample": True, "sparsity_bias": self.sparsity_bias, **chosen}


class Event(NamedTuple):
    """News of a request: `text` (more of the answer), `end` (finish reason; `details`: its routes) or `error` (message;
    `details`: the HTTP status).
    """

    kind: str
    text: str
    details: dict[str, Any] = {}  # noqa: RUF012 - never written to


@dataclass(eq=False)
class Job:
    """One request in the engine.

    Attributes:
        prompt: in tokens.
        limit: new tokens at most.
        sampling: must agree within a batch.
        stops: texts that end the answer and are not part of it.
        deadline: `time.monotonic()` after which it is given up.
        tell: called with every `Event`, from the engine's thread.
        new_tokens: tokens made so far.
        cancelled: set by whoever no longer wants the answer.
    """

    prompt: EncodedPrompt
    limit: int
    sampling: Sampling
    stops: tuple[str, ...]
    deadline: float
    tell: Callable[[Event], None]
    new_tokens: int = 0
    arrived: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)


class QueueFullError(Exception):
    """As many requests wait as the engine lets wait."""


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
        if batch_seconds < 0:
            raise ValueError(f"batch_seconds={batch_seconds} is below 0; 0 starts a batch at once")
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
        """Requests in the queue."""
        return len(self._waiting)

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
        """Drop cancelled and timed-out requests."""
        for job in list(self._waiting):
            if job.cancelled.is_set() or time.monotonic() > job.deadline:
                self._waiting.remove(job)
                job.tell(Event("error", "the request timed out while it waited for its turn", {"status": 504}))

    def _answer(self, batch: list[Job]) -> None:
        self.metrics.started([time.monotonic() - job.arrived for job in batch])
        rows = _Rows(batch, self.tokenizer, eos_ids(self.model))
        if batch[0].sampling.seed is not None:
            torch.manual_seed(batch[0].sampling.seed)
        try:
            results = answer_tokens(
                self.model,
                self.tokenizer,
                [job.prompt for job in batch],
                max_new_tokens=max(job.limit for job in batch),
                streamer=rows,
                stopping_criteria=StoppingCriteriaList([_Done(rows)]),
                **batch[0].sampling.options(),
            )
        except Exception as error:  # noqa: BLE001 - report any failure to the callers and keep serving
            for job in batch:
                job.tell(Event("error", f"the model failed: {type(error).__name__}: {error}", {"status": 500}))
            self.metrics.failed(len(batch))
            return
        for row, (job, result) in enumerate(zip(batch, results, strict=True)):
            rows.finish(row, {"msr": result.report.msr, "esr": result.report.esr_all, "backend": result.report.backend})
            self.metrics.finished(len(job.prompt), job.new_tokens, result.report.msr)


def _together(first: Job, other: Job) -> bool:
    """A seeded request runs alone: its draws must not depend on who else is there."""
    return first.sampling == other.sampling and first.sampling.seed is None


class _Rows(BaseStreamer):
    """Follows every row of a batch token by token: tells its text, and knows which rows are done."""

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
                self.reasons[row] = self._take(row, token)

    def end(self) -> None:
        """Part of the interface; rows end one by one."""

    def _take(self, row: int, token: int) -> str | None:
        """The reason for which this row is done now, or None."""
        job, cutter = self.batch[row], self.cutters[row]
        job.new_tokens += 1
        if token in self.ends:
            return "stop"
        if text := cutter.add(token):
            job.tell(Event("text", text))
        if cutter.stopped:
            return "stop"
        if job.cancelled.is_set():
            return "cancelled"
        if time.monotonic() > job.deadline:
            return "timeout"
        return "length" if job.new_tokens >= job.limit else None

    def finish(self, row: int, details: dict[str, Any]) -> None:
        """Tell the end of a row, after what its cutter still held back."""
        job, reason = self.batch[row], self.reasons[row] or "length"
        if reason in ("timeout", "cancelled"):
            job.tell(Event("error", f"the request timed out after {job.new_tokens} new tokens", {"status": 504}))
            return
        if rest := self.cutters[row].rest():
            job.tell(Event("text", rest))
        job.tell(Event("end", reason, details))


class _Done(StoppingCriteria):
    """Rows that need no more tokens."""

    def __init__(self, rows: _Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        return torch.tensor([reason is not None for reason in self.rows.reasons], device=input_ids.device)
