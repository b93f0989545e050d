"""One service as a client reaches it: requests tried again, documents sent once, jobs followed to their end."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from ..spec.document import show
from ..spec.errors import MoeplanError
from .extra import check_service

if TYPE_CHECKING:
    import httpx

PIECE = 2**20
MAX_ANSWER = 256 * 2**20
AGAIN = (429, 503)  # statuses after which the same request may succeed
FIRST = 3.0  # seconds for which a service is waited for that has not answered before
PAUSE = 0.5  # seconds between looks at a job, and before a request is tried again


class Connection:
    """Raises MoeplanError, in one line, for what the service refuses, and where it does not answer."""

    def __init__(self, url: str, token: str | None, patience: float) -> None:
        check_service("httpx")
        import httpx

        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError):
            parsed = httpx.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise MoeplanError(f"server {show(url)}: expected a URL such as http://127.0.0.1:8321")
        token = token or os.environ.get("MOEPLAN_TOKEN") or None
        self._met = False  # whether it has answered before
        self.url, self.patience = str(parsed).rstrip("/"), patience
        try:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(60.0, connect=5.0))
        except UnicodeEncodeError:
            raise MoeplanError("the token: expected printable ASCII characters") from None

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> Any:
        return self._request("GET", path, params=query).json()

    # Documents

    def send(self, collection: str, content: bytes, name: str) -> str:
        """The digest of a document that the service has then."""
        digest = hashlib.sha256(content).hexdigest()
        if self._known(digest):
            return digest
        sent: str = self._request("POST", f"/v1/{collection}", params={"name": name}, content=content).json()["digest"]
        return sent

    def send_file(self, collection: str, path: Path) -> str:
        """The same of a file, which is not read into memory as a whole."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self._known(digest):
            return digest
        given: dict[str, Any] = {"params": {"name": path.name}, "headers": {"Content-Length": str(path.stat().st_size)}}
        sent: str = self._request("POST", f"/v1/{collection}", content=lambda: _pieces(path), **given).json()["digest"]
        return sent

    def _known(self, digest: str) -> bool:
        return self._request("HEAD", f"/v1/documents/{digest}", missing=True).status_code == 200

    # Jobs

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        job: dict[str, Any] = self._request("POST", "/v1/jobs", json=question).json()
        return job

    def cancel(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self._request("DELETE", f"/v1/jobs/{job}").json()
        return found

    def follow(self, job: str, on_event: Callable[[dict[str, Any]], None] | None, stop: Event | None) -> dict[str, Any]:
        """The job once it is over; on_event hears of its progress. stop, or Ctrl-C, asks for the best found so far."""
        stopped, told = False, -1
        while True:
            try:
                found: dict[str, Any] = self.get(f"/v1/jobs/{job}")
                if on_event is not None and found["progress"] and found["progress"] != told:
                    told = found["progress"]
                    on_event({name: value for name, value in told.items() if name != "points"})
                elif on_event is not None and found["state"] == "queued":
                    on_event({"what": "waiting for a worker"})
                if found["state"] in ("done", "failed", "cancelled"):
                    return found
                if stop is not None and stop.is_set() and not stopped:
                    stopped = True
                    self._stop(job)
                time.sleep(PAUSE)
            except KeyboardInterrupt:
                if stopped:
                    raise
                stopped = True
                self._stop(job)

    def _stop(self, job: str) -> None:
        try:
            self.cancel(job)
        except MoeplanError:
            self.get(f"/v1/jobs/{job}")  # it has ended meanwhile; any other trouble is told here

    def result(self, job: str) -> str:
        with self._http.stream("GET", f"/v1/jobs/{job}/result") as answer:
            content = bytearray()
            for piece in answer.iter_bytes():
                content += piece
                if len(content) > MAX_ANSWER:
                    raise MoeplanError(f"{self.url}: an answer of more than {MAX_ANSWER >> 20} MiB, refused")
        text = content.decode(errors="replace")
        if answer.status_code != 200:
            raise MoeplanError(_line(text, answer.status_code))
        return text

    def _request(
        self, method: str, path: str, *, missing: bool = False, content: Any = None, **rest: Any
    ) -> "httpx.Response":
        """An answer; tried again for ``patience`` seconds where there is none, or one that says to ask again.

        missing: that nothing is there is an answer too. content: bytes, or what makes an iterator of them.
        """
        import httpx

        until = time.monotonic() + (self.patience if self._met else min(self.patience, FIRST))
        while True:
            try:
                body = content() if callable(content) else content
                answer = self._http.request(method, path, content=body, **rest)
            except httpx.HTTPError as error:
                if time.monotonic() + PAUSE > until:
                    reason = str(error) or type(error).__name__
                    raise MoeplanError(f"{self.url}: does not answer ({reason}); is `moeplan serve` running?") from None
                time.sleep(PAUSE)
                continue
            self._met = True
            if answer.status_code in AGAIN and time.monotonic() + PAUSE < until:
                time.sleep(PAUSE)
                continue
            if answer.is_success or (missing and answer.status_code == 404):
                return answer
            raise MoeplanError(_line(answer.text, answer.status_code))


def _line(text: str, status: int) -> str:
    """What the service says, of an answer that is an error."""
    try:
        said = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        said = f"the server answered with status {status}: it may be no moeplan service"
    return f"{said} (--token-file, or MOEPLAN_TOKEN)" if status == 401 else str(said)


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece
