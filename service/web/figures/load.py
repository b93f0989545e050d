"""How hot every device is in every layer: its time over that of devices equally busy."""

# L layers, G devices

from collections.abc import Mapping

import numpy as np

from ....spec.placement import Placement
from .figure import AROUND_ONE, Figure, View, axis, left_out, most_of, plain, readable, rows_height


def load_figure(placement: Placement, over: Mapping[str, np.ndarray]) -> Figure:
    """over: [L, G] load over ideal by the part of the trace that it was counted on, as its name says."""
    reach = max(max(float(np.abs(part - 1).max()) for part in over.values()), 0.05)
    first = next(iter(over.values()))
    shown = most_of(first.max(axis=0))
    names = [f"{g} {plain(placement.devices[g].host)[:24]}" for g in shown]
    hosts = [readable(placement.devices[g].host) for g in shown]
    views = []
    for label, part in over.items():
        hottest = part.argmax(axis=0)
        rows = [
            (g, host, round(float(part[:, g].mean()), 3), round(float(part[:, g].max()), 3), int(hottest[g]))
            for g, host in zip(shown, hosts, strict=True)
        ]
        views.append(View(label, _traces(part[:, shown], names), rows))
    says = (
        f"Load of each of {first.shape[1]} devices in each of {first.shape[0]} layers, over the load of devices "
        f"equally busy: 1 is even. The hottest device is at {first.max():.2f}, in layer "
        f"{int(first.max(axis=1).argmax())}; the balance, the mean over layers of the hottest one, is "
        f"{first.max(axis=1).mean():.3f}." + left_out(shown, len(placement.devices))
    )
    bar = {"title": {"text": "over<br>ideal"}, "thickness": 12}
    return Figure(
        "load",
        "Load of devices, layer by layer",
        says,
        ("device", "host", "mean over ideal", "most over ideal", "in layer"),
        views,
        {
            "xaxis": axis("layer (with experts, from 0)"),
            "yaxis": axis("device", type="category", autorange="reversed"),
            "coloraxis": {
                "colorscale": AROUND_ONE,
                "cmin": max(0.0, 1 - reach),
                "cmax": 1 + reach,
                "cmid": 1,
                "colorbar": bar,
            },
        },
        chooses="tokens",
        height=rows_height(len(names)),
    )


def _traces(over: np.ndarray, names: list[str]) -> list[dict]:
    layers = over.shape[0]
    hottest = over.argmax(axis=1)
    heat = {
        "type": "heatmap",
        "z": np.round(over.T, 3).tolist(),
        "x": list(range(layers)),
        "y": names,
        "coloraxis": "coloraxis",
        "hovertemplate": "device %{y}, layer %{x}<br>%{z:.3f} of the ideal load<extra></extra>",
    }
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": list(range(layers)),
        "y": [names[g] for g in hottest],
        "marker": {"color": "#111111", "size": 6, "line": {"color": "#ffffff", "width": 1}},
        "hoverinfo": "skip",
        "name": "hottest device of the layer",
        "showlegend": False,
    }
    return [heat, dots]
