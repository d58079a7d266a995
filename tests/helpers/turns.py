"""Two threads that run in turns, for the tests of interleaved requests."""

from threading import Condition


class Turns:
    """Hands the right to run from one thread to the other."""

    def __init__(self):
        self.condition, self.turn, self.done = Condition(), 0, set()

    def wait(self, me):
        with self.condition:
            self.condition.wait_for(lambda: self.turn == me or 1 - me in self.done, timeout=30)

    def give(self, other):
        with self.condition:
            self.turn = other
            self.condition.notify_all()

    def finish(self, me):
        with self.condition:
            self.done.add(me)
            self.condition.notify_all()
