"""What keeps other sites out of the page: where a form came from, what it may load, how files are called."""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",  # Plotly writes its own; styles run nothing
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a form was sent by this page: browsers say with every POST from where it comes."""
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is not None:
        return bool(host) and urlsplit(origin).netloc == host
    return headers.get("sec-fetch-site") == "same-origin"


def safe_name(name: str, other: str) -> str:
    """A file name of letters, digits, dots and dashes, without folders; ``other`` where nothing is left."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    safe = _UNSAFE.sub("-", last).strip(".-")[:80]
    return safe or other
