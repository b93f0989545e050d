"""Documents with something wrong in them, sent to a service."""

import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import httpx

from moeplan import place
from moeplan.spec.catalogue.published import PUBLISHED
from moeplan.spec.document import write_atomically
from moeplan.tests.hostile_mutations import mutate
from moeplan.tests.routings import chained_trace
from moeplan.tests.synthetic import cluster, tiny_model

MOST = 2**24  # bytes


def valid(folder: Path) -> dict[str, Path]:
    """A right document of every kind that is sent, by where it is sent to."""
    trace = chained_trace(0, 2, 4, 512, 1).write(folder / "trace.npz")
    config = folder / "config.json"
    text = json.dumps(PUBLISHED["mixtral"][1]).encode()
    return {
        "traces": trace,
        "clusters": cluster(tiny_model()).write(folder / "cluster.json"),
        "models": write_atomically(config, lambda f: f.write(text)),
        "placements": place(trace, devices=2, steps=50, time_limit=20).write(folder / "place.json"),
    }


def mutated(rng: random.Random, right: Path, folder: Path) -> bytes:
    """The content of a document, changed; not of what is no regular file then, which cannot be sent."""
    while True:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            path = Path(name) / right.name
            shutil.copyfile(right, path)
            mutate(rng, path)
            if not path.is_symlink() and path.is_file() and path.stat().st_size <= MOST:
                return path.read_bytes()


def send_mutated(url: str, count: int, seed: int) -> Counter[int]:
    """Answers by status. AssertionError for one that is neither kept nor refused in one line."""
    rng, found = random.Random(seed), Counter[int]()
    with tempfile.TemporaryDirectory() as name, httpx.Client(base_url=url, timeout=60) as client:
        folder = Path(name)
        (folder / "right").mkdir()
        right = valid(folder / "right")
        for i in range(count):
            collection = rng.choice(sorted(right))
            answer = client.post(f"/v1/{collection}", content=mutated(rng, right[collection], folder))
            found[answer.status_code] += 1
            assert answer.status_code in (201, 409, 413, 422), (i, collection, answer.status_code, answer.text)
            if answer.status_code != 201:
                said = answer.json()["error"]
                assert said, (i, collection)
                assert "\n" not in said, (i, collection, said)
                assert name not in said, (i, collection, said)
                assert "incoming-" not in said, (i, collection, said)
        assert client.get("/readyz").status_code == 200
    return found
