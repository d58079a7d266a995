"""What an operator watches, for Prometheus."""

from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "elastic_requests", "HTTP answers of the chat endpoint by status", ["status"], registry=self.registry
        )
        self.tokens = Counter("elastic_tokens", "tokens read and written", ["kind"], registry=self.registry)
        self.running = Gauge("elastic_running_requests", "requests being answered", registry=self.registry)
        self.waiting = Gauge("elastic_waiting_requests", "requests in the queue", registry=self.registry)
        self.queued = Histogram("elastic_queue_seconds", "time in the queue", buckets=_SECONDS, registry=self.registry)
        self.first = Histogram(
            "elastic_first_text_seconds", "arrival to first text", buckets=_SECONDS, registry=self.registry
        )
        self.batch = Histogram(
            "elastic_batch_size",
            "requests that share a decode step",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.msr = Histogram(
            "elastic_msr", "share of sparse heads", buckets=[n / 10 for n in range(11)], registry=self.registry
        )

    def started(self, waited: float) -> None:
        """A request is being answered; seconds that it waited."""
        self.running.inc()
        self.queued.observe(waited)

    def stepped(self, rows: int) -> None:
        """So many requests decode together for a token."""
        self.batch.observe(rows)

    def finished(self, prompt_tokens: int, new_tokens: int, msr: float) -> None:
        """A running request was answered."""
        self.running.dec()
        self.tokens.labels("prompt").inc(prompt_tokens)
        self.tokens.labels("new").inc(new_tokens)
        self.msr.observe(msr)

    def failed(self, requests: int) -> None:
        """So many running requests broke down."""
        self.running.dec(requests)

    def page(self, waiting: int) -> bytes:
        """Text for the scraper."""
        self.waiting.set(waiting)
        return generate_latest(self.registry)


class Figures:
    """What an engine tells `Metrics`, on its way to another process."""

    def __init__(self) -> None:
        self._told = deque[tuple[str, tuple[float, ...]]]()

    def started(self, waited: float) -> None:
        """As `Metrics.started`."""
        self._told.append(("started", (waited,)))

    def stepped(self, rows: int) -> None:
        """As `Metrics.stepped`."""
        self._told.append(("stepped", (rows,)))

    def finished(self, prompt_tokens: int, new_tokens: int, msr: float) -> None:
        """As `Metrics.finished`."""
        self._told.append(("finished", (prompt_tokens, new_tokens, msr)))

    def failed(self, requests: int) -> None:
        """As `Metrics.failed`."""
        self._told.append(("failed", (requests,)))

    def take(self) -> list[tuple[str, tuple[float, ...]]]:
        """Methods and arguments that were not taken yet; other threads may tell more meanwhile."""
        return [self._told.popleft() for _ in range(len(self._told))]
