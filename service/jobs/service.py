"""The service without its doors: documents are taken in, questions are accepted, answers are found."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...spec.cluster import Cluster
from ...spec.document import Document
from ...spec.errors import DocumentError, MoeplanError
from ...spec.files import MAX_DOCUMENT_BYTES
from ...spec.placement import Placement
from ...spec.trace import Trace
from .database import Database
from .errors import ConflictError, UnavailableError, UnknownError
from .files import Files, Folder, Incoming, Remote, private, renamed
from .pool import LocalPool, Pool
from .requests import DOCUMENTS, Asked, ExplainRequest, check_model
from .settings import Settings
from .store import Job, Store, StoredDocument
from .supervisor import Supervisor

KINDS = ("cluster", "trace", "model", "placement")
"""Of documents that are sent."""
_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass
class Service:
    """``open``, then ``supervisor.start()`` if it is to work, and ``close``."""

    settings: Settings
    store: Store
    files: Files
    folder: Path
    supervisor: Supervisor

    @classmethod
    def open(cls, settings: Settings, pool: Pool | None = None) -> "Service":
        """The store is made, or brought up to date. Raises MoeplanError where it cannot be used."""
        settings.check()
        if settings.by_url:
            database = Database.postgresql(settings.store)
            folder = Path(tempfile.mkdtemp(prefix="moeplan-service-"))
        else:
            folder = private(Path(settings.store).expanduser())
            database = Database.sqlite(folder / "jobs.sqlite")
        database.migrate()
        files: Files
        if settings.documents is not None and "://" in settings.documents:
            files = Remote(settings.documents)
        else:
            place = Path(settings.documents).expanduser() if settings.documents else folder / "documents"
            files = Folder(private(place))
        work = folder / "work" if not settings.by_url else folder
        work.mkdir(mode=0o700, exist_ok=True)
        store = Store(database, settings.max_queued)
        supervisor = Supervisor(
            store,
            files,
            pool or LocalPool(),
            work,
            workers=settings.workers,
            grace=settings.grace,
            patience=settings.patience,
        )
        return cls(settings, store, files, work, supervisor)

    def close(self) -> None:
        """End cleanly: what runs is queued again."""
        if self.supervisor.alive:
            self.supervisor.close()
        self.store.database.close()
        if self.settings.by_url:
            shutil.rmtree(self.folder, ignore_errors=True)

    # Documents

    def incoming(self, kind: str) -> Incoming:
        """A file to receive. Raises UnavailableError where the disk is full."""
        self.files.room()
        limit = self.settings.max_upload if kind == "trace" else min(MAX_DOCUMENT_BYTES, self.settings.max_upload)
        return Incoming(self.folder, limit)

    def take_in(self, kind: str, incoming: Incoming, name: str, executed: bool = False) -> StoredDocument:
        """Read what was received with the reader of its kind, and keep it. Raises DocumentError in its one line.

        name: what messages and lists call it. executed: a model's configuration is read as it is measured and run.
        """
        digest, name = incoming.complete(), plain_name(name) or kind
        try:
            content = _content(kind, incoming.path, name, executed)
        except MoeplanError as error:
            raise type(error)(renamed(str(error), incoming.path, name)) from None
        if isinstance(content, str):
            self.files.keep(incoming.path, digest)
            return self.store.add_document(digest, kind, name, content, incoming.size)
        with self.incoming(kind) as made:  # a configuration is kept as the Model that was read from it
            made.write(content.to_json().encode())
            digest = made.complete()
            self.files.keep(made.path, digest)
            return self.store.add_document(digest, kind, name, content.digest(), made.size)

    @contextmanager
    def opened(self, digest: str) -> Iterator[BinaryIO]:
        """The content of a document. Raises UnknownError where it is not there, or damaged."""
        with self._fetched(digest) as path, open(path, "rb") as file:
            yield file

    @contextmanager
    def _fetched(self, digest: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="read-", dir=self.folder) as name:
            yield self.files.fetch(digest, Path(name))

    # Questions and answers

    def ask(self, request: Asked) -> tuple[Job, bool]:
        """The job that answers it, and whether it is new. Raises MoeplanError for what names nothing that is here."""
        from ... import __version__

        if isinstance(model := getattr(request, "model", None), str):
            check_model(model)
        for name, digest in request.documents().items():
            try:
                self.store.document(digest, DOCUMENTS[name])
            except UnknownError as error:
                raise UnknownError(f"{name}: {error}") from None
        if isinstance(request, ExplainRequest) and request.trace is None:
            request = request.model_copy(update={"trace": self._fitted(request.placement)})
        self.files.room()
        body = request.model_dump(mode="json")
        return self.store.submit(body["kind"], body, salt=__version__)

    def _fitted(self, placement: str) -> str:
        """Digest of the trace that a placement was fitted on."""
        with self._fetched(placement) as path:
            source = Placement.read(path).trace
        found = self.store.document_of_content("trace", source.digest) if source.digest else None
        if found is None:
            raise MoeplanError("trace: the one that the placement was fitted on is not here; send it, and name it")
        return found.digest

    def answered(self, job: str) -> str:
        """Digest of a job's answer. Raises ConflictError where it has none (yet)."""
        found = self.store.job(job)
        if found.result is None:
            why = f": {found.error}" if found.error else ""
            raise ConflictError(f"job {job}: it is {found.state} and has no result{why}")
        return found.result

    def ready(self) -> None:
        """Raise UnavailableError where nothing could be accepted."""
        self.store.counts()
        self.files.room()
        if not self.supervisor.alive:
            raise UnavailableError("the workers are not running")


def plain_name(name: str) -> str:
    """Letters, digits, dots and dashes of the last part of a path, at most 100."""
    return _NAME.sub("-", os.path.basename(name.replace("\\", "/"))).strip(".-")[:100]


def _content(kind: str, path: Path, name: str, executed: bool) -> str | Document:
    """The document's own digest; of a configuration the Model instead. Raises DocumentError."""
    if kind == "trace":
        return Trace.read(path).digest()
    if kind == "cluster":
        return Cluster.read(path).digest()
    if kind == "placement":
        return Placement.read(path).digest()
    if kind == "model":
        from ...spec.catalogue import load_model
        from ...spec.catalogue.executed import load_executed

        stem = name.removesuffix(".json")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            link = Path(folder) / f"{stem if stem != 'config' else 'model'}.json"
            link.symlink_to(path)
            try:
                return load_executed(str(link)) if executed else load_model(str(link))
            except MoeplanError as error:
                raise type(error)(renamed(str(error), link, name)) from None
    raise DocumentError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
