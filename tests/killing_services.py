"""Services and workers killed at random moments, and what must hold afterwards."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from moeplan.tests.services import PATIENCE, Served


@dataclass
class Kills:
    """A store, the question that each job asks with a seed of its own, and moments drawn by ``seed``.

    options: of ``moeplan serve``. Of every kill: a job is asked, and after a random part of ``longest`` seconds the
    service or one of its workers is killed.
    """

    store: str
    question: dict
    seed: int
    longest: float = 1.5
    options: Sequence[str] = ()
    killed: Counter = field(default_factory=Counter)
    jobs: list[str] = field(default_factory=list)

    def run(self, count: int, trace: Path) -> dict[str, int]:
        """Jobs by how they ended. AssertionError where one was lost, ended twice, or has no answer or reason."""
        draw = random.Random(self.seed)
        service = self._started(trace)
        try:
            for i in range(count):
                self.jobs.append(self._asked(service, i))
                time.sleep(draw.random() * self.longest)
                victims = service.workers() if draw.random() < 0.5 else []
                if victims:
                    with suppress(ProcessLookupError):
                        os.kill(draw.choice(victims), signal.SIGKILL)
                    self.killed["worker"] += 1
                else:
                    service.process.kill()
                    service.process.communicate()
                    self.killed["service"] += 1
                    service = self._started(trace)
            return self._checked(service)
        finally:
            service.process.kill()
            service.process.communicate()

    def _started(self, trace: Path) -> Served:
        service = Served(self.store, "--patience", "3", *self.options)
        answer = httpx.post(f"{service.url}/v1/traces", content=trace.read_bytes(), timeout=60)
        assert answer.status_code == 201, answer.text
        self.question["trace"] = answer.json()["digest"]
        return service

    def _asked(self, service: Served, seed: int) -> str:
        answer = httpx.post(f"{service.url}/v1/jobs", json=self.question | {"seed": seed}, timeout=60)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def _checked(self, service: Served) -> dict[str, int]:
        ended, until = Counter[str](), time.monotonic() + PATIENCE + 10 * len(self.jobs)
        with httpx.Client(base_url=service.url, timeout=60) as client:
            for job in self.jobs:
                while (found := client.get(f"/v1/jobs/{job}").json())["state"] in ("queued", "running"):
                    assert time.monotonic() < until, found
                    time.sleep(0.1)
                ended[found["state"]] += 1
                answer = client.get(f"/v1/jobs/{job}/result")
                if found["state"] == "done":
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["kind"] == "moeplan.placement"
                else:
                    assert found["state"] == "failed", found
                    assert "ended without an answer" in found["error"] or "was lost at each" in found["error"]
            listed = client.get("/v1/jobs", params={"limit": 1000}).json()["jobs"]
            assert sorted(job["id"] for job in listed) == sorted(self.jobs)
        return dict(ended)
