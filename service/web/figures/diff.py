"""Two placements of one shape: what moves from A to B, and how hot devices are before and after."""

# L layers, E experts, G devices

import numpy as np

from ....spec.placement import Placement
from .figure import BLUE, ORANGE, SEQUENTIAL, Figure, View, axis, left_out, most_of, plain, readable, rows_height


def moved_figure(a: Placement, b: Placement) -> Figure:
    """Copies that each device must load, layer by layer; the two have the same layers, experts and device count."""
    loads = np.array([_loaded(a, b, layer) for layer in range(len(a.layers))])
    shown = most_of(loads.sum(axis=0))
    names = [f"{g} {plain(b.devices[g].host)[:24]}" for g in shown]
    trace = {
        "type": "heatmap",
        "z": loads.T[shown].tolist(),
        "x": list(range(len(a.layers))),
        "y": names,
        "coloraxis": "coloraxis",
        "hovertemplate": "device %{y}, layer %{x}<br>loads %{z} experts<extra></extra>",
    }
    rows = [(g, readable(b.devices[g].host), int(loads[:, g].sum()), int(loads[:, g].max())) for g in shown]
    return Figure(
        "moved",
        "What moves from A to B",
        f"{int(loads.sum())} copies of experts are loaded to go from A to B, at most {int(loads.max())} by one device "
        "in one layer." + left_out(shown, len(b.devices)),
        ("device", "host", "copies loaded", "most in a layer"),
        [View("all", [trace], rows)],
        {
            "xaxis": axis("layer (with experts, from 0)"),
            "yaxis": axis("device", type="category", autorange="reversed"),
            "coloraxis": {
                "colorscale": SEQUENTIAL,
                "cmin": 0,
                "cmax": max(int(loads.max()), 1),
                "colorbar": {"title": {"text": "loads"}, "thickness": 12},
            },
        },
        height=rows_height(len(names)),
    )


def _loaded(a: Placement, b: Placement, layer: int) -> list[int]:
    """Of each device, experts that it holds in B and did not hold in A."""
    pairs = zip(a.layers[layer].slots, b.layers[layer].slots, strict=True)
    return [len(set(after) - set(before)) for before, after in pairs]


def loads_figure(a: np.ndarray, b: np.ndarray) -> Figure:
    """a, b: [L, G] load over ideal on the same tokens; each device's mean over layers, and its hottest layer."""
    devices = most_of(np.maximum(a, b).max(axis=0))
    views, rows = [], []
    for label, of in (("mean over layers", np.mean), ("hottest layer", np.max)):
        before, after = (np.asarray(of(over[:, devices], axis=0)).round(4) for over in (a, b))
        data = [
            {
                "type": "bar",
                "name": name,
                "x": devices,
                "y": values.tolist(),
                "marker": {"color": colour, "pattern": {"shape": shape, "fillmode": "overlay", "fgcolor": "#ffffff"}},
                "hovertemplate": f"device %{{x}}, {name}<br>%{{y:.3f}} of the ideal load<extra></extra>",
            }
            for name, values, colour, shape in (("A", before, BLUE, ""), ("B", after, ORANGE, "/"))
        ]
        rows = [(g, x, y) for g, x, y in zip(devices, before.tolist(), after.tolist(), strict=True)]
        views.append(View(label, data, rows))
    worst = [float(over.max(axis=1).mean()) for over in (a, b)]
    return Figure(
        "loads",
        "Load of devices before and after",
        f"Balance, the hottest device over the ideal and the mean over layers, is {worst[0]:.3f} in A and "
        f"{worst[1]:.3f} in B, on the same tokens." + left_out(devices, a.shape[1]),
        ("device", "A", "B"),
        views,
        {
            "barmode": "group",
            "xaxis": axis("device", dtick=max(1, len(devices) // 16)),
            "yaxis": axis("load over ideal", rangemode="tozero"),
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        },
        chooses="show",
    )
