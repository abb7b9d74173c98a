"""What Prometheus is told. Knows prometheus-client and the statistics of the worker; not requests or HTTP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from longreach.serving.worker import Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# of the scheduler's statistics
GAUGES = {"running": "Jobs that have a place.", "waiting": "Jobs that wait for one.", "held": "Bytes of keys and values.",
          "budget": "Bytes that keys and values may take.", "prefixes": "Prefixes that are held, documents not among them."}  # fmt: skip
COUNTERS = {"read": "Tokens of prompts that were read.", "decoded": "Tokens that were drawn.", "cached": "Tokens of prompts that needed no reading.",
            "hits": "Jobs that began with what was there.", "preempted": "Jobs that lost their place to others.",
            "failed": "Forwards that failed."}  # fmt: skip


class Metrics:
    """The numbers of one server, in a registry of its own."""

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        own: Any = {"registry": self._registry}
        self.answered = Counter("longreach_http_requests", "Requests that were answered.", ["path", "status"], **own)
        self.prompt = Counter("longreach_prompt_tokens", "Tokens of prompts.", **own)
        self.cached = Counter("longreach_cached_tokens", "Those that had been read before.", **own)
        self.new = Counter("longreach_new_tokens", "Tokens of answers.", **own)
        self.cancelled = Counter("longreach_cancelled", "Requests whose client left before the answer was whole.", **own)
        self.first = Histogram("longreach_first_token_seconds", "From a request to the first token of its answer.", buckets=SECONDS, **own)
        self.between = Histogram("longreach_between_tokens_seconds", "From one token of an answer to the next.", buckets=SECONDS, **own)
        self._registry.register(_Statistics(worker))

    def text(self) -> bytes:
        return bytes(generate_latest(self._registry))


class _Statistics:
    """The worker's numbers, as they are when they are asked for."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterable[Metric]:
        stats = self._worker.stats
        yield GaugeMetricFamily("longreach_on_their_way", "Answers that are on their way.", self._worker.on_their_way)
        for name, what in GAUGES.items():
            if (value := getattr(stats, name)) is not None:
                yield GaugeMetricFamily(f"longreach_scheduler_{name}", what, value)
        for name, what in COUNTERS.items():
            yield CounterMetricFamily(f"longreach_scheduler_{name}", what, getattr(stats, name))
