"""Sizes, rates and durations as people write them."""

import re

from .document import show
from .errors import MoeplanError

_NUMBER = r"(\d{1,12}(?:\.\d{1,9})?)"
_RATE = re.compile(_NUMBER + r"\s*([kMGT]?)(i?)(B|b|bit)/s")
_SECONDS = re.compile(_NUMBER + r"\s*(us|ms|s|m|min|h|d)")
_POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}
_SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_bytes(text: str, name: str = "size") -> int:
    """``8GiB``, ``512M``, ``1.5g`` or plain bytes; powers of 1,024; ``name`` says in errors what it is."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match or float(match[1]) == 0:
        raise MoeplanError(f"{name} {text!r}: expected a positive number with K, M, G or T, such as 8GiB")
    return int(float(match[1]) * _SIZES[match[2]])


def parse_rate(text: str, name: str) -> float:
    """Bytes per second from ``50GB/s``, ``400Gb/s`` (bits) or ``46GiB/s``; ``name`` says in errors what it is."""
    match = _RATE.fullmatch(text.strip())
    value = 0.0
    if match:
        value = float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]] / (1 if match[4] == "B" else 8)
    if not 1.0 <= value <= 1e18:
        raise MoeplanError(f"{name} {show(text)}: expected bytes or bits per second, such as 50GB/s or 400Gb/s")
    return value


def parse_seconds(text: str, name: str) -> float:
    """Seconds, at most a year, from ``500ms``, ``2s``, ``5m`` or ``1d``; ``name`` says in errors what it is."""
    match = _SECONDS.fullmatch(text.strip())
    value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0.0 < value <= 366 * _UNITS["d"]:
        raise MoeplanError(
            f"{name} {show(text)}: expected a duration above 0 and up to a year, such as 500ms, 2s, 5m or 1h"
        )
    return value
