"""Jobs over HTTP: asked, watched, cancelled, answered."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from ..jobs.requests import Request as Question
from ..jobs.store import Job
from .documents import JSON, service_of, streamed
from .errors import described

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
State = Literal["queued", "running", "done", "failed", "cancelled"]
JobKind = Literal["place", "solve", "explain", "export"]
JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
LOOK, SIGN_OF_LIFE = 0.5, 15.0  # seconds between looks at a job, and between comments that keep a connection open


class JobBody(BaseModel):
    """A job as it is now."""

    id: str
    number: int = Field(description="counts up in the order in which jobs were accepted")
    kind: str
    state: State
    stopping: bool = Field(description="it was asked to end with the best found so far")
    request: dict[str, Any]
    progress: dict[str, Any] = Field(
        description="done, of, what; incumbent, bound, gap where known; points: [seconds, incumbent, bound]"
    )
    starts: int
    result: str | None = Field(description="SHA-256 of the answer; of a cancelled job, the best found until then")
    error: str | None
    created: float = Field(description="seconds since 1970, as the two below")
    started: float | None
    ended: float | None


class Jobs(BaseModel):
    """The latest first."""

    jobs: list[JobBody]


def body_of(job: Job) -> JobBody:
    return JobBody(**{name: getattr(job, name) for name in JobBody.model_fields})


@router.post("", status_code=201, responses=described(404) | {200: {"model": JobBody, "description": "asked before"}})
def ask(request: Request, response: Response, question: Annotated[Question, Body()]) -> JobBody:
    """Ask for a placement, a plan, an explanation or an export.

    The same question has one answer: 201 is a new job, 200 the one that has been asked before.
    """
    job, new = service_of(request).ask(question)
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return body_of(job)


@router.get("", responses=described())
def list_jobs(
    request: Request,
    state: State | None = None,
    kind: JobKind | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, lt=2**63, description="only jobs with a smaller number")] = None,
) -> Jobs:
    """Jobs, the latest first."""
    found = service_of(request).store.list_jobs([state] if state else (), kind, limit, before)
    return Jobs(jobs=[body_of(job) for job in found])


@router.get("/{job}", responses=described(404))
def get_job(request: Request, job: JobId) -> JobBody:
    """A job as it is now."""
    return body_of(service_of(request).store.job(job))


@router.delete("/{job}", responses=described(404, 409))
def cancel(request: Request, job: JobId) -> JobBody:
    """Cancel a job: a running one ends with the best found so far, which is its result then."""
    return body_of(service_of(request).store.cancel(job))


@router.get(
    "/{job}/result",
    responses=described(404, 409) | {200: {"content": {JSON: {"schema": {}}}}},
    response_class=Response,
)
def get_result(request: Request, job: JobId) -> StreamingResponse:
    """The answer: a Placement, a Plan, or the JSON of an explanation or of an engine's files."""
    service = service_of(request)
    return streamed(service, service.answered(job))


@router.get(
    "/{job}/events",
    responses=described(404) | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    response_class=Response,
)
def watch(request: Request, job: JobId) -> StreamingResponse:
    """Server-sent events: `progress` with the job as it is, whenever that changes, and `end` once it is over."""
    service_of(request).store.job(job)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(request, job), media_type="text/event-stream", headers=headers)


async def _events(request: Request, job: str) -> AsyncIterator[str]:
    from ...spec.errors import MoeplanError

    store, version, silent = service_of(request).store, -1, 0.0
    while not request.app.state.ending.is_set():
        try:
            found = await run_in_threadpool(store.job, job)
        except MoeplanError:  # the database does not answer: the client asks again
            return
        if found.version != version or found.over:
            version, silent = found.version, 0.0
            name = "end" if found.over else "progress"
            yield f"event: {name}\nid: {version}\ndata: {json.dumps(body_of(found).model_dump())}\n\n"
            if found.over:
                return
        elif silent >= SIGN_OF_LIFE:
            silent = 0.0
            yield ": still here\n\n"
        silent += LOOK
        await asyncio.sleep(LOOK)
