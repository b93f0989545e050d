"""Does the service keep its promises? Generated requests, mutated documents, many clients, kills at random moments.

    python -m moeplan.benchmarks.service [--requests 5000] [--documents 10000] [--clients 50] [--seconds 120]
        [--kills 200] [--seed 0] [--databases sqlite,postgresql] [--output FILE.md]

Everything stays on this machine's loopback address and in temporary folders; PostgreSQL is started for it. Each line of
the table is one promise:

- requests that schemathesis makes of the service's own schema are answered as the schema says, without a server error;
- a document with something wrong in it is refused in one line or kept, never a server error, and the service stays
  ready;
- clients that ask, watch and fetch at the same time each get the answer to their own question;
- a service or one of its workers is killed at a random moment, and every job that was accepted ends once.

Prints a Markdown table; the exit code is 1 where a promise was broken.
"""

import argparse
import contextlib
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx

from moeplan.benchmarks.hardware import processor
from moeplan.spec.document import write_atomically
from moeplan.tests.killing_services import Kills
from moeplan.tests.mutated_documents import send_mutated
from moeplan.tests.postgresql import server
from moeplan.tests.routings import chained_trace
from moeplan.tests.services import finished, threaded

QUESTION = {"kind": "place", "devices": 2, "steps": 100, "time_limit": 20}
OPERATIONS = 16  # of the schema, about: what is asked of each is the total over it


class Line(NamedTuple):
    """A line of the table; wrong: what broke, as text, or nothing."""

    promise: str
    database: str
    tried: str
    found: str
    seconds: float
    wrong: str = ""


def generated(url: str, count: int, trace: Path) -> tuple[str, str]:
    from moeplan.tests import generated_requests

    digest = sent(url, trace)
    answers = generated_requests.run(url, -(-count // OPERATIONS), digest)
    by_status = Counter[str]()
    for name, times in answers.items():
        by_status[name.rpartition(" ")[2]] += times
    bad = [name for name in answers if name.rpartition(" ")[2].startswith("50") and not name.endswith("503")]
    assert not bad, bad
    return f"{answers.total():,} requests", ", ".join(
        f"{times:,} x {status}" for status, times in sorted(by_status.items())
    )


def mutated(url: str, count: int, seed: int) -> tuple[str, str]:
    found = send_mutated(url, count, seed)
    return f"{count:,} documents", counted(found)


def counted(found: Counter) -> str:
    """Answers by status, as text."""
    return ", ".join(f"{times:,} x {status}" for status, times in sorted(found.items()))


def clients(url: str, count: int, seconds: float, trace: Path) -> tuple[str, str]:
    """So many clients, each with a question of its own every time, as fast as they are answered."""
    digest, until = sent(url, trace), time.monotonic() + seconds

    def ask(client: int) -> int:
        asked = 0
        with httpx.Client(base_url=url, timeout=120) as http:
            while time.monotonic() < until:
                # Every second one has been asked before.
                seed = client * 1_000_000 + asked // 2
                answer = http.post("/v1/jobs", json=QUESTION | {"trace": digest, "seed": seed})
                assert answer.status_code == (201 if asked % 2 == 0 else 200), answer.text
                job = finished(http, answer.json()["id"])
                assert job["state"] == "done", job
                result = http.get(f"/v1/jobs/{job['id']}/result")
                assert result.status_code == 200, result.text
                assert result.json()["seed"] == seed
                asked += 1
        return asked

    with ThreadPoolExecutor(count) as pool:
        asked = list(pool.map(ask, range(count)))
    return f"{count} clients, {seconds:.0f} s", f"{sum(asked):,} answers, {min(asked)} to {max(asked)} for each"


def killed(store: str, options: Sequence[str], count: int, seed: int, trace: Path) -> tuple[str, str]:
    kills = Kills(store, dict(QUESTION), seed, options=options)
    ended = kills.run(count, trace)
    what = ", ".join(f"{times} x {name}" for name, times in sorted(kills.killed.items()))
    return f"{count} kills ({what})", ", ".join(f"{times} {state}" for state, times in sorted(ended.items()))


def sent(url: str, trace: Path) -> str:
    answer = httpx.post(f"{url}/v1/traces", content=trace.read_bytes(), timeout=60)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["digest"])


@contextlib.contextmanager
def database(name: str, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A store's name, and what else a service on it needs."""
    folder.mkdir()
    if name == "sqlite":
        yield str(folder / "jobs"), {}
        return
    with server() as url:
        yield url, {"documents": str(folder / "documents")}


def measure(options: argparse.Namespace, folder: Path, show: Callable[[Line], None]) -> list[Line]:
    trace, lines = chained_trace(0, 2, 4, 512, 1).write(folder / "trace.npz"), []
    for name in options.databases.split(","):
        with database(name, folder / name) as (store, more):

            def run(promise: str, work: Callable[[], tuple[str, str]], name: str = name) -> None:
                began = time.monotonic()
                try:
                    tried, found, wrong = *work(), ""
                except Exception as error:
                    tried, found, wrong = "-", "-", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                lines.append(Line(promise, name, tried, found, time.monotonic() - began, wrong))
                show(lines[-1])

            with threaded(store, workers=2, max_queued=10**6, **more) as url:
                if options.requests:
                    run("answers are those of the schema", lambda: generated(url, options.requests, trace))
                if options.documents:
                    run("wrong documents are refused", lambda: mutated(url, options.documents, options.seed))
                if options.clients:
                    run("each client has its answer", lambda: clients(url, options.clients, options.seconds, trace))
        if options.kills:
            with database(name, folder / f"{name}-kills") as (store, more):
                words = [word for key, value in more.items() for word in (f"--{key}", value)]
                run("every job ends once", partial(killed, store, words, options.kills, options.seed, trace))
    return lines


def table(lines: list[Line], argv: Sequence[str]) -> str:
    rows = [
        f"| {' | '.join((line.promise, line.database, line.tried, line.found))} | {line.seconds:.0f} "
        f"| {line.wrong or 'kept'} |"
        for line in lines
    ]
    command = shlex.join(["python", "-m", "moeplan.benchmarks.service", *argv])
    return "\n".join(
        [
            f"`{command}` on {processor()}, {time.strftime('%Y-%m-%d')}.",
            "",
            "| promise | database | tried | found | s | kept |",
            "|---|---|---|---|--:|---|",
            *rows,
            "",
        ]
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"requests": 5000, "documents": 10_000, "clients": 50, "kills": 200, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="moeplan-service-") as folder:
        lines = measure(options, Path(folder), lambda line: print(*line, sep="; ", file=sys.stderr, flush=True))
    text = table(lines, argv)
    print(text)
    if options.output:
        write_atomically(options.output, lambda f: f.write(text.encode()))
    return int(any(line.wrong for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
