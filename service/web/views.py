"""Jobs as the page shows them, and what a finished one says."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...spec.document import parse_object
from ...spec.errors import DocumentError
from ...spec.placement import Placement
from ...spec.plan import Plan
from .figures.figure import Figure, readable
from .figures.progress import progress_figure

if TYPE_CHECKING:
    from ..jobs.store import Job

VERBS = {"place": "Placement", "solve": "Plan", "explain": "Explanation", "export": "Export"}
MINIMISED = {"solve": "seconds of a step"}


@dataclass(frozen=True)
class JobView:
    """part: how much of it is done, 0 to 1; None where that is not known."""

    id: str
    kind: str
    title: str
    state: str
    over: bool
    far: str
    what: str
    part: float | None
    created: str
    error: str


def view_of(job: "Job") -> JobView:
    progress = job.progress
    done, of = progress.get("done"), progress.get("of")
    part = min(max(done / of, 0.0), 1.0) if done is not None and of else None
    gap = _gap(progress)
    far = [f"{part:.0%}" if part is not None and not job.over else "", f"gap {gap:.1%}" if gap is not None else ""]
    return JobView(
        id=job.id,
        kind=job.kind,
        title=title_of(job.kind, job.request),
        state="ending with the best found" if job.stopping and not job.over else job.state,
        over=job.over,
        far=", ".join(filter(None, far)),
        what=readable(str(progress.get("what", ""))) if not job.over else "",
        part=part,
        created=time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created)),
        error="".join(c if c.isprintable() else "?" for c in job.error or ""),
    )


def title_of(kind: str, asked: Mapping[str, Any]) -> str:
    """What was asked, in a few words."""
    model = asked.get("model") or ""
    named = f" of {readable(model)}" if model and len(model) < 64 else ""
    title = f"{VERBS.get(kind, kind)}{named}"
    if kind == "place" and asked.get("devices"):
        hosts = asked.get("hosts") or 1
        return f"{title} on {asked['devices']} devices, {hosts} host{'s' if hosts > 1 else ''}"
    if kind == "place":
        return f"{title} on measured devices"
    if kind == "solve":
        return f"{title} at {readable(str(asked.get('workload', '')))}"
    return title


def progress_of(job: "Job") -> Figure:
    """Best found and bound over time, from what the job has told."""
    events: list[dict[str, Any]] = [
        {"seconds": seconds, "incumbent": incumbent, "bound": bound}
        for seconds, incumbent, bound in job.progress.get("points", ())
    ]
    if events and not job.over:
        events.append({"seconds": job.progress.get("seconds", events[-1]["seconds"])})
    return progress_figure(events, MINIMISED.get(job.kind, ""))


def _gap(progress: Mapping[str, Any]) -> float | None:
    best, bound = progress.get("incumbent"), progress.get("bound")
    return max((best - bound) / best, 0.0) if best and bound is not None else None


def answer_of(text: str) -> Placement | Plan:
    """The document in a job's answer."""
    kind = parse_object(text, "answer").get("kind")
    if kind == Placement.kind:
        return Placement.parse(text, "answer")
    if kind == Plan.kind:
        return Plan.parse(text, "answer")
    raise DocumentError("answer: neither a placement nor a plan: /v1/jobs has it")
