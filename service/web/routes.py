"""The page: forms, jobs while they run, their results. Everything is rendered here; the browser draws the figures."""

import hmac
import shlex
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse

from ... import __version__
from ...spec.catalogue import catalogue
from ...spec.errors import MoeplanError
from ..http.documents import service_of, streamed
from ..http.guard import COOKIE
from ..jobs.requests import Asked
from ..jobs.store import Job
from .answers import KINDS, Answer, answer, compared, engine_titles, exported, packed
from .content import Section
from .forms import MOST_FIELDS, MOST_FILES, PLACE, SOLVE, asked_in, place_question, solve_question
from .report import report_html
from .security import HEADERS, safe_name, same_origin
from .templating import PLOTLY, STATIC, environment, plotly_file
from .views import progress_of, view_of

SHOWN = 50  # jobs of a list, and documents
YEAR = {"Cache-Control": "no-cache"}
SCRIPTS = {"page.js": "text/javascript", "figures.js": "text/javascript", "htmx.min.js": "text/javascript"}
STATICS = SCRIPTS | {"style.css": "text/css", PLOTLY: "text/javascript"}
JobId = Annotated[str, PathParameter(pattern="^[0-9a-f]{32}$")]


class PageRoute(APIRoute):
    """Errors become pages, forms of other sites are refused, every answer says what it may load."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                if request.method == "POST" and not same_origin(request.headers):
                    response: Response = _refused("another page may not send this form", 403)
                else:
                    response = await handler(request)
            except RequestValidationError:
                response = _refused("there is no such page", 404)
            except MoeplanError as error:
                response = _refused(str(error), getattr(error, "status", 422))
            for name, value in HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        return handled


router = APIRouter(route_class=PageRoute, include_in_schema=False)


def _page(template: str, here: str = "", status: int = 200, **content: Any) -> HTMLResponse:
    text = environment().get_template(template).render(version=__version__, here=here, error=None, **content)
    return HTMLResponse(text, status)


def _refused(error: str, status: int) -> HTMLResponse:
    template = environment().get_template("refused.html")
    line = "".join(c if c.isprintable() else "?" for c in error)
    return HTMLResponse(template.render(version=__version__, here="", title="Not so", error=line), status)


def _form(request: Request, name: str, asked: dict[str, str], error: str | None = None, status: int = 200) -> Response:
    store = service_of(request).store
    known = {f"{kind}s": store.list_documents(kind, SHOWN) for kind in ("trace", "cluster")}
    here = "/" if name == "place" else "/solve"
    template = environment().get_template(f"{name}.html")
    content = known | {"asked": asked, "models": list(catalogue()), "error": error}
    return HTMLResponse(template.render(version=__version__, here=here, **content), status)


@router.get("/")
def start(request: Request) -> Response:
    return _form(request, "place", PLACE)


@router.get("/solve")
def plan(request: Request) -> Response:
    return _form(request, "solve", SOLVE)


@router.post("/place")
async def ask_place(request: Request) -> Response:
    return await _asked(request, "place", PLACE, place_question)


@router.post("/solve")
async def ask_solve(request: Request) -> Response:
    return await _asked(request, "solve", SOLVE, solve_question)


async def _asked(
    request: Request,
    name: str,
    usual: dict[str, str],
    question_in: Callable[..., Coroutine[Any, Any, Asked]],
) -> Response:
    """On to the job, or back to the form with what was wrong."""
    service = service_of(request)
    async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
        try:
            question = await question_in(request, service, form)
            job, _ = await run_in_threadpool(service.ask, question)
        except MoeplanError as error:
            status = getattr(error, "status", 422)
            asked = asked_in(form, usual)
            return await run_in_threadpool(_form, request, name, asked, str(error), status)
    return RedirectResponse(f"/jobs/{job.id}", 303)


@router.get("/jobs")
def list_jobs(request: Request) -> Response:
    return _page("jobs.html", "/jobs", **_jobs(request))


@router.get("/jobs/table")
def jobs_table(request: Request) -> Response:
    return _page("jobs_table.html", **_jobs(request))


def _jobs(request: Request) -> dict[str, Any]:
    jobs = [view_of(job) for job in service_of(request).store.list_jobs(limit=SHOWN)]
    return {"jobs": jobs, "busy": any(not job.over for job in jobs)}


@router.get("/jobs/{job}")
def show_job(request: Request, job: JobId) -> Response:
    service = service_of(request)
    found = service.store.job(job)
    if not found.over:
        return _page("working.html", job=view_of(found), figure=progress_of(found))
    if found.result is None:
        return _page("ended.html", job=view_of(found))
    shown = answer(service, found)
    return _page("result.html", **_result(found, shown))


def _result(job: Job, shown: Answer) -> dict[str, Any]:
    stem = {"place": "place.json", "solve": "plan.json"}.get(job.kind, "answer.json")
    about = [*shown.about, *(["Cancelled: the best found until then."] if job.state == "cancelled" else [])]
    return {
        "job": view_of(job),
        "about": about,
        "sections": shown.sections,
        "engines": engine_titles() if shown.engines else [],
        "models": list(catalogue()) if shown.engines else [],
        "model_name": shown.model,
        "to": shown.engine,
        "document_name": stem,
        "reports": job.kind in KINDS,
    }


@router.get("/jobs/{job}/live")
def live(request: Request, job: JobId) -> Response:
    """A piece of a running job's page; once it is over, the browser is sent to the result."""
    found = service_of(request).store.job(job)
    response = _page("live.html", job=view_of(found), figure=progress_of(found))
    if found.over:
        response.headers["HX-Redirect"] = f"/jobs/{job}"
    return response


