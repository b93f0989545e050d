"""A selection of experts as a user asks for it (``run --select``), for the command line and the library."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..spec.errors import MoeplanError
from ..spec.plan import Plan
from ..spec.selection import Selection

if TYPE_CHECKING:
    from ..runtime.run import Selected


def selected_of(
    plan: Plan, select: str | None, quality_budget: float | None, text: Path | None, weights: Path | None
) -> "Selected | None":
    """What the runtime compares; None where no selection was asked for.

    Raises MoeplanError for options that do not go together, and a selection that makes no sense for the plan.
    """
    if select is None:
        for option, value in {"--quality-budget": quality_budget, "--text": text}.items():
            if value is not None:
                raise MoeplanError(f"{option} goes with --select, which says how experts are selected")
        return None
    selection = Selection.from_text(select)
    if quality_budget is None:
        raise MoeplanError(
            f"--select {selection} needs --quality-budget NATS: how far the distribution of the next token may move, "
            "as a mean divergence, such as 0.05"
        )
    if not 0 <= quality_budget < float("inf"):
        raise MoeplanError(f"--quality-budget {quality_budget}: expected a number of nats from 0")
    selection.check(plan.model, plan.workload)
    if text is None:
        return _selected(selection, quality_budget)
    if weights is None:
        raise MoeplanError("--text needs --weights: random weights can say nothing about a text")
    # torch takes seconds to import: wrong options are refused before.
    from ..profiler.traces.hugging_face import read_prompts
    from ..runtime.selected import COMPARED_STEPS

    workload = plan.workload
    length = workload.context + COMPARED_STEPS + 1
    prompts = read_prompts(weights, plan.model, text, workload.sequences, length, plan.seed)
    return _selected(selection, quality_budget, prompts, text.name)


def _selected(
    selection: Selection, budget: float, prompts: list[list[int]] | None = None, text: str = ""
) -> "Selected":
    from ..runtime.run import Selected

    return Selected(selection, budget, prompts, text)
