"""Documents over HTTP: sent as the body of a request, named by the SHA-256 of what is kept."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from ..jobs.files import PIECE
from ..jobs.requests import Digest
from ..jobs.service import Service
from ..jobs.store import StoredDocument
from .errors import described

router = APIRouter(prefix="/v1", tags=["documents"])
BINARY = {"type": "string", "format": "binary"}
Kind = Literal["cluster", "trace", "model", "placement", "plan", "explanation", "export"]
Name = Annotated[str, Query(max_length=200, description="what messages and lists call it")]
JSON, NPZ = "application/json", "application/octet-stream"


class DocumentBody(BaseModel):
    """A document that is kept."""

    digest: str = Field(description="SHA-256 of its bytes: what jobs name it by")
    kind: str
    name: str
    bytes: int
    created: float = Field(description="seconds since 1970")


class Documents(BaseModel):
    """The latest first."""

    documents: list[DocumentBody]


def body_of(known: StoredDocument) -> DocumentBody:
    return DocumentBody(**{name: getattr(known, name) for name in DocumentBody.model_fields})


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _upload(media: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}
    return {"status_code": 201, "responses": described(409), "openapi_extra": content}


async def received(request: Request, kind: str, name: str, executed: bool = False) -> DocumentBody:
    """The body of a request, piece by piece onto the disk, then read and kept."""
    service = service_of(request)
    with await run_in_threadpool(service.incoming, kind) as incoming:
        async for piece in request.stream():
            await run_in_threadpool(incoming.write, piece)
        async with request.app.state.reading:  # large documents take memory to read
            return body_of(await run_in_threadpool(service.take_in, kind, incoming, name, executed))


@router.post("/clusters", **_upload(JSON, {"type": "object"}))
async def send_cluster(request: Request, name: Name = "cluster.json") -> DocumentBody:
    """Send what `moeplan profile` wrote."""
    return await received(request, "cluster", name)


@router.post("/traces", **_upload(NPZ, BINARY))
async def send_trace(request: Request, name: Name = "trace.npz") -> DocumentBody:
    """Send recorded routing (.npz), as `moeplan trace` writes it."""
    return await received(request, "trace", name)


@router.post("/models", **_upload(JSON, {"type": "object"}))
async def send_model(request: Request, name: Name = "model.json", executed: bool = False) -> DocumentBody:
    """Send a Model document or a Hugging Face config.json; it is kept as the Model that was read from it.

    executed: as it is measured and run, which `solve` and predicted times need.
    """
    return await received(request, "model", name, executed)


@router.post("/placements", **_upload(JSON, {"type": "object"}))
async def send_placement(request: Request, name: Name = "place.json") -> DocumentBody:
    """Send what `moeplan place` wrote."""
    return await received(request, "placement", name)


@router.get("/documents", responses=described())
def list_documents(
    request: Request, kind: Kind | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> Documents:
    """Documents and results that are kept, the latest first."""
    found = service_of(request).store.list_documents(kind, limit)
    return Documents(documents=[body_of(known) for known in found])


@router.get(
    "/documents/{digest}",
    responses=described(404) | {200: {"content": {JSON: {"schema": {}}, NPZ: {"schema": BINARY}}}},
    response_class=Response,
)
def get_document(request: Request, digest: Digest) -> StreamingResponse:
    """The content of a document."""
    return streamed(service_of(request), digest)


@router.head("/documents/{digest}", responses=described(404), response_class=Response)
def has_document(request: Request, digest: Digest) -> Response:
    """Whether a document is kept."""
    known = service_of(request).store.document(digest)
    return Response(headers={"ETag": f'"{known.digest}"'})


def streamed(service: Service, digest: str) -> StreamingResponse:
    """A document's bytes. Raises UnknownError before anything is sent."""
    known, pieces = service.store.document(digest), _pieces(service, digest)
    first = next(pieces, b"")  # opens it
    suffix, media = (".npz", NPZ) if known.kind == "trace" else (".json", JSON)
    name = known.name if known.name.endswith(suffix) else known.name.replace(" ", "-") + suffix
    headers = {
        "Content-Length": str(known.bytes),
        "ETag": f'"{digest}"',
        "Content-Disposition": f'attachment; filename="{name}"',
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(_chained(first, pieces), media_type=media, headers=headers)


def _pieces(service: Service, digest: str) -> Iterator[bytes]:
    with service.opened(digest) as file:
        while piece := file.read(PIECE):
            yield piece


def _chained(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
