"""Jobs on a Ray cluster (extra ``ray``): an actor on some node has a ``LocalRun`` there, and is asked from here.

Documents travel as bytes and everything else as JSON. Whoever can reach a Ray cluster can run code on it: keep it to
yourself.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ...spec.errors import MoeplanError
from .pool import LocalRun, Outcome, Run, Work

DIED = "with the Ray node or actor that it ran on"


class Remote:
    """What the actor does, on its node."""

    def __init__(self, request: str, documents: dict[str, bytes]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="moeplan-run-"))
        paths = {}
        for name, content in documents.items():
            paths[name] = self.folder / f"document-{name}"
            paths[name].write_bytes(content)
        self.run = LocalRun(Work(json.loads(request), paths, self.folder))

    def wait(self, seconds: float) -> tuple[str, bytes | None]:
        """JSON of what was told, and of how it ended; the answer."""
        told, outcome, answer = self.run.wait(seconds), self.run.outcome, None
        ended: dict[str, Any] | None = None
        if outcome is not None:
            ended = {"error": outcome.error, "died": outcome.died, "log": outcome.log}
            answer = outcome.result.read_bytes() if outcome.result is not None else None
            shutil.rmtree(self.folder, ignore_errors=True)
        return json.dumps({"told": told, "ended": ended}), answer

    def stop(self) -> None:
        self.run.stop()

    def kill(self) -> None:
        self.run.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class RayPool:
    """Each run takes one processor of the cluster; one that finds none free waits there."""

    def __init__(self, address: str) -> None:
        """address: as of ``ray.init``, such as ``auto`` or ``ray://HOST:10001``; ``local`` starts a cluster here.

        Raises MoeplanError where Ray is missing, or no cluster answers.
        """
        try:
            import ray
        except ImportError:
            raise MoeplanError("--ray: Ray is not installed: pip install 'moeplan[ray]'") from None
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
        except (ConnectionError, RuntimeError, ValueError, TypeError) as error:
            raise MoeplanError(f"--ray {address}: no cluster answers ({error})") from None
        self.ray = ray
        self.actor = ray.remote(num_cpus=1, max_restarts=0)(Remote)

    def start(self, work: Work) -> Run:
        documents = {name: path.read_bytes() for name, path in work.paths.items()}
        return RayRun(self.ray, self.actor.remote(json.dumps(work.request), documents), work.folder)

    def close(self) -> None:
        self.ray.shutdown()


class RayRun:
    """One job on the cluster."""

    def __init__(self, ray: Any, actor: Any, folder: Path) -> None:
        self._ray, self._actor, self._folder = ray, actor, folder
        self._asked: Any = None
        self._outcome: Outcome | None = None

    def wait(self, seconds: float) -> list[dict[str, Any]]:
        if self._asked is None:
            self._asked = self._actor.wait.remote(seconds)
        try:
            ready, _ = self._ray.wait([self._asked], timeout=seconds)
            if not ready:  # it waits for a processor, or its node is slow
                return []
            text, answer = self._ray.get(self._asked)
        except self._ray.exceptions.RayError as error:
            self._outcome = Outcome(died=f"{DIED} ({type(error).__name__})")
            return []
        self._asked = None
        said = json.loads(text)
        if said["ended"] is not None:
            self._end(said["ended"], answer)
        told: list[dict[str, Any]] = said["told"]
        return told

    @property
    def outcome(self) -> Outcome | None:
        return self._outcome

    def stop(self) -> None:
        self._actor.stop.remote()

    def kill(self) -> None:
        self._actor.kill.remote()
        self._ray.kill(self._actor)
        self._outcome = self._outcome or Outcome(died="killed")

    def _end(self, ended: dict[str, Any], answer: bytes | None) -> None:
        result = None
        if answer is not None:
            result = self._folder / "result"
            result.write_bytes(answer)
        self._outcome = Outcome(result=result, **ended)
        self._ray.kill(self._actor)
