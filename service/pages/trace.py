"""The statistics of a trace for the eye: one picture, and one table for the terminal."""

from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...profiler.traces.stats import TraceStats
from ...spec.picture import plain, save_picture

INK, ACCENT, SOFT = "#1f3b57", "#d1603d", "#8fa3b5"


def draw_stats(stats: TraceStats, path: str | Path) -> Path:
    """Draw load per layer and expert, sorted loads, affinity against its control, fan-out.

    Statistics of a counts-only trace have the first two.
    """
    # Matplotlib is slow to import; the figure is made without pyplot, so no display or global state is touched.
    from matplotlib.figure import Figure

    rows = 1 if stats.affinity is None and stats.fan_out is None else 2
    figure = Figure(figsize=(12, 4.3 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    layers, experts = stats.expert_counts.shape
    routing = f"top-{stats.top_k}, {stats.tokens:,} tokens" if stats.fan_out else "counts only"
    title = plain(f"{stats.model or 'trace'}: {layers} layers x {experts} experts, {routing}")
    figure.suptitle(title, fontsize=13, color=INK)
    _load_map(axes[0, 0], stats)
    _sorted_loads(axes[0, 1], stats)
    if rows == 2:
        _affinity(axes[1, 0], stats)
        _fan_out(axes[1, 1], stats)
    for ax in axes.flat:
        ax.title.set(fontsize=11, color=INK)
        ax.spines[["top", "right"]].set_visible(False)
    return save_picture(figure, path)


def _relative(stats: TraceStats) -> np.ndarray:
    """[L, E] load of each expert over its layer's mean."""
    return stats.expert_counts / np.maximum(stats.expert_counts.mean(1, keepdims=True), 1e-12)


def _load_map(ax, stats: TraceStats) -> None:
    image = ax.imshow(_relative(stats), aspect="auto", interpolation="nearest", cmap="magma", vmin=0)
    ax.figure.colorbar(image, ax=ax, label="load / mean of the layer")
    ax.set(title="Load of every expert", xlabel="expert", ylabel="layer")
    _whole_numbers(ax.xaxis, ax.yaxis)


def _sorted_loads(ax, stats: TraceStats) -> None:
    loads = -np.sort(-_relative(stats), axis=1)
    ranks = np.arange(1, loads.shape[1] + 1)
    ax.plot(ranks, loads.T, color=SOFT, linewidth=0.8, alpha=0.7)
    ax.plot([], [], color=SOFT, label="each layer")
    ax.plot(ranks, loads.mean(0), color=INK, linewidth=2.2, label="mean over layers")
    ax.axhline(1, color=ACCENT, linewidth=1, linestyle="--", label="even load")
    ax.set(title="Sorted load", xlabel="expert, busiest first", ylabel="load / mean of the layer", ylim=(0, None))
    ax.set_xlim(1, len(ranks))
    _whole_numbers(ax.xaxis)
    ax.legend(frameon=False)


def _affinity(ax, stats: TraceStats) -> None:
    affinity = stats.affinity
    if affinity is None:
        ax.set_axis_off()
        return
    boundary = np.arange(len(affinity.information))
    control = f"tokens shuffled: {affinity.control.mean():.3f}"
    ax.bar(boundary, affinity.information, color=INK, width=0.7, label=f"this trace: {affinity.information.mean():.3f}")
    ax.bar(boundary, affinity.control.mean(0), color=ACCENT, width=0.7, label=control)
    bound = np.minimum(affinity.entropy[:-1], affinity.entropy[1:])
    ax.plot(boundary, bound, color=SOFT, marker="_", markersize=10, linestyle="none", label="at most (entropy)")
    ax.set(
        title=f"Affinity of adjacent layers: {affinity.ratio:.1f} x the control",
        xlabel="boundary between layer n and n + 1",
        ylabel="mutual information of top-1 experts (bits)",
        ylim=(0, max(bound.max(), 1e-9) * 1.28),
    )
    _whole_numbers(ax.xaxis)
    ax.legend(frameon=False, loc="upper right", ncols=3, fontsize=8.5, columnspacing=1.2)


def _fan_out(ax, stats: TraceStats) -> None:
    assert stats.fan_out
    width = 0.4
    for side, shares, number, color, name in (
        (-0.5, stats.fan_out.devices, stats.devices, INK, "devices"),
        (0.5, stats.fan_out.hosts, stats.hosts, ACCENT, "hosts"),
    ):
        mean = shares.mean(0)[1:]
        places = np.arange(1, len(mean) + 1)
        label = f"of {number} {name}: {(places * mean).sum():.2f} on average"
        bars = ax.bar(places + side * width, 100 * mean, width=width, color=color, label=label)
        ax.bar_label(bars, fmt="%.0f", fontsize=8.5, color=INK, padding=2)
    ax.set(
        title="Fan-out under linear placement, all layers",
        xlabel="distinct places that a token needs in a layer",
        ylabel="tokens (%)",
        ylim=(0, 125),
        yticks=range(0, 101, 20),
    )
    _whole_numbers(ax.xaxis)
    ax.legend(frameon=False, loc="upper right")


def _whole_numbers(*axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def stats_table(stats: TraceStats) -> RenderableType:
    """One row per layer, their means last, and what the columns mean."""
    affinity, fan_out, halves, shift = stats.affinity, stats.fan_out, stats.halves, stats.shift
    layers, experts = stats.expert_counts.shape
    columns = {"busiest\nexpert": stats.expert_imbalance, "busiest\ndevice": stats.device_imbalance}
    columns["idle\nexperts"] = stats.idle_experts
    if fan_out:
        columns["devices\n/ token"], columns["hosts\n/ token"] = fan_out.mean_devices, fan_out.mean_hosts
    if affinity:
        columns["affinity\nbits"] = np.append(affinity.information, np.nan)
        columns["shuffled\nbits"] = np.append(affinity.control.mean(0), np.nan)
    if halves is not None:
        columns["halves\nbits"] = halves
    if shift is not None:
        columns["shift\nbits"] = shift.divergence
    routing = f"top-{stats.top_k}, {stats.tokens:,} tokens in {stats.sequences} sequences" if fan_out else "counts only"
    title = f"{stats.model or 'trace'}: {layers} layers x {experts} experts, {routing}"
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", *columns):
        table.add_column(name, justify="right")
    for layer in range(layers):
        table.add_row(str(layer), *(_cell(name, values[layer]) for name, values in columns.items()))
    table.add_section()
    table.add_row("mean", *(_cell(name, float(np.nanmean(values)), mean=True) for name, values in columns.items()))
    notes = ["busiest: load over the mean, 1 is even"]
    notes[0] += f"; devices, hosts: linear placement on {stats.devices} devices, {stats.hosts} hosts"
    if affinity:
        times, corrected = affinity.ratio, (affinity.corrected.mean(), affinity.corrected_control.mean())
        notes.append(
            f"affinity: mutual information of top-1 experts with the next layer's; {times:.1f} x that of shuffled "
            f"tokens (corrected for bias: {corrected[0]:.3f} against {corrected[1]:.3f})"
        )
    if halves is not None:
        notes.append("halves: Jensen-Shannon divergence of expert loads between the two halves of the trace")
    if shift is not None:
        others = "" if shift.others is None else f"; between the other's own halves {shift.others.mean():.3f}"
        notes.append(f"shift: the same divergence from the other trace{others}")
    return Group(Text(title, style="bold"), table, *(Text(note, style="dim") for note in notes))


def _cell(name: str, value: float, mean: bool = False) -> str:
    if np.isnan(value):
        return ""
    if name.startswith("idle"):
        return f"{value:.1f}" if mean else f"{int(value)}"
    return f"{value:.3f}" if name.endswith("bits") else f"{value:.2f}"
