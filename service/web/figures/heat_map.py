"""The experts of a layer on the devices: one cell for every slot, the hottest first."""

# L layers, E experts, G devices

from collections.abc import Sequence

import numpy as np

from ....spec.placement import Placement
from .figure import SEQUENTIAL, Figure, View, axis, left_out, most_of, plain, readable, rows_height

MOST_SLOTS = 40_000  # cells of all layers together; of more, the hottest layers are shown
PRINTED = 16  # slots of a device up to which the cells say which expert they hold
NAMED = 12  # experts of a row of the table


def experts_figure(placement: Placement, counts: np.ndarray | None, over: np.ndarray | None = None) -> Figure:
    """counts: [L, E] tokens of every expert; without them a cell shows which share of its expert's tokens it takes.

    over: [L, G] load over ideal, to choose the layers of a large placement.
    """
    shown = _layers(placement, over)
    busy = np.zeros(len(placement.devices)) if over is None else over.max(axis=0)
    devices = most_of(busy)
    slots = max(len(experts) for layer in placement.layers for experts in layer.slots)
    views = [_view(placement, layer, counts, slots, devices) for layer in shown]
    what = "share of the layer's tokens" if counts is not None else "share of its expert's tokens"
    left = len(placement.layers) - len(shown)
    says = (
        f"Which experts each of the {len(placement.devices)} devices holds in a layer, the hottest first, and the "
        f"{what} that each takes."
    )
    says += left_out(devices, len(placement.devices))
    if left:
        says += f" The {len(shown)} layers with the hottest devices are here, {left} are left out."
    most = max(value or 0.0 for view in views for row in view.data[0]["z"] for value in row) or 1.0
    bar = {"title": {"text": "%"}, "thickness": 12}
    colours = {"colorscale": SEQUENTIAL, "colorbar": bar, "cmin": 0, "cmax": most}
    return Figure(
        "experts",
        "Experts on devices",
        says,
        (
            "device",
            "host",
            "experts, the hottest first",
            "% of the layer's tokens" if counts is not None else "experts",
        ),
        views,
        {
            "xaxis": axis("slot, the hottest first", dtick=max(1, slots // 8)),
            "yaxis": axis("device", type="category", autorange="reversed"),
            "coloraxis": colours,
        },
        chooses="layer",
        height=rows_height(len(devices)),
    )


def _layers(placement: Placement, over: np.ndarray | None) -> list[int]:
    """Those that there is space for, the hottest of them, in order."""
    sizes = [sum(map(len, layer.slots)) for layer in placement.layers]
    most = max(1, MOST_SLOTS // max(sizes))
    order = np.arange(len(sizes)) if over is None else np.argsort(-over.max(axis=1), kind="stable")
    return sorted(order[:most].tolist())


def _view(placement: Placement, layer: int, counts: np.ndarray | None, slots: int, devices: Sequence[int]) -> View:
    share = placement.layers[layer].share_matrix(placement.num_experts)
    copies = (share > 0).sum(axis=1)
    total = float(counts[layer].sum()) if counts is not None else 0.0
    load = share * (counts[layer] / total if counts is not None and total else np.ones(len(share)))[:, None]
    cells, hover, held, rows = [], [], [], []
    for g in devices:
        order = sorted(placement.layers[layer].slots[g], key=lambda e: (-load[e, g], e))
        pad = [None] * (slots - len(order))
        host = placement.devices[g].host
        cells.append([round(100 * float(load[e, g]), 3) for e in order] + pad)
        held.append([str(e) + (f" ×{copies[e]}" if copies[e] > 1 else "") for e in order] + [""] * len(pad))
        hover.append(
            [
                f"expert {e} on device {g} ({plain(host)})<br>{100 * load[e, g]:.2f} % of the "
                f"{'layer' if counts is not None else 'expert'}'s tokens"
                + (f"<br>one of {copies[e]} copies, which takes {share[e, g]:.0%}" if copies[e] > 1 else "")
                for e in order
            ]
            + [""] * len(pad)
        )
        names = ", ".join(map(str, order[:NAMED])) + (f" and {len(order) - NAMED} more" if len(order) > NAMED else "")
        total_here = round(100 * float(load[:, g].sum()), 2) if counts is not None else len(order)
        rows.append((g, readable(host), names or "none", total_here))
    trace = {
        "type": "heatmap",
        "z": cells,
        "x": list(range(1, slots + 1)),
        "y": [f"{g} {plain(placement.devices[g].host)[:24]}" for g in devices],
        "coloraxis": "coloraxis",
        "hovertext": hover,
        "hoverinfo": "text",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
    }
    if slots <= PRINTED:
        trace |= {"text": held, "texttemplate": "%{text}"}
    return View(str(layer), [trace], rows)
