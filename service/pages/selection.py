"""A selection of experts beside the model's own routing, as a table."""

from collections.abc import Iterator
from statistics import fmean

from rich.text import Text

from ...spec.report import ExpertsUsed, SelectionReport
from .tables import WholeTable

MOST_LAYERS = 16  # with rows of their own


def selection_table(found: SelectionReport) -> WholeTable:
    """Distinct experts, step time and divergence: exact, selected, and how they compare."""
    table = WholeTable(title=f"Selection {found.selection} beside the model's own routing")
    table.add_column("")
    for name in ("exact", "selected", "result"):
        table.add_column(name, justify="right")
    for name, layer in _shown(found.layers):
        less = f"{layer.after / layer.before - 1:+.0%}" if layer.before else "-"
        table.add_row(f"distinct experts, {name} (of {layer.experts})", *_pair(layer.before, layer.after, 1), less)
    table.add_section()
    gain = f"{found.speedup:.2f} times as fast ({found.speedup_low:.2f} to {found.speedup_high:.2f})"
    table.add_row("step, ms", *_pair(found.exact_seconds * 1e3, found.selected_seconds * 1e3, 2), gain)
    if found.perplexity:
        before, after = found.perplexity
        table.add_row(f"perplexity of {found.text}", *_pair(before, after, 3), f"{after / before - 1:+.1%}")
    table.add_row("likeliest token changed", "", f"{found.changed:.1%}", "")
    table.add_row(
        f"divergence, nats ({found.tokens} distributions)",
        f"<= {found.budget:g}",
        f"{found.divergence:.3g}",
        Text("ok") if found.divergence <= found.budget else Text("above the budget", "bold red"),
    )
    if check := found.check:
        table.add_row(
            f"selected output against the reference ({check.layers} layers)",
            f"<= {check.tolerance:.0e}",
            f"{check.relative_error:.1e}",
            Text("ok") if check.passed else Text("differs", "bold red"),
        )
    return table


def _shown(layers: tuple[ExpertsUsed, ...]) -> Iterator[tuple[str, ExpertsUsed]]:
    """Every layer where there are few, and their mean; the experts of the mean are those of the largest layer."""
    if len(layers) <= MOST_LAYERS:
        yield from ((f"layer {layer.layer}", layer) for layer in layers)
    before, after = fmean(layer.before for layer in layers), fmean(layer.after for layer in layers)
    most = max(layer.experts for layer in layers)
    yield f"mean of {len(layers)} layers", ExpertsUsed(layer=-1, experts=most, before=before, after=after)


def _pair(before: float, after: float, digits: int) -> tuple[str, str]:
    return f"{before:.{digits}f}", f"{after:.{digits}f}"
