"""The page and the picture of an explanation. Nothing is printed here."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...planner.place.crossings import Boundary, Fanout, Swap
from ...planner.place.explain import OWN, Explanation, OneMoreSlot, own_scores
from ...planner.units import bytes_text
from ...spec.picture import plain, save_picture
from ...spec.placement import Objective, Placement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 5  # layers of each table
ALONE = 0.98  # of a device's load: what else is on it does not matter
SHIFT = 0.05  # of the balance, from the fitted part to the rest: worth a sentence
SCORES = {
    "balance_mean": "balance",
    "balance_max": "worst layer",
    "boundary_cross_host": "cross host",
    "boundary_cross_device": "cross device",
    "fanout_host": "fan-out hosts",
    "fanout_device": "devices",
}


def page(placement: Placement, found: Explanation) -> Group:
    """The whole answer, most important first."""
    parts: list[RenderableType] = [_verdict(placement), _limits(found)]
    if len(placement.solver.bounds) > 1:
        parts.append(_bounds(placement))
    parts += [_scores(placement), _hot_spots(placement, found)]
    movement: list[RenderableType] = []
    if found.boundaries is not None:
        movement.append(_boundaries(placement, found.boundaries))
    if found.fanout is not None:
        movement.append(_fanout(found.fanout))
    parts += movement if placement.movement == "coherent" else movement[::-1]
    if found.one_more_slot is not None:
        parts.append(_one_more_slot(found.one_more_slot, placement.objective))
    return Group(*parts)


def _verdict(placement: Placement) -> Text:
    solver, hosts = placement.solver, len({device.host for device in placement.devices})
    text = Text()
    name = f"{placement.model}: " if placement.model else ""
    slots = sum(device.capacity for device in placement.devices)
    text.append(
        f"{name}{len(placement.layers)} layers x {placement.num_experts} experts on {len(placement.devices)} devices "
        f"of {_several(hosts, 'host')}, {slots} slots per layer\n",
        style="bold",
    )
    text.append(f"{placement.objective} ({placement.movement}). Minimised: {solver.minimised}.\n")
    text.append(f"Reached {solver.objective:.6g}; ")
    if solver.status == "optimal":
        text.append("proven optimal: no placement within the limits has less.\n", style="bold")
    elif solver.bound <= 0:
        text.append("nothing is proven: the bound is 0, so how much less is possible is not known.\n", style="bold")
    else:
        text.append(f"proven: no placement within the limits has less than {solver.bound:.6g}, ")
        text.append(f"so at most {solver.gap:.1%} could still be saved.\n", style="bold")
    if solver.status == "time_limit":
        text.append("The search stopped at its time limit: a larger --time-limit may find better.\n")
    if solver.status != "optimal":
        text.append("The gap holds what the search missed and what the bound cannot see; which, is not known.\n")
    return text


def _limits(found: Explanation) -> Group:
    table = _table()
    for name in ("limit", "binds", ""):
        table.add_column(name)
    for limit in found.limits:
        table.add_row(limit.name, "yes" if limit.binding else "no", Text(limit.text))
    return _section("what limits it", table)


def _bounds(placement: Placement) -> Group:
    solver, table = placement.solver, _table()
    table.add_column("bound")
    table.add_column("value", justify="right")
    table.add_column("of what was reached", justify="right")
    table.add_column("")
    best = max(solver.bounds.values())
    for name, value in sorted(solver.bounds.items(), key=lambda item: -item[1]):
        share = f"{value / solver.objective:.1%}" if solver.objective else "-"
        table.add_row(Text(name), f"{value:.6g}", share, "counts" if value == best else "")
    return _section("what is proven: no placement within the limits is below any of these", table)


def _scores(placement: Placement) -> Group:
    """What the document holds, its own placement first."""
    table = _table()
    for name in ("", "", *SCORES.values()):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for name in sorted(placement.scores, key=lambda name: name != OWN):
        scores = placement.scores[name]
        label = "this" if name == OWN else name
        for part, score in (("fitted", scores.fit), ("held out", scores.held_out)):
            if score is not None:
                values = [getattr(score, field) for field in SCORES]
                table.add_row(Text(label), part, *("-" if v is None else f"{v:.3f}" for v in values))
                label = ""
    return _section("beside the usual placements, lower is better", table, _shift(placement))


def _shift(placement: Placement) -> str:
    own = own_scores(placement)
    if own is None or own.held_out is None or own.held_out.balance_mean - own.fit.balance_mean < SHIFT:
        return ""
    return (
        f"The loads shift within the trace: balance {own.fit.balance_mean:.3f} where it was fitted, "
        f"{own.held_out.balance_mean:.3f} on tokens that it did not see."
    )


def _hot_spots(placement: Placement, found: Explanation) -> Group:
    part = "the fitted part" if found.fitted else "the whole trace, of which nothing was fitted"
    table = _table()
    table.add_column("layer", justify="right")
    table.add_column("device")
    table.add_column("load", justify="right")
    if found.held_out:
        table.add_column("held out", justify="right")
    table.add_column("its heaviest experts (share of the layer's load)")
    for spot in found.hot_spots[:SHOWN]:
        experts = ", ".join(
            f"{e.expert} ({e.share:.1%}{f', 1 of {e.copies} copies' if e.copies > 1 else ''})" for e in spot.experts
        )
        later = [f"{spot.held_out:.3f}"] if spot.held_out is not None else []
        table.add_row(str(spot.layer), Text(f"{spot.device} on {spot.host}"), f"{spot.over_ideal:.3f}", *later, experts)
    host = placement.devices[found.busiest_device].host
    below = f"Over all layers together device {found.busiest_device} on {host} is the busiest: "
    below += f"{found.busiest_over_ideal:.3f} of an equal share."
    alone = [str(s.layer) for s in found.hot_spots[:SHOWN] if s.heaviest_alone >= ALONE * s.over_ideal]
    if alone:
        below += f"\nIn {'layer' if len(alone) == 1 else 'layers'} {', '.join(alone)} the heaviest expert alone makes "
        below += "its device that hot: only another copy of it or a faster device can cool it."
    return _section(f"hottest devices, on {part} (load 1 = all devices equally busy)", table, below)


def _boundaries(placement: Placement, boundaries: tuple[Boundary, ...]) -> Group:
    hosts, table = int(placement.hosts.max()) + 1, _table()
    zones = "hosts" if hosts > 1 else "devices"
    table.add_column("layers", no_wrap=True)
    if hosts > 1:
        table.add_column("host", justify="right")
    table.add_column("device", justify="right")
    table.add_column("pair", no_wrap=True)
    table.add_column("devices", no_wrap=True)
    table.add_column("tokens", justify="right")
    table.add_column("to join them", no_wrap=True)
    table.add_column("change", justify="right")
    table.add_column("hottest", justify="right")
    for boundary in boundaries[:SHOWN]:
        cross = [boundary.cross_host, boundary.cross_device] if hosts > 1 else [boundary.cross_device]
        head = [f"{boundary.layer} → {boundary.layer + 1}", *(f"{share:.1%}" for share in cross)]
        if not boundary.pairs:
            table.add_row(*head, "none")
        for pair in boundary.pairs:
            where = f"{pair.devices[0]} → {pair.devices[1]}"
            table.add_row(*head, f"{pair.expert} → {pair.next_expert}", where, str(pair.tokens), *_swap(pair.swap))
            head = [""] * len(head)
    title = (
        "what still crosses: share of tokens whose top-1 expert of the next layer is elsewhere, "
        f"and the heaviest pairs across {zones}"
    )
    below = (
        f"By chance {_chance(placement, zones):.0%} would cross {zones}. To join a pair: the best exchange of two "
        f"experts of one layer, and how it changes the tokens that cross {zones}, and the layer's hottest device."
    )
    return _section(title, table, below)


def _chance(placement: Placement, zones: str) -> float:
    """Share of tokens that would cross if experts followed each other at random, by slots."""
    capacity = np.array([device.capacity for device in placement.devices], float)
    slots = np.bincount(placement.hosts, capacity) if zones == "hosts" else capacity
    return float(1 - ((slots / slots.sum()) ** 2).sum())


def _swap(swap: Swap | None) -> tuple[str, str, str]:
    if swap is None:
        return "no: groups stay", "", ""
    heat = swap.over_ideal[1] - swap.over_ideal[0]
    return f"{swap.expert} ↔ {swap.partner} in {swap.layer}", f"{swap.crossings:+d}", f"{heat:+.3f}"


def _fanout(fanout: tuple[Fanout, ...]) -> Group:
    hosts, devices = (np.mean([getattr(f, name) for f in fanout]) for name in ("hosts", "devices"))
    table = _table()
    for name in ("layer", "hosts", "devices"):
        table.add_column(name, justify="right")
    for row in fanout[:SHOWN]:
        table.add_row(str(row.layer), f"{row.hosts:.2f}", f"{row.devices:.2f}")
    below = f"On average {hosts:.2f} hosts and {devices:.2f} devices."
    return _section("widest fan-out: distinct hosts and devices that hold a token's experts", table, below)


def _one_more_slot(slot: OneMoreSlot, objective: Objective) -> Group:
    table = _table()
    table.add_column("")
    table.add_column("balance", justify="right")
    table.add_column("bound", justify="right")
    table.add_row("this placement", f"{slot.now:.4f}", "")
    table.add_row("placed anew for balance alone, same slots", f"{slot.same_slots:.4f}", f"{slot.same_slots_bound:.4f}")
    table.add_row("the same with one more slot per device", f"{slot.more_slots:.4f}", f"{slot.more_slots_bound:.4f}")
    gained = slot.same_slots - slot.more_slots
    below = f"The slot buys {gained:.4f} of balance" if gained >= 5e-4 else "The slot buys next to nothing"
    if slot.bytes_per_device is not None:
        below += f" and costs {bytes_text(slot.bytes_per_device)} on every device, all layers together"
    forgone = slot.now - slot.same_slots
    if forgone >= 5e-4:
        gone = "what this placement gives up for its objective"
        if objective == "balance":
            gone = "since placing balances every part of the trace by itself, and this is the trace as a whole"
        below += f"; {forgone:.4f} more is {gone}"
    return _section("what one more slot per device would buy, on the same tokens", table, f"{below}.")


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _section(title: str, table: Table, below: str = "") -> Group:
    """A heading of its own: a table's title would be wrapped to the width of the table."""
    return Group(Text(title, style="bold"), table, Text(f"{below}\n" if below else ""))


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


