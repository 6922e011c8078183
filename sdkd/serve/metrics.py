"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one server; each has a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        model = ["model"]
        self.requests = Counter(
            "sdkd_requests", "Requests by how they ended", ["api", "model", "outcome"], registry=registry
        )
        self.refused = Counter("sdkd_refused", "Requests that were not taken", ["status"], registry=registry)
        self.images = Counter("sdkd_images", "Images drawn", model, registry=registry)
        self.calls = Counter("sdkd_pipeline_calls", "Pipeline calls: each draws a batch", model, registry=registry)
        self.seconds = Histogram(
            "sdkd_request_seconds", "From a request to its last image", model, buckets=SECONDS, registry=registry
        )
        self.waiting = Gauge("sdkd_waiting_images", "Images that wait to be drawn", registry=registry)
        self.loaded = Gauge("sdkd_loaded", "Whether a model is loaded", model, registry=registry)
        self.bytes = Gauge("sdkd_worker_bytes", "Memory of the process of a model", model, registry=registry)
        self.loads = Counter("sdkd_loads", "Times that a model was loaded", model, registry=registry)
        self.deaths = Counter("sdkd_worker_deaths", "Processes that died", model, registry=registry)

    def drawn(self, model: str, images: int, calls: float, seconds: Sequence[float]) -> None:
        """Images that were drawn in some calls, and how long each of the requests took that are done by them."""
        self.images.labels(model).inc(images)
        self.calls.labels(model).inc(calls)
        for value in seconds:
            self.seconds.labels(model).observe(value)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
