"""What an operator watches, for Prometheus."""

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
