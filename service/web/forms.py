"""Forms of the page as questions to the service: files are taken in as documents, fields are checked."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from ...spec.document import describe
from ...spec.errors import DocumentError, MoeplanError
from ...spec.trace import Trace
from ..jobs.files import PIECE
from ..jobs.requests import Asked, PlaceRequest, SolveRequest, is_digest
from ..jobs.service import Service

if TYPE_CHECKING:
    from starlette.requests import Request

Q = TypeVar("Q", bound=Asked)
MOST_FILES, MOST_FIELDS = 4, 40
PLACE = {
    "devices": "8",
    "hosts": "1",
    "model": "",
    "slots": "",
    "fitted": "50",
    "time_limit": "20",
    "objective": "latency",
}
SOLVE = {"model": "", "workload": "decode:16@512", "time_limit": "60"}
"""What the forms ask for at first."""


def asked_in(form: Mapping[str, Any], usual: Mapping[str, str]) -> dict[str, str]:
    """What was typed, to show it again."""
    return {name: str(form.get(name, value))[:200] for name, value in usual.items()}


async def place_question(request: "Request", service: Service, form: FormData) -> PlaceRequest:
    """Raises MoeplanError for files that cannot be read, and for fields that make no sense."""
    trace = await _document(request, service, form, "trace")
    if trace is None:
        raise MoeplanError("trace: choose the .npz file of a recording, or one that is here already")
    cluster = await _document(request, service, form, "cluster")
    fitted = _whole(form, "fitted", 100) or 100
    counts_only = await run_in_threadpool(_counts_only, service, trace)
    fields = {
        "trace": trace,
        "cluster": cluster,
        "devices": None if cluster else _whole(form, "devices", 2**16),
        "hosts": None if cluster else _whole(form, "hosts", 2**16),
        "model": _text(form, "model") or None,
        "slots": _whole(form, "slots", 2**16),
        # Counts are of no tokens that could be divided.
        "fit": (0.0, 1.0 if counts_only else fitted / 100),
        "time_limit": float(_whole(form, "time_limit", 3600) or PLACE["time_limit"]),
        "objective": _text(form, "objective") or PLACE["objective"],
    }
    return _checked(PlaceRequest, fields)


async def solve_question(request: "Request", service: Service, form: FormData) -> SolveRequest:
    """The same of a plan."""
    cluster = await _document(request, service, form, "cluster")
    if cluster is None:
        raise MoeplanError("cluster: choose the cluster.json of `moeplan profile`, or one that is here already")
    fields = {
        "cluster": cluster,
        "trace": await _document(request, service, form, "trace"),
        "model": _text(form, "model"),
        "workload": _text(form, "workload") or SOLVE["workload"],
        "time_limit": float(_whole(form, "time_limit", 3600) or SOLVE["time_limit"]),
    }
    return _checked(SolveRequest, fields)


def _checked(kind: type[Q], fields: dict[str, Any]) -> Q:
    try:
        return kind(**fields)
    except ValidationError as error:
        raise MoeplanError(describe(error)) from None


async def _document(request: "Request", service: Service, form: FormData, kind: str) -> str | None:
    """Digest of the file that was sent, or of the one chosen among those that are here; None where there is neither."""
    sent = form.get(kind)
    if isinstance(sent, UploadFile) and sent.filename:
        with await run_in_threadpool(service.incoming, kind) as incoming:
            while piece := await sent.read(PIECE):
                await run_in_threadpool(incoming.write, piece)
            async with request.app.state.reading:
                return (await run_in_threadpool(service.take_in, kind, incoming, sent.filename)).digest
    known = _text(form, f"{kind}_known")
    if known and not is_digest(known):
        raise DocumentError(f"{kind}: expected one of the list")
    return known or None


def _counts_only(service: Service, trace: str) -> bool:
    with service.opened(trace) as file:
        return Trace.read(file.name).counts_only


def _text(form: FormData, name: str) -> str:
    value = form.get(name, "")
    return value.strip()[:200] if isinstance(value, str) else ""


def _whole(form: FormData, name: str, most: int) -> int | None:
    """A whole number from 1; None where nothing was typed."""
    text = _text(form, name)
    if not text:
        return None
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= most or len(text) > 9:
        raise MoeplanError(f"{name.replace('_', ' ')}: expected a whole number from 1 to {most:,}")
    return int(text)