LEGEND = 22  # points above the lower panel, under its title


def draw(placement: Placement, found: Explanation, path: Path) -> None:
    """Load over ideal of every device and layer, and under it what crosses; the format follows the file's ending."""
    from matplotlib.figure import Figure

    layers, devices = len(placement.layers), len(placement.devices)
    width, height = np.clip(2.5 + 0.3 * layers, 7, 18), np.clip(1.2 + 0.3 * devices, 2.4, 9)
    below = found.boundaries is not None or found.fanout is not None
    figure = Figure(figsize=(width, height + (2.2 if below else 0)), layout="constrained")
    rows = figure.subplots(2 if below else 1, 1, sharex=True, squeeze=False, height_ratios=[height, 2.2][: 1 + below])
    upper = rows[0, 0]
    _heat(upper, placement, found)
    if found.boundaries is not None:
        _crossing_bars(rows[1, 0], placement, found.boundaries)
    elif found.fanout is not None:
        _fanout_bars(rows[1, 0], found.fanout)
    rows[-1, 0].set_xlabel("layer (with experts, from 0)")
    save_picture(figure, path)


def _heat(axes: "Axes", placement: Placement, found: Explanation) -> None:
    from matplotlib.colors import TwoSlopeNorm

    over, hosts = np.array(found.load_over_ideal).T, [device.host for device in placement.devices]
    reach = max(float(np.abs(over - 1).max()), 0.05)
    norm = TwoSlopeNorm(1.0, max(0.0, 1 - reach), 1 + reach)
    image = axes.imshow(over, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    every = max(1, len(hosts) // 32)
    shown = range(0, len(hosts), every)
    axes.set_yticks(shown, [plain(f"{d} {hosts[d]}") for d in shown], fontsize=8)
    axes.set_ylabel("device, host")
    for d in np.flatnonzero(np.array(hosts)[1:] != np.array(hosts)[:-1]):
        axes.axhline(d + 0.5, color="black", linewidth=1.2)
    hottest = over.argmax(axis=0)
    axes.scatter(range(len(hottest)), hottest, s=9, color="black")
    axes.figure.colorbar(image, ax=axes, label="load over ideal (1 = equal)", fraction=0.04, pad=0.01)
    score, part = found.fit, "fitted part" if found.fitted else "whole trace, not fitted"
    held = f", held out {found.held_out.balance_mean:.3f}" if found.held_out else ""
    name = placement.model or "placement"
    title = f"{plain(name)}: load of each device on the {part}\nbalance {score.balance_mean:.3f}{held}; dots: hottest"
    axes.set_title(title, fontsize=10, loc="left")


def _crossing_bars(axes: "Axes", placement: Placement, boundaries: tuple[Boundary, ...]) -> None:
    at = [b.layer + 0.5 for b in boundaries]
    axes.bar(at, [100 * b.cross_device for b in boundaries], 0.7, color="#c9d6e3", label="to another device")
    if placement.hosts.max():
        axes.bar(at, [100 * b.cross_host for b in boundaries], 0.7, color="#2f5d8a", label="to another host")
        axes.axhline(
            100 * _chance(placement, "hosts"), color="#2f5d8a", linestyle="--", linewidth=1, label="hosts, by chance"
        )
    axes.set_ylabel("tokens that\nmove (%)")
    axes.set_title("top-1 expert of the next layer is elsewhere", fontsize=10, loc="left", pad=LEGEND)
    _finish(axes)


def _fanout_bars(axes: "Axes", fanout: tuple[Fanout, ...]) -> None:
    at = [f.layer for f in fanout]
    axes.bar(at, [f.devices for f in fanout], 0.7, color="#c9d6e3", label="devices")
    axes.bar(at, [f.hosts for f in fanout], 0.7, color="#2f5d8a", label="hosts")
    axes.set_ylabel("per token")
    axes.set_title("distinct devices and hosts of a token's experts", fontsize=10, loc="left", pad=LEGEND)
    _finish(axes)


def _finish(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", ncols=3, loc="lower left", bbox_to_anchor=(-0.01, 0.96))
