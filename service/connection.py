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
JOB = ("id", "state", "progress", "result", "error")  # what is read of a job
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
            parsed.host.encode("idna")  # as it is looked up
        except (httpx.InvalidURL, TypeError, UnicodeError):
            parsed = httpx.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
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

    def get(self, path: str, *needed: str) -> dict[str, Any]:
        """An answer that is an object with these fields."""
        return self._object(self._request("GET", path), *needed)

    # Documents

    def send(self, collection: str, content: bytes, name: str) -> str:
        """The digest of a document that the service has then."""
        digest = hashlib.sha256(content).hexdigest()
        if self._known(digest):
            return digest
        return self._sent(self._request("POST", f"/v1/{collection}", params={"name": name}, content=content))

    def send_file(self, collection: str, path: Path) -> str:
        """The same of a file, which is not read into memory as a whole."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self._known(digest):
            return digest
        given: dict[str, Any] = {"params": {"name": path.name}, "headers": {"Content-Length": str(path.stat().st_size)}}
        return self._sent(self._request("POST", f"/v1/{collection}", content=lambda: _pieces(path), **given))

    def _sent(self, answer: "httpx.Response") -> str:
        return str(self._object(answer, "digest")["digest"])

    def _known(self, digest: str) -> bool:
        return self._request("HEAD", f"/v1/documents/{digest}", missing=True).status_code == 200

    # Jobs

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        return self._object(self._request("POST", "/v1/jobs", json=question), *JOB)

    def cancel(self, job: str) -> dict[str, Any]:
        return self._object(self._request("DELETE", f"/v1/jobs/{job}"), *JOB)

    def follow(self, job: str, on_event: Callable[[dict[str, Any]], None] | None, stop: Event | None) -> dict[str, Any]:
        """The job once it is over; on_event hears of its progress. stop, or Ctrl-C, asks for the best found so far."""
        stopped, told = False, -1
        while True:
            try:
                found = self.get(f"/v1/jobs/{job}", *JOB)
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
        """The answer, whole; fetched again where the service is lost on the way."""
        import httpx

        until = self._until()
        while True:
            try:
                status, text = self._fetched(f"/v1/jobs/{job}/result")
            except httpx.HTTPError as error:
                self._wait(until, error)
                continue
            if status in AGAIN and time.monotonic() + PAUSE < until:
                time.sleep(PAUSE)
                continue
            if status != 200:
                raise MoeplanError(_line(text, status))
            return text

    def _fetched(self, path: str) -> tuple[int, str]:
        content = bytearray()
        with self._http.stream("GET", path) as answer:
            for piece in answer.iter_bytes():
                content += piece
                if len(content) > MAX_ANSWER:
                    raise MoeplanError(f"{self.url}: an answer of more than {MAX_ANSWER >> 20} MiB, refused")
        return answer.status_code, content.decode(errors="replace")

    def _request(
        self, method: str, path: str, *, missing: bool = False, content: Any = None, **rest: Any
    ) -> "httpx.Response":
        """An answer; tried again for ``patience`` seconds where there is none, or one that says to ask again.

        missing: that nothing is there is an answer too. content: bytes, or what makes an iterator of them.
        """
        import httpx

        until = self._until()
        while True:
            try:
                body = content() if callable(content) else content
                answer = self._http.request(method, path, content=body, **rest)
            except httpx.HTTPError as error:
                self._wait(until, error)
                continue
            self._met = True
            if answer.status_code in AGAIN and time.monotonic() + PAUSE < until:
                time.sleep(PAUSE)
                continue
            if answer.is_success or (missing and answer.status_code == 404):
                return answer
            raise MoeplanError(_line(answer.text, answer.status_code))

    def _until(self) -> float:
        """When to give up a service that does not answer from now on."""
        return time.monotonic() + (self.patience if self._met else min(self.patience, FIRST))

    def _wait(self, until: float, error: Exception) -> None:
        """Before the next try. Raises MoeplanError where it is too late for one."""
        if time.monotonic() + PAUSE > until:
            reason = str(error) or type(error).__name__
            raise MoeplanError(f"{self.url}: does not answer ({reason}); is `moeplan serve` running?") from None
        time.sleep(PAUSE)

    def _object(self, answer: "httpx.Response", *needed: str) -> dict[str, Any]:
        """The answer's JSON. Raises MoeplanError where something else than moeplan answers at this URL."""
        try:
            found = answer.json()
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not all(name in found for name in needed):
            raise MoeplanError(f"{self.url}: something answers there that is no moeplan service: check the URL")
        return found


def _line(text: str, status: int) -> str:
    """What the service says, of an answer that is an error."""
    try:
        said = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        said = f"the server answered with status {status}: it may be no moeplan service"
    if (status, said) == (404, "Not Found"):
        return "the server has nothing there: check the URL, which ends in the port where no proxy adds a path"
    return f"{said} (--token-file, or MOEPLAN_TOKEN)" if status == 401 else str(said)


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece
