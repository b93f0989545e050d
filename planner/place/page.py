"""A placement for people: its scores beside linear and EPLB, and one sentence on how sure they can be."""

from rich.table import Table

from ...spec.placement import Placement, Score

COLUMNS = {
    "balance": "balance_mean",
    "worst layer": "balance_max",
    "cross host": "boundary_cross_host",
    "cross device": "boundary_cross_device",
    "hosts/token": "fanout_host",
    "devices/token": "fanout_device",
}
NAMES = {"placement": "this placement", "linear": "linear", "eplb": "EPLB"}


def scores_table(placement: Placement) -> Table:
    """Every placement on the fitted part, and on the rest of the trace where there is one."""
    table = Table(title="scores: 1 is perfect balance; crossings are shares of tokens at a boundary of layers")
    table.add_column("placement")
    table.add_column("scored on")
    for title in COLUMNS:
        table.add_column(title, justify="right")
    for part in ("fit", "held_out"):
        for name, both in placement.scores.items():
            found: Score | None = getattr(both, part)
            if found is not None:
                style = "bold" if name == "placement" else ""
                where = "fitted part" if part == "fit" else "the rest"
                table.add_row(NAMES.get(name, name), where, *(_cell(found, f) for f in COLUMNS.values()), style=style)
        table.add_section()
    return table


def verdict(placement: Placement) -> str:
    """What was minimised, how far it is from its bound, and what it took."""
    s = placement.solver
    proven = "proven optimal" if s.status == "optimal" else f"at most {s.gap:.1%} above the optimum (proven)"
    cap = "" if placement.balance_cap is None else f" Balance was held to {placement.balance_cap:.3f}."
    early = " The search was cut short; more time may help." if s.status == "time_limit" else ""
    moved = ""
    if placement.moves is not None:
        size = "" if placement.moves.bytes is None else f" ({placement.moves.bytes / 2**30:.2f} GiB)"
        moved = f" Against {placement.moves.previous}, {placement.moves.copies} copies{size} are loaded."
    return f"{s.objective:.4g} = {s.minimised}: {proven}, found in {s.seconds:.1f} s.{cap}{early}{moved}"


def _cell(score: Score, field: str) -> str:
    value = getattr(score, field)
    return "-" if value is None else f"{value:.3f}"
