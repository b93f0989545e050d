"""What travels from where to where: tokens between layers under a placement, bytes of a step under a plan."""

# T tokens, L layers, E experts, Z zones (devices, or hosts)

from collections.abc import Sequence

import numpy as np

from ....planner.place.crossings import device_of
from ....planner.units import bytes_text
from ....spec.placement import Placement
from ....spec.plan import Plan
from ....spec.trace import Trace
from .figure import SEQUENTIAL, Figure, View, axis, plain, readable, rows_height

MOST_ZONES = 128  # of a matrix; of more devices only hosts are shown
LISTED = 20  # pairs in the table
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def crossings_figure(placement: Placement, trace: Trace) -> Figure | None:
    """Moves from a token's first expert in a layer to the one in the next; None where they are not known.

    trace: recorded tokens. They are not known of copies, of which a token may meet any, and of one layer.
    """
    if not trace.tells_movement or not placement.single_copy or len(placement.layers) < 2:
        return None
    device = device_of(placement)
    hosts = sorted({d.host for d in placement.devices})
    names = {
        "devices": [f"device {g}" for g in range(len(placement.devices))],
        "hosts": [readable(host) for host in hosts],
    }
    zones = {"devices": device, "hosts": placement.hosts[device]}
    views, said = [], []
    for what in ("hosts", "devices"):
        count = len(names[what])
        if 1 < count <= MOST_ZONES:
            moves = 100 * _moves(zones[what], trace, count)
            said.append(f"{100 - np.trace(moves):.1f} % go to another of {count} {what}")
            views.append(View(what, [_matrix(moves, names[what], "% of all moves")], _rows(moves, names[what])))
    if not views:
        return None
    return Figure(
        "crossings",
        "Tokens that move between layers",
        f"From a token's first expert in a layer to the one in the next: {', '.join(said)}.",
        ("from", "to", "% of all moves"),
        views,
        _layout("%", [value for view in views for row in view.data[0]["z"] for value in row]),
        chooses="between",
        height=rows_height(max(len(names[view.label]) for view in views), least=320),
    )


def _moves(zone_of: np.ndarray, trace: Trace, zones: int) -> np.ndarray:
    """[Z, Z] shares of all moves; zone_of: [L, E]."""
    zone = np.take_along_axis(zone_of, trace.expert_ids[:, :, 0].T.astype(np.int64), axis=1)
    pairs = np.bincount((zone[:-1] * zones + zone[1:]).ravel(), minlength=zones * zones)
    return pairs.reshape(zones, zones) / pairs.sum()


def traffic_figure(plan: Plan) -> Figure | None:
    """Predicted bytes of a step between devices (of many, between their hosts); None where nothing travels."""
    pairs = plan.predicted.traffic
    count = 1 + max((max(pair.source, pair.target) for pair in pairs), default=0)
    if not pairs or count > MOST_ZONES:
        return None
    sent = np.zeros((count, count))
    for pair in pairs:
        sent[pair.source, pair.target] += pair.bytes
    of_devices = count <= len(plan.devices) <= 256
    names = [f"{'device' if of_devices else 'host'} {i}" for i in range(count)]
    rows = [(names[a], names[b], bytes_text(int(sent[a, b]))) for a, b in _largest(sent)]
    unit, size = next((one for one in UNITS if sent.max() >= one[1]), UNITS[-1])
    matrix = _matrix(sent / size, names, unit)
    return Figure(
        "traffic",
        "Bytes of a step between devices",
        f"Predicted bytes that travel in one step: {bytes_text(int(sent.sum()))} in all, at most "
        f"{bytes_text(int(sent.max()))} from one to another.",
        ("from", "to", "bytes"),
        [View("step", [matrix], rows)],
        _layout(unit, [value for row in matrix["z"] for value in row]),
        height=rows_height(count, least=320),
    )


def _matrix(values: np.ndarray, names: Sequence[str], unit: str) -> dict:
    """The diagonal, what stays, is left out of the colours: it is most of everything."""
    shown = [[None if a == b else round(float(v), 4) for b, v in enumerate(row)] for a, row in enumerate(values)]
    labels = [plain(name)[:24] for name in names]
    return {
        "type": "heatmap",
        "z": shown,
        "x": labels,
        "y": labels,
        "coloraxis": "coloraxis",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": f"%{{y}} to %{{x}}<br>%{{z:.3f}} {unit}<extra></extra>",
    }


def _rows(moves: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, float]]:
    stay = [("any", "the same", round(float(np.trace(moves)), 2))]
    return stay + [(names[a], names[b], round(float(moves[a, b]), 3)) for a, b in _largest(moves)]


def _largest(values: np.ndarray) -> list[tuple[int, int]]:
    """The pairs with the most, of different zones."""
    apart = values * (1 - np.eye(len(values)))
    order = np.argsort(-apart, axis=None, kind="stable")[:LISTED]
    return [(int(i) // len(values), int(i) % len(values)) for i in order if apart.flat[i] > 0]


def _layout(unit: str, values: Sequence[float | None]) -> dict:
    most = max((value for value in values if value is not None), default=0.0) or 1.0
    return {
        "xaxis": axis("to", type="category"),
        "yaxis": axis("from", type="category", autorange="reversed"),
        "coloraxis": {
            "colorscale": SEQUENTIAL,
            "cmin": 0,
            "cmax": most,
            "colorbar": {"title": {"text": unit}, "thickness": 12},
        },
    }
