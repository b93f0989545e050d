"""``create_app(settings)``: the service as an ASGI application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from threading import Event

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from ... import __version__
from ..jobs.pool import Pool
from ..jobs.service import Service
from ..jobs.settings import Settings
from ..web import routes
from . import documents, errors, jobs
from .guard import Guard
from .observed import Metrics, Observed

READERS = 2  # documents that are read at a time
ABOUT = """Expert placements and plans for mixture-of-experts models, as jobs that survive restarts.

Send documents first (`POST /v1/traces` and others), then ask (`POST /v1/jobs`), watch (`GET /v1/jobs/{job}/events`) and
take the answer (`GET /v1/jobs/{job}/result`). Every error is `{"error": "one line"}`.
"""


def create_app(settings: Settings, *, pool: Pool | None = None) -> FastAPI:
    """The application; its workers run from its startup to its shutdown. Raises MoeplanError for settings that make no
    sense, and stores that cannot be used.

    pool: where jobs run, by default in processes of this machine.
    """
    service = Service.open(settings, pool)
    metrics = Metrics(service.store)
    service.supervisor.on_end = metrics.ran

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.reading = asyncio.Semaphore(READERS)
        await run_in_threadpool(service.supervisor.start)
        try:
            yield
        finally:
            app.state.ending.set()
            await run_in_threadpool(service.close)

    app = FastAPI(
        title="moeplan",
        version=__version__,
        description=ABOUT,
        lifespan=lifespan,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # these pages load from elsewhere
        redoc_url=None,
    )
    app.state.service, app.state.ending = service, Event()
    errors.install(app)
    app.include_router(documents.router)
    app.include_router(jobs.router)
    app.include_router(routes.router)
    _add_health(app, metrics)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Observed, metrics=metrics)
    return app


def _add_health(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], responses=errors.described())
    def readyz(request: Request) -> dict[str, str]:
        """Jobs can be accepted: the database answers, the disk has room, the workers run."""
        documents.service_of(request).ready()
        return {"status": "ready"}

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse, responses=errors.described())
    def show_metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
