"""Advice as a table and sentences."""

from rich import box
from rich.text import Text

from ...planner.units import bytes_text
from ...spec.advice import Advice, Interval, OptionAdvice
from .tables import WholeTable

WHOLE = ("slots", "hottest", "gain", "of the step", "pays")  # columns that 80 characters leave as they are
MAKERS = {"eplb": "EPLB", "moeplan": "moeplan"}


def advice_tables(advice: Advice) -> list[WholeTable]:
    """One of each phase: a row for every option."""
    return [_table(advice, i) for i in range(len(advice.phases))]


def verdict(advice: Advice) -> Text:
    """A sentence of each phase: yes or no, why, and what it costs."""
    lines = []
    for i, phase in enumerate(advice.phases):
        best = advice.best[i]
        lines.append(f"{phase}: " + (_no(advice, i) if best is None else _yes(advice.options[best], i, advice)))
    return Text("\n".join(lines), style="bold")


def _table(advice: Advice, i: int) -> WholeTable:
    first = advice.options[0].phases[i]
    title = (
        f"{first.phase}, {first.tokens} tokens a step on {advice.devices} devices: experts by number take "
        f"{1e3 * first.seconds_before:.3g} ms, the hottest device has {first.hottest_before:.2f} times the mean"
    )
    table = WholeTable(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("placement", no_wrap=True)
    step = ("of the step",) if first.step_gain else ()
    names = ("slots", "hottest", "gain", "90 %", *step, "single steps", "at most", "moved", "paid back after", "pays")
    for name in names:
        table.add_column(name, justify="right", no_wrap=name in WHOLE)
    for number, option in enumerate(advice.options):
        found, back = option.phases[i], option.pays_back_steps[i]
        table.add_row(
            Text(MAKERS[option.placement], style="bold" if number == advice.best[i] else ""),
            f"{option.slots}",
            f"{found.hottest:.2f}",
            f"{found.gain.middle:+.1%}",
            _ends(found.gain),
            *([] if found.step_gain is None else [f"{found.step_gain.middle:+.1%}"]),
            _ends(found.steps),
            f"{found.most:+.1%}",
            bytes_text(option.moved_bytes),
            "never" if back is None else f"{back:,.0f} steps",
            "yes" if found.pays else "no",
        )
    return table


def _yes(option: OptionAdvice, i: int, advice: Advice) -> str:
    found, back = option.phases[i], option.pays_back_steps[i]
    copies = (
        f"{option.redundant} redundant experts ({bytes_text(option.memory_bytes)} a device)"
        if option.redundant
        else "no redundant expert"
    )
    step = "" if found.step_gain is None else f", {_interval(found.step_gain)} of the step"
    moved = "" if back is None else f"; loading it while serving is paid back after {back:,.0f} steps"
    replans = f", with a re-plan every {advice.replan_every} steps" if advice.replan_every else ""
    return (
        f"yes. {MAKERS[option.placement]} with {copies} saves {_interval(found.gain)} of the time of the experts"
        f"{step}{replans}{moved}."
    )


def _no(advice: Advice, i: int) -> str:
    option = max(advice.options, key=lambda o: o.phases[i].gain.middle)
    found = option.phases[i]
    most = f"{MAKERS[option.placement]} with {option.slots} slots would save {_interval(found.gain)}"
    if advice.replan_every and found.gain.high < 0:
        each = f"a re-plan takes {1e3 * option.replan_seconds:.3g} ms, every {advice.replan_every} steps"
        return f"no. Moving costs more than it saves: {each}; {most} of the time of the experts."
    if found.gain.high < 0:
        return f"no. Every placement is slower: {most} of the time of the experts."
    if found.gain.low > 0:
        return f"no. There is little to gain: {most} of the time of the experts."
    return f"no. The gain is not told apart from none: {most} of the time of the experts."


def _ends(gain: Interval) -> str:
    return f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"


def _interval(gain: Interval) -> str:
    return f"{gain.middle:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})"
