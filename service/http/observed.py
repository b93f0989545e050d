"""What the service says of itself: a line of JSON for each request and job, and counters for Prometheus."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..jobs.errors import UnavailableError
from ..jobs.store import Store

log = logging.getLogger("moeplan.http")
_USUAL = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class Metrics:
    """Of one app."""

    def __init__(self, store: Store) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("moeplan_requests", "Requests.", ("method", "path", "status"), registry=self.registry)
        self.seconds = Histogram(
            "moeplan_request_seconds", "Until an answer began.", ("method", "path"), registry=self.registry
        )
        self.jobs = Counter("moeplan_job_runs", "Runs of jobs that ended.", ("kind", "state"), registry=self.registry)
        self.run_seconds = Histogram(
            "moeplan_job_run_seconds",
            "Of a run.",
            ("kind",),
            buckets=(0.5, 1, 2, 5, 10, 20, 60, 180, 600, 1800, 3600),
            registry=self.registry,
        )
        self.registry.register(_Stored(store))

    def ran(self, kind: str, state: str, seconds: float) -> None:
        self.jobs.labels(kind, state).inc()
        self.run_seconds.labels(kind).observe(seconds)


class _Stored(Collector):
    """Asked of the store when someone looks: several services may share it."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        try:
            counts, up = self.store.counts(), 1
        except UnavailableError:
            counts, up = {}, 0
        jobs = GaugeMetricFamily("moeplan_jobs", "Jobs in the store.", labels=["state"])
        for state, count in counts.items():
            jobs.add_metric([state], count)
        yield jobs
        yield GaugeMetricFamily("moeplan_store_up", "Whether the store's database answers.", value=up)


class Observed:
    """ASGI middleware, around everything."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._count(scope, status, time.monotonic() - began)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            client = (scope.get("client") or ("",))[0]
            told = {"method": scope["method"], "path": scope["path"], "status": status, "client": client}
            level = logging.DEBUG if scope["path"] in ("/healthz", "/readyz", "/metrics") else logging.INFO
            log.log(level, "request", extra=told | {"seconds": round(time.monotonic() - began, 4)})

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "unknown")  # of the route: names of jobs would be without number
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "DELETE") else "other"
        self.metrics.requests.labels(method, path, str(status)).inc()
        self.metrics.seconds.labels(method, path).observe(seconds)


class Lines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "from": record.name,
            "what": record.getMessage(),
        }
        body |= {name: value for name, value in vars(record).items() if name not in _USUAL}
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


def log_lines(level: int = logging.INFO) -> None:
    """Have moeplan's loggers, and uvicorn's errors, write lines of JSON on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name, least in (("moeplan", level), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