@router.post("/jobs/{job}/cancel")
def cancel(request: Request, job: JobId) -> Response:
    service_of(request).store.cancel(job)
    return RedirectResponse(f"/jobs/{job}", 303)


@router.get("/jobs/{job}/document")
def document(request: Request, job: JobId) -> Response:
    service = service_of(request)
    response = streamed(service, service.answered(job))
    name = {"place": "place.json", "solve": "plan.json"}.get(service.store.job(job).kind, "answer.json")
    response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


@router.get("/jobs/{job}/report.html")
def job_report(request: Request, job: JobId) -> Response:
    service = service_of(request)
    shown = answer(service, service.store.job(job))
    text = report_html(shown.title, shown.about, shown.sections)
    name = safe_name(f"{shown.title}.html", "report.html")
    return HTMLResponse(text, headers={"Content-Disposition": f'attachment; filename="{name}"'})


@router.get("/jobs/{job}/engine")
def engine(request: Request, job: JobId, to: str, model: str = "") -> Response:
    """What a download will hold, and how the engine is started with it."""
    try:
        made = exported(service_of(request), job, to, model.strip())
    except MoeplanError as error:
        return _page("engine.html", notes=[], command="", files=[], refused=str(error))
    notes = ["".join(c if c.isprintable() else "?" for c in note) for note in made.notes]
    return _page("engine.html", notes=notes, command=shlex.join(made.command), files=list(made.files), refused="")


@router.get("/jobs/{job}/export")
def export(request: Request, job: JobId, to: str, model: str = "") -> Response:
    name, content = packed(exported(service_of(request), job, to, model.strip()))
    headers = {"Content-Disposition": f'attachment; filename="{safe_name(name, "engine.json")}"'}
    return Response(content, media_type="application/octet-stream", headers=headers)


@router.get("/compare")
def compare(request: Request, a: str = "", b: str = "") -> Response:
    service = service_of(request)
    jobs = service.store.list_jobs(kind="place", limit=SHOWN)
    results = [view_of(job) for job in jobs if job.result is not None]
    sections: list[Section] = []
    problem = ""
    if a and b:
        try:
            sections = [compared(service, a, b)]
        except MoeplanError as error:
            problem = str(error)
    others = [job.id for job in results if job.id != b]
    content = {"results": results, "a": a or next(iter(others), ""), "b": b or next((j.id for j in results), "")}
    template = environment().get_template("compare.html")
    text = template.render(version=__version__, here="/compare", error=problem, sections=sections, **content)
    return HTMLResponse(text, 422 if problem else 200)


@router.get("/login")
def login_form() -> Response:
    return _page("login.html")


@router.post("/login")
async def login(request: Request) -> Response:
    """The token, once right, goes into a cookie that no script reads and no other site sends."""
    token = service_of(request).settings.token
    async with request.form(max_files=0, max_fields=2) as form:
        given = str(form.get("token", "")).strip()
    if token is None or hmac.compare_digest(given.encode(), token.encode()):
        response = RedirectResponse("/", 303)
        if token is not None:
            response.set_cookie(
                COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/"
            )
        return response
    template = environment().get_template("login.html")
    return HTMLResponse(template.render(version=__version__, here="", error="that is not the token"), 401)


@router.get("/static/{name}")
def static(name: str) -> Response:
    media = STATICS.get(name)
    if media is None:
        return _refused("there is no such file", 404)
    path: Path = plotly_file() if name == PLOTLY else STATIC / name
    return FileResponse(path, media_type=media, headers=YEAR)
