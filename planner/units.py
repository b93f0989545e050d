"""Quantities as people read them."""

import numpy as np

SHOWN = 4  # devices that lack memory


def seconds_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 1000 * size else f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def bytes_text(count: int) -> str:
    sign, size = ("-" if count < 0 else ""), abs(count)
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{sign}{size / (1 << power):.2f} {unit}"
    return f"{sign}{size} B"


def lacking(missing: np.ndarray) -> str:
    """Which devices lack how much."""
    short = np.flatnonzero(missing > 0)
    worst = sorted(short, key=lambda device: -missing[device])[:SHOWN] if len(short) > SHOWN else short
    parts = [f"device {d} lacks {bytes_text(int(missing[d]))}" for d in worst]
    more = f" and {len(short) - SHOWN} more devices lack memory" if len(short) > SHOWN else ""
    return f"does not fit: {', '.join(parts)}{more}"
