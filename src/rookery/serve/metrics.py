"""What Prometheus is told: requests by route and status, their time, tokens, rows, queues and kept states."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rookery.serve.hosting import Hosted


class Metrics:
    """The counters of one server; each has a registry of its own, so that several can live in one process."""

    def __init__(self, models: Mapping[str, Hosted]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("rookery_requests", "Requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "rookery_request_seconds",
            "Time until the last byte of an answer",
            ["route"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )
        self.registry.register(_Engine(models))


class _Engine(Collector):
    """What the schedulers count themselves."""

    def __init__(self, models: Mapping[str, Hosted]) -> None:
        self.models = models

    def collect(self) -> Iterable[Metric]:
        counts = CounterMetricFamily("rookery_engine", "Tokens and ticks of the scheduler", labels=["model", "what"])
        rows = GaugeMetricFamily("rookery_texts", "Texts being written and waiting", labels=["model", "where"])
        states = GaugeMetricFamily("rookery_kept_states_bytes", "Bytes of kept states", labels=["model"])
        for name, model in self.models.items():
            states.add_metric([name], model.states.nbytes)
            if model.shares:  # its scheduler is told of under the first model's name
                continue
            for what, count in model.scheduler.counts.items():
                counts.add_metric([name, what], count)
            for where, number in zip(("active", "waiting"), model.scheduler.load):
                rows.add_metric([name, where], number)
        return [counts, rows, states]
