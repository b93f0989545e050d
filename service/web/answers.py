"""What finished jobs say on the page, and in files that people take with them."""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

from ...planner.export import ENGINES, Export, engine_named
from ...planner.export import export as make
from ...spec.catalogue import load_model
from ...spec.cluster import Cluster
from ...spec.document import read_text
from ...spec.errors import MoeplanError
from ...spec.model import Model
from ...spec.placement import Placement
from ...spec.plan import Plan
from ...spec.trace import Trace
from ..jobs.errors import UnknownError
from ..jobs.requests import check_model, is_digest
from ..jobs.service import Service
from ..jobs.store import Job
from .content import Section, about_placement, about_plan, diff_section, placement_sections, plan_sections
from .views import answer_of, progress_of, title_of

OLD = (1980, 1, 1, 0, 0, 0)  # of files in an archive: equal answers are equal archives
KINDS = ("place", "solve")
"""Of jobs whose answers are shown."""


@dataclass(frozen=True)
class Answer:
    """model: what an engine's file is asked for with, as far as it is known; engine: one that takes it."""

    title: str
    about: Sequence[str]
    sections: Sequence[Section]
    model: str = ""
    engine: str = ""
    engines: bool = False


def answer(service: Service, job: Job) -> Answer:
    """A finished job's document as sections. Raises MoeplanError where there is none."""
    title = title_of(job.kind, job.request)
    if job.kind not in KINDS:
        text = "The answer is JSON, to be taken with the button below."
        return Answer(title, [], [Section("result", "Answer", [text])])
    document = answer_of(_text(service, service.answered(job.id)))
    asked = job.request.get("model") or ""
    model = engine = ""
    if isinstance(document, Placement):
        model = asked if asked and not is_digest(asked) else document.model
        engine = _taking(service, document, asked or model)
        sections = placement_sections(document, trace_of(service, document), _cluster(service, job))
        about = about_placement(document)
    else:
        sections = plan_sections(document, cluster=_cluster(service, job))
        about = about_plan(document)
    if job.progress.get("points"):
        sections.append(Section("search", "The search", figures=[progress_of(job)]))
    return Answer(title, about, sections, model, engine, engines=isinstance(document, Placement))


def _taking(service: Service, placement: Placement, model: str) -> str:
    """The first engine that takes a placement of this model; of none, or for an unknown model, the first of all."""
    for name in ENGINES if model else ():
        try:
            make(placement, name, _model(service, model))
        except MoeplanError:
            continue
        return name
    return next(iter(ENGINES))


def trace_of(service: Service, placement: Placement) -> Trace | None:
    """The trace that a placement was fitted on, where it is here."""
    digest = placement.trace.digest
    found = service.store.document_of_content("trace", digest) if digest else None
    if found is None:
        return None
    with service.opened(found.digest) as file:
        return Trace.read(file.name)


def placement_of(service: Service, job: str) -> Placement:
    """A job's placement. Raises MoeplanError where it is none."""
    document = answer_of(_text(service, service.answered(job)))
    if isinstance(document, Plan):
        raise MoeplanError(f"job {job[:8]}: it is a plan, not a placement")
    return document


def compared(service: Service, a: str, b: str) -> Section:
    """Two jobs' placements, on the trace of the second."""
    first, second = placement_of(service, a), placement_of(service, b)
    trace = trace_of(service, second)
    if trace is not None and (trace.layers, trace.num_experts) != (len(first.layers), first.num_experts):
        trace = None  # the shapes differ, which the comparison says
    return diff_section(first, second, trace)


def exported(service: Service, job: str, to: str, model: str) -> Export:
    """A job's placement as an engine's files. model: a catalogue name, or the digest of a model that was sent."""
    engine = engine_named(to)
    if not model:
        raise MoeplanError("model: name the model that the engine runs, such as deepseek-v3")
    return make(placement_of(service, job), engine.name, _model(service, model))


def packed(made: Export) -> tuple[str, bytes]:
    """Name and content of what is sent: the one file, or an archive of several with how to start the engine."""
    if len(made.files) == 1:
        name, text = next(iter(made.files.items()))
        return name, text.encode()
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in made.files.items():
            archive.writestr(zipfile.ZipInfo(name, OLD), text)
    return f"{made.engine}.zip", content.getvalue()


def engine_titles() -> list[tuple[str, str]]:
    return [(engine.name, engine.title) for engine in ENGINES.values()]


def _model(service: Service, name: str) -> Model:
    if is_digest(name):
        service.store.document(name, "model")
        with service.opened(name) as file:
            return Model.read(file.name)
    check_model(name)
    return load_model(name)


def _cluster(service: Service, job: Job) -> Cluster | None:
    digest = job.request.get("cluster")
    if not digest:
        return None
    try:
        with service.opened(digest) as file:
            return Cluster.read(file.name)
    except UnknownError:  # gone from the store: the answer is shown without it
        return None


def _text(service: Service, digest: str) -> str:
    with service.opened(digest) as file:
        return read_text(file.name)
