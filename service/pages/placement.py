"""A placement for people: its scores beside linear and EPLB, and one sentence on how sure they can be."""

from rich.table import Table

from ...planner.place.answer import ALL_ARRANGEMENTS, EXACT_PROGRAM
from ...planner.units import bytes_text
from ...spec.placement import Placement, Score

COLUMNS = {
    "balance": "balance_mean",
    "worst": "balance_max",
    "x host": "boundary_cross_host",
    "x device": "boundary_cross_device",
    "hosts": "fanout_host",
    "devices": "fanout_device",
    "ms": "step_seconds",
}
LEGEND = (
    "balance: hottest device over ideal, mean and worst layer; x: share of tokens that cross at a boundary of layers; "
    "hosts, devices: that hold a token's experts"
)
PROGRAMS = (ALL_ARRANGEMENTS, EXACT_PROGRAM)
NAMES = {"placement": "this", "linear": "linear", "eplb": "EPLB"}


def scores_table(placement: Placement) -> Table:
    """Every placement on the fitted part, and on the rest of the trace where there is one."""
    table = Table(title="scores", caption=LEGEND)
    table.add_column("placement")
    table.add_column("scored on")
    everything = [part for both in placement.scores.values() for part in (both.fit, both.held_out) if part]
    shown = {title: f for title, f in COLUMNS.items() if any(getattr(part, f) is not None for part in everything)}
    for title in shown:
        table.add_column(title, justify="right")
    for part in ("fit", "held_out"):
        for name, both in placement.scores.items():
            found: Score | None = getattr(both, part)
            if found is not None:
                style = "bold" if name == "placement" else ""
                where = "fit" if part == "fit" else "held out"
                table.add_row(NAMES.get(name, name), where, *(_cell(found, f) for f in shown.values()), style=style)
        table.add_section()
    if "ms" in shown:
        table.caption = f"{LEGEND}; ms: predicted"
    return table


def verdict(placement: Placement, stopped: bool = False) -> str:
    """What was minimised, how far it is from its bound, and what it took. stopped: by Ctrl-C."""
    s = placement.solver
    if s.status == "optimal":
        by = max(s.bounds, key=lambda name: s.bounds[name]) if s.bounds else ""
        proven = f"proven optimal by {by if by in PROGRAMS else f'the bound of {by}'}" if by else "proven optimal"
    elif s.bound <= 0:
        proven = "how much of it could be saved is not known"
    else:
        proven = f"proven that at most {s.gap:.1%} of it could be saved"
    by = f" by {s.found_by}" if s.found_by else ""
    over = ", the mean over load samples" if placement.balance_cap_of == "samples" else ""
    cap = "" if placement.balance_cap is None else f" Balance was held to {placement.balance_cap:.3f}{over}."
    early = " The time limit ended the search; a longer --time-limit may help." if s.status == "time_limit" else ""
    early = " Ctrl-C ended the search." if early and stopped else early
    moved = ""
    if placement.moves is not None:
        size = "" if placement.moves.bytes is None else f" ({bytes_text(placement.moves.bytes)})"
        moved = f" Against {placement.moves.previous}, {placement.moves.copies} copies{size} are loaded."
    return f"{s.objective:.4g} = {s.minimised}: {proven}, found{by} in {s.seconds:.1f} s.{cap}{early}{moved}"


def _cell(score: Score, field: str) -> str:
    value = getattr(score, field)
    if value is None:
        return "-"
    return f"{1e3 * value:.2f}" if field == "step_seconds" else f"{value:.3f}"
