"""Requests to answers: one thread owns the model and gives every running answer a token in turn. Answers share decode
steps, each with its own routes, length and settings; one that is done is told at once and the next takes its place.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from elastic.inference.generate import eos_ids, route_report
from elastic.inference.serving.admission import Admission
from elastic.inference.serving.batch import Batch
from elastic.inference.serving.jobs import Job, QueueFullError, check_room
from elastic.inference.serving.pauses import GivenUpError, Pauses
from elastic.inference.serving.rows import Row
from elastic.inference.serving.text import TextCutter
from elastic.inference.stepwise import begin
from elastic.model.generation import setting
from elastic.protocols import CausalLM, Tokenizer

if TYPE_CHECKING:
    from elastic.inference.serving.metrics import Figures, Metrics

_log = logging.getLogger(__name__)


class Engine:
    """The model and its queue.

    Args:
        model, tokenizer: as `elastic.load` returns them.
        max_batch: requests that are answered at a time, fewer where memory does not hold them.
        max_queue: requests that may wait; one more is refused.
        metrics: told about waiting, running and finished requests.
        prefill_chunk_size: tokens of a prompt that are read at a time; None: as the model's generation config says.
        told: called with the engine when all that a step has to say was told.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, *, max_batch: int, max_queue: int, metrics: "Metrics | Figures",
        prefill_chunk_size: int | None = None, told: "Callable[[Engine], None]" = lambda engine: None,
    ) -> None:  # fmt: skip
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue)):
            if value < 1:
                raise ValueError(f"{name}={value} is below 1; the server must take at least one request")
        self.model, self.tokenizer, self.metrics, self._piece = model, tokenizer, metrics, prefill_chunk_size
        piece = prefill_chunk_size or setting(model, {}, "prefill_chunk_size")
        self.max_queue, self._admission = max_queue, Admission(model, max_batch, piece=piece)
        self._told = told
        self._batches: list[Batch] = []
        self._reading: list[Job] = []  # whose prompts are; some within a pause of others
        self._step_seconds = 0.0  # of the last token of all running answers
        self._rest_until = 0.0  # until when answers that waited for a prompt have the model
        self._waited: list[Row] = []  # these answers
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
    def working(self) -> bool:
        """Whether its thread runs, also while it closes."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests in the queue, without those that nobody waits for any more."""
        return sum(job.given_up is None for job in self.queue)

    @property
    def queue(self) -> tuple[Job, ...]:
        """Those whose turn has not come."""
        return tuple(self._waiting)

    def submit(self, *jobs: Job) -> None:
        """Queue a request: all of its jobs, or none.

        Raises:
            QueueFullError: too many wait already, or the server is shutting down.
        """
        with self._news:
            if self._closing:
                raise QueueFullError("the server is shutting down")
            self._drop_late()
            check_room(len(self._waiting), len(jobs), self.max_queue)
            self._waiting.extend(jobs)
            self._news.notify()

    def close(self, seconds: float) -> bool:
        """Answer what was taken, for `seconds` at most, then stop; whether everything was answered."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait until it has stopped."""
        self._thread.join()

    def _work(self) -> None:
        while True:
            if self._turn():
                continue
            with self._news:
                if not self._waiting:
                    if self._closing:
                        return
                    self._news.wait()

    def _turn(self, longest: float = math.inf) -> bool:
        """Begin with the oldest request whose prompt has no more tokens than that, and with those that are read with
        it, unless answers that waited for the last prompts are to have the model for as long; give every running answer
        a token; whether there is more to do.
        """
        waited = any(row.reason is None for row in self._waited)
        rests = waited and longest == math.inf and time.monotonic() < self._rest_until
        jobs = [] if rests else self._take(longest)
        if jobs:
            self._start(jobs)
        self._told(self)
        begun, running = time.monotonic(), self._running
        for batch in running:
            self._step(batch)
            self._told(self)
        self._step_seconds = time.monotonic() - begun
        return bool(jobs or running)

    @property
    def _running(self) -> list[Batch]:
        return [batch for batch in self._batches if batch.rows]

    def _take(self, longest: float) -> list[Job]:
        if not self._waiting:
            return []
        rows = [row for batch in self._batches for row in batch.rows]
        held = sum(row.held for row in rows) + sum(map(self._admission.bytes_of, self._reading))
        with self._news:
            self._drop_late()
            chosen = self._admission.choose(self._waiting, len(rows) + len(self._reading), held, longest)
            for job in chosen:
                self._waiting.remove(job)
        return chosen

    def _drop_late(self) -> None:
        """Drop requests that nobody waits for any more."""
        for job in list(self._waiting):
            if reason := job.given_up:
                self._waiting.remove(job)
                job.give_up(reason, "while it waited for its turn")

    def _start(self, jobs: list[Job]) -> None:
        try:
            for job in jobs:
                self.metrics.started(time.monotonic() - job.arrived)
            self._told(self)  # before prompts are read, which takes long
        except Exception as error:  # noqa: BLE001 - told to the callers, and written down
            self._fail(jobs, error)
        else:
            self._begin(jobs)

    def _begin(self, jobs: list[Job]) -> None:
        """Read prompts and let their answers decode with the others."""
        batch = None
        try:
            batch = self._read(jobs)
            batch.tell()
            self._finish(batch.leave())
            if batch.rows:
                self._add(batch)
        except GivenUpError:
            for job in jobs:
                job.give_up(job.given_up or "cancelled", "while its prompt was read")
            self.metrics.failed(len(jobs))
        except Exception as error:  # noqa: BLE001 - told to the callers, and written down
            if batch is None and len(jobs) > 1:  # of which one may be at fault
                for job in jobs:
                    self._begin([job])
            else:
                self._fail(jobs, error)

    def _read(self, jobs: list[Job]) -> Batch:
        short = self._admission.meanwhile(jobs)  # prompts that begin while others have their turns between two layers
        pauses = Pauses(jobs, lambda: self._turn(short), self._step_seconds)
        waited = [row for batch in self._running for row in batch.rows]
        self._reading += jobs
        try:
            with pauses.between_layers(self.model):
                asked, bias = [job.asked for job in jobs], jobs[0].sampling.sparsity_bias
                drawings, token_B1, cache = begin(self.model, asked, bias, self._piece)
        finally:
            self._reading = [job for job in self._reading if job not in jobs]
            # Meanwhile more requests come, which one pass then reads: read one by one as answers leave, prompts of a
            # small model would cost more than all of their answers.
            if waited:
                self._rest_until, self._waited = time.monotonic() + pauses.owed, waited
        own, ends = setting(self.model, {}, "stop_strings") or (), eos_ids(self.model)
        rows = [
            Row(job, drawing, TextCutter(self.tokenizer, (*job.stops, *own)), ends)
            for job, drawing in zip(jobs, drawings, strict=True)
        ]
        for row, report in zip(rows, route_report(self.model, cache), strict=True):
            row.held = report.kv_bytes_held
            row.details = {"msr": report.msr, "esr": report.esr_all, "backend": report.backend}
        return Batch(self.model, rows, token_B1, cache)

    def _add(self, batch: Batch) -> None:
        others = [other for other in self._batches if other.takes(batch)]
        if not others:
            self._batches.append(batch)
            return
        chosen = max(others, key=lambda other: len(other.rows))  # one that is empty comes last
        try:
            chosen.join(batch)
        except Exception as error:
            self._drop(chosen, error)  # some of its layers may have moved
            raise

    def _step(self, batch: Batch) -> None:
        """One more token for the rows of a batch; whatever goes wrong, their callers hear of it."""
        try:
            self.metrics.stepped(len(batch.rows))
            batch.step()
            self._finish(batch.leave())
        except Exception as error:  # noqa: BLE001 - told to the callers, and written down
            self._drop(batch, error)
        self._forget_idle()

    def _drop(self, batch: Batch, error: Exception) -> None:
        """Give up a batch that has failed."""
        self._batches.remove(batch)
        self._fail([row.job for row in batch.rows], error)

    def _forget_idle(self) -> None:
        """Of the batches that all rows have left, keep one: its storage, and the graphs over it, are for the next."""
        idle = [batch for batch in self._batches if not batch.rows]
        for batch in idle[1:]:
            self._batches.remove(batch)

    def _finish(self, rows: list[Row]) -> None:
        for row in rows:
            row.finish()
        for row in rows:
            self.metrics.finished(len(row.job.prompt), row.job.new_tokens, row.details["msr"])

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        _log.error("%d requests failed", len(jobs), exc_info=error)
        for job in jobs:
            job.fail(f"the model failed: {type(error).__name__}: {error}")
        self.metrics.failed(len(jobs))
