"""What /metrics tells, in Prometheus' text form."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from coreinfer_edge.serve.answers import Answer
from coreinfer_edge.serve.turns import Turns

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """The counts of one server."""

    def __init__(self, turns: Turns[Answer]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"coreinfer_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"coreinfer_{name}", text, registry=registry, buckets=buckets)

        self._requests = counter(
            "requests_total", "Requests by path and status; 499: gone.", "path", "status"
        )
        self._prompt_tokens = counter("prompt_tokens_total", "Tokens of prompts.")
        self._completion_tokens = counter("completion_tokens_total", "Tokens generated.")
        self._core_tokens = counter("core_tokens_total", "Tokens decoded with a core set.")
        self._drafted = counter("drafted_tokens_total", "Tokens drafted for exact answers.")
        self._accepted = counter("accepted_tokens_total", "Of those, tokens that were right.")
        self._prefill_seconds = counter("prefill_seconds_total", "Time of evaluating prompts.")
        self._choose_seconds = counter("choose_seconds_total", "Time of choosing core sets.")
        self._decode_seconds = counter("decode_seconds_total", "Time of decoding.")
        self._density = histogram("density", "Densities at the end of answers.", _DENSITIES)
        self._queue_seconds = histogram("queue_seconds", "Time that requests waited.")
        self._first_token_seconds = histogram(
            "first_token_seconds", "From the turn of a request to its first token."
        )
        waiting = Gauge("coreinfer_queue_length", "Requests that wait.", registry=registry)
        waiting.set_function(lambda: turns.waiting)
        running = Gauge(
            "coreinfer_generating", "1 while an answer is generated.", registry=registry
        )
        running.set_function(lambda: float(turns.running is not None))

    def count(self, path: str, status: int) -> None:
        """Count a request; ``path`` is one of the routes, so that there are few."""
        self._requests.labels(path, str(status)).inc()

    def add(self, answer: Answer) -> None:
        """Count an answer that is over."""
        self._queue_seconds.observe(answer.queue_seconds)
        if answer.first_seconds is not None:
            self._first_token_seconds.observe(answer.first_seconds)
        if (figures := answer.figures) is None:
            return  # it was refused
        self._prompt_tokens.inc(figures.prompt_tokens)
        self._completion_tokens.inc(figures.completion_tokens)
        self._core_tokens.inc(figures.core_tokens)
        self._drafted.inc(figures.drafted)
        self._accepted.inc(figures.accepted)
        self._prefill_seconds.inc(figures.prefill_seconds)
        self._choose_seconds.inc(figures.choose_seconds)
        self._decode_seconds.inc(figures.decode_seconds)
        self._density.observe(figures.density)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
