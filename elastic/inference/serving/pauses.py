"""Pauses in the reading of prompts, which is one pass through all layers: between two of them others have a turn."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from typing import Any

from elastic.inference.serving.jobs import Job
from elastic.protocols import CausalLM

_PATIENCE = 8  # turns that others wait before the first pause, so that a short prompt is read at a stretch


class GivenUpError(Exception):
    """Nobody waits for any of the prompts that are being read."""


class Pauses:
    """Shares the time of the model between prompts that are being read and everything else, half and half.

    Args:
        jobs: whose prompts are read.
        turn: lets others have a turn; whether there was anything to do.
        turn_seconds: how long one takes, as far as known.
    """

    def __init__(self, jobs: Sequence[Job], turn: Callable[[], bool], turn_seconds: float) -> None:
        self.jobs, self.turn, self._begun, self._others_had = jobs, turn, time.monotonic(), 0.0
        self._resumed, self._longest_turn, self._pausing = time.monotonic(), turn_seconds, False
        self._due = self._resumed + _PATIENCE * turn_seconds

    @property
    def owed(self) -> float:
        """Seconds that others still have until they had as many as the prompts."""
        return max(0.0, time.monotonic() - self._begun - 2 * self._others_had)

    @contextmanager
    def between_layers(self, model: CausalLM) -> Iterator[None]:
        """Inside the context, passes of the model pause before each of its layers."""
        hooks = [layer.register_forward_pre_hook(self._pause) for layer in model.get_decoder().layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _pause(self, *_: Any) -> None:
        if self._pausing:  # a pass of those who have their turn
            return
        if all(job.given_up for job in self.jobs):
            raise GivenUpError
        now = time.monotonic()
        if now < self._due:
            return
        self._pausing = True
        try:
            # A context of its own: what is forced on the prompt's pass is not meant for others.
            Context().run(self._others, 2 * now - self._resumed)
        finally:
            self._resumed, self._pausing = time.monotonic(), False
            self._others_had += self._resumed - now
            self._due = self._resumed + self._longest_turn

    def _others(self, until: float) -> None:
        while (begun := time.monotonic()) < until and self.turn():
            self._longest_turn = max(self._longest_turn, time.monotonic() - begun)
