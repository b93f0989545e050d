"""What every request passes before it is looked at: host, origin, token, rate and size.

On the loopback address a browser may be led here by any page. It then names another host (DNS rebinding), or another
origin: both are refused. A token is compared in a time that says nothing of it.
"""

import hmac
import math
import time
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..jobs.settings import Settings

COOKIE = "moeplan_token"
OPEN = ("/healthz", "/readyz", "/login", "/static/")
"""Paths that ask for no token; those that end with a slash with all below."""
UPLOADS = ("/v1/clusters", "/v1/traces", "/v1/models", "/v1/placements")
SMALL = 2**20  # bytes of a body that is no upload
FORM = 2**16  # bytes of a form beside the file in it
CLIENTS = 10_000  # whose rates are remembered
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._rates = Rates(settings.requests_a_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refused(scope, headers)
        if refused is not None:
            status, text, extra = refused
            await JSONResponse({"error": text}, status, headers=extra)(scope, receive, send)
            return
        await self.app(scope, _limited(receive, self._limit(scope["path"])), send)

    def _refused(self, scope: Scope, headers: Headers) -> tuple[int, str, dict[str, str]] | None:
        """Status, line and headers of a refusal; None where the request may go on."""
        host, reads = headers.get("host", ""), scope["method"] in ("GET", "HEAD", "OPTIONS")
        if self.settings.loopback and _name_of(host) not in LOOPBACK:
            return 421, "this service is for this machine alone: use http://127.0.0.1", {}
        origin = headers.get("origin")
        if origin is not None and not reads and origin.partition("://")[2] != host:
            return 403, "another page may not send this request", {}
        if self.settings.token is not None and not _is_open(scope["path"]) and not self._known(headers):
            if reads and "text/html" in headers.get("accept", ""):  # a person, whom the page asks for the token
                return 303, "log in first", {"Location": "/login"}
            return 401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
        client = (scope.get("client") or ("", 0))[0]
        if not reads and (wait := self._rates.wait(client)):
            return 429, f"too many requests: again in {wait} s", {"Retry-After": str(wait)}
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return 400, "content-length: expected a number", {}
        if int(length[:20]) > self._limit(scope["path"]):
            return 413, f"larger than {self._limit(scope['path']) >> 20} MiB, refused", {}
        return None

    def _known(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = _cookie(headers)
        token = self.settings.token or ""
        return hmac.compare_digest(given.strip().encode(), token.encode())

    def _limit(self, path: str) -> int:
        small = path.startswith("/v1/") and path not in UPLOADS
        return SMALL if small else self.settings.max_upload + FORM


class Rates:
    """A bucket of requests for each client, filled evenly over a minute."""

    def __init__(self, a_minute: int) -> None:
        self.size = float(a_minute)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> int:
        """Seconds to wait; 0: the request is counted, and may go on."""
        now = time.monotonic()
        left, then = self._left.pop(client, (self.size, now))
        left = min(self.size, left + (now - then) * self.size / 60)
        seconds = 0 if left >= 1 else math.ceil((1 - left) * 60 / self.size)
        self._left[client] = (left if seconds else left - 1, now)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        return seconds


def _limited(receive: Receive, limit: int) -> Receive:
    """What is received, up to a limit: the length that a request states may be wrong, or missing."""
    got = 0

    async def counted() -> Any:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > limit:
            raise HTTPException(413, f"larger than {limit >> 20} MiB, refused")
        return message

    return counted


def _name_of(host: str) -> str:
    """A host without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdecimal() else host).lower()


def _is_open(path: str) -> bool:
    return any(path.startswith(one) if one.endswith("/") else path == one for one in OPEN)


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""
