"""``moeplan serve``: the planner as a service."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import note, say
from ..extra import NEEDED, check_service

if TYPE_CHECKING:
    from ..jobs.pool import Pool


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes any free one.")] = 8321,
    store: Annotated[
        str | None,
        typer.Option(
            help="Folder of jobs and documents, or postgresql+psycopg://USER@HOST/DATABASE; by default yours."
        ),
    ] = None,
    documents: Annotated[
        str | None, typer.Option(help="Folder or fsspec URL (s3://...) of documents; by default in the store's folder.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Jobs that run at a time.")] = 2,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run jobs on this Ray cluster (extra `ray`); `local` starts one here."),
    ] = None,
    patience: Annotated[
        float,
        typer.Option(min=1, max=3600, help="Seconds after which another service on this store is given up as lost."),
    ] = 15.0,
    token_file: Annotated[
        Path | None, typer.Option(help="File of the token that requests must carry; or the variable MOEPLAN_TOKEN.")
    ] = None,
) -> None:
    """Take questions over HTTP and answer them as jobs that survive: after a restart they go on. Ctrl-C ends it.

    Example: `moeplan serve --store ./jobs`

    Then: `moeplan --server http://127.0.0.1:8321 place --trace trace.npz`
    """
    check_service(*NEEDED)
    from ..http.observed import log_lines
    from ..http.serve import serve as listen
    from ..jobs.settings import Settings, default_store, read_token

    place = str(default_store()) if store is None else store
    settings = Settings(place, documents, host, port, workers, read_token(token_file), patience=patience)
    settings.check()
    log_lines()

    def started(url: str) -> None:
        say(f"serving at {url}; jobs in {shown(place)}; Ctrl-C ends it, and the next start goes on")

    listen(settings, started, _ray_pool(ray) if ray is not None else None)
    note("ended; jobs that wait or ran go on at the next start")


def _ray_pool(address: str) -> "Pool":
    """Imported when it is asked for: Ray takes seconds."""
    from ..jobs.ray_pool import RayPool

    return RayPool(address)


def shown(store: str) -> str:
    """The store without a password."""
    before, found, after = store.partition("://")
    return f"{before}://{after.rpartition('@')[2]}" if found else store
