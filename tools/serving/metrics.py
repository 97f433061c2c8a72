"""What the gateway counts, in Prometheus' terms. Labels are bounded: routes and codes, never what a client wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one gateway."""

    def __init__(self, in_flight: Callable[[], float], engine_ready: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "steadfast_requests", "Requests, by route and status", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "steadfast_request_seconds", "Time until the last byte", ["route"], buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._first = Histogram(
            "steadfast_first_byte_seconds", "Time until the engine's first byte of an answer", ["route"],
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._tokens = Counter(
            "steadfast_tokens", "Tokens of complete answers, by kind", ["kind"], registry=self._registry
        )
        self.restarts = Counter("steadfast_engine_restarts", "Restarts of the engine", registry=self._registry)
        Gauge("steadfast_in_flight", "Requests here now", registry=self._registry).set_function(in_flight)
        Gauge("steadfast_engine_ready", "1 while the engine takes requests", registry=self._registry).set_function(
            engine_ready
        )

    def count(self, route: str, status: int, seconds: float, first: float | None, usage: Mapping[str, Any]) -> None:
        """A request has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if first is not None:
            self._first.labels(route).observe(first)
        for kind in ("prompt", "completion"):
            value = usage.get(f"{kind}_tokens", 0)
            if isinstance(value, int) and value > 0:
                self._tokens.labels(kind).inc(value)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return bytes(generate_latest(self._registry))
