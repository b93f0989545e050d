"""Errors as answers: a status and one line, whatever went wrong."""

import errno
import logging
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ...spec.document import show
from ...spec.errors import MoeplanError
from ..cli import MAX_MESSAGE
from ..jobs.requests import Request as Question

log = logging.getLogger("moeplan.http")
KINDS = ", ".join(kind.model_fields["kind"].default for kind in get_args(get_args(Question)[0]))
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WAIT = {429: "5", 503: "5"}  # seconds until a client should try again


class ErrorBody(BaseModel):
    """What every answer with a status from 400 says."""

    error: str = Field(description="one line: what was wrong and what to do")


MEANINGS = {
    400: "malformed",
    401: "no token, or a wrong one",
    403: "asked by another page",
    404: "unknown",
    409: "does not go with the state of the job",
    413: "too large",
    421: "asked for by the name of another host",
    422: "what was sent cannot be used; the line says why",
    429: "too much at once; Retry-After says when to ask again",
    503: "disk full or database not there; nothing that was accepted is lost",
}


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error statuses of a path, as OpenAPI shows them."""
    return {
        status: {"model": ErrorBody, "description": MEANINGS[status]}
        for status in sorted({*statuses, 400, 401, 403, 413, 421, 422, 429, 503})
    }


def answer(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:MAX_MESSAGE]
    wait = {"Retry-After": WAIT[status]} if status in WAIT else {}
    return JSONResponse({"error": line}, status, headers={**wait, **(headers or {})})


def install(app: FastAPI) -> None:
    """Have an app answer errors so."""

    @app.exception_handler(MoeplanError)
    async def mendable(request: Request, error: Exception) -> JSONResponse:
        return answer(getattr(error, "status", 422), str(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return answer(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(422, _line(error))

    @app.exception_handler(OSError)
    async def machine(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, OSError)
        if error.errno in FULL:
            return answer(503, "the store's disk is full; nothing that was accepted is lost")
        log.error("%s", error, exc_info=error)
        return answer(503, f"the service's machine: {error.strerror or type(error).__name__}")


def _line(error: RequestValidationError) -> str:
    """The first broken rule: field, rule, value."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"body: not JSON ({first.get('ctx', {}).get('error', 'cannot be read')})"
    if first["type"] == "union_tag_not_found":
        return f"kind: missing; expected one of {KINDS}"
    where = ".".join(str(step) for step in first["loc"] if step not in ("body", "query", "path")) or "body"
    got = "" if first.get("input") is None or isinstance(first["input"], dict) else f" (got {show(first['input'])})"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where[:200]}: {str(first['msg']).removeprefix('Value error, ')}{got}{more}"
