"""The service over HTTP: what is taken, what is refused and in which words, and that nothing accepted is lost."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi")
from sqlalchemy import text

from moeplan import Placement, Plan, Trace, place
from moeplan.planner.export import export
from moeplan.planner.place.explain import explain
from moeplan.service.http import guard
from moeplan.service.http.guard import Rates
from moeplan.service.jobs import files as files_module
from moeplan.service.jobs.database import Database
from moeplan.service.jobs.settings import Settings, is_loopback, read_token
from moeplan.spec.catalogue import load_model
from moeplan.spec.errors import MoeplanError
from moeplan.tests.routings import chained_trace
from moeplan.tests.services import events, finished, in_process
from moeplan.tests.synthetic import cluster, tiny_model

TOKEN = "a-token-of-this-test-alone"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with in_process(tmp_path_factory.mktemp("store") / "jobs") as found:
        yield found


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chained_trace(0, 4, 8, 768, 2).write(tmp_path_factory.mktemp("trace") / "trace.npz")


@pytest.fixture(scope="module")
def sent(client: httpx.Client, trace: Path) -> str:
    answer = client.post("/v1/traces", params={"name": "../../etc/my trace.npz"}, content=trace.read_bytes())
    assert answer.status_code == 201, answer.text
    body = answer.json()
    assert body["digest"] == hashlib.sha256(trace.read_bytes()).hexdigest()
    assert body["name"] == "my-trace.npz"
    return str(body["digest"])


@pytest.fixture(scope="module")
def placed(client: httpx.Client, sent: str) -> dict:
    answer = client.post("/v1/jobs", json=question(sent))
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    found = finished(client, answer.json()["id"])
    assert found["state"] == "done", found
    return found


def question(trace: str, **changes: object) -> dict:
    return {"kind": "place", "trace": trace, "devices": 2, "fit": [0, 0.5], "steps": 200, "time_limit": 30} | changes


def error(answer: httpx.Response, status: int) -> str:
    """The one line of an answer that is an error."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert "\n" not in body["error"]
    assert "Traceback" not in body["error"]
    return str(body["error"])


def test_a_placement_is_the_librarys(client: httpx.Client, placed: dict, trace: Path) -> None:
    answer = client.get(f"/v1/jobs/{placed['id']}/result")
    mine = Placement.parse(answer.text, "the answer")
    theirs = place(trace, devices=2, fit=(0, 0.5), steps=200, time_limit=30)
    assert mine.layers == theirs.layers
    assert mine.scores == theirs.scores
    assert hashlib.sha256(answer.content).hexdigest() == placed["result"]
    assert placed["progress"]["incumbent"] == mine.solver.objective
    assert placed["progress"]["bound"] == mine.solver.bound


def test_the_same_question_is_answered_at_once(client: httpx.Client, placed: dict, sent: str) -> None:
    again = client.post("/v1/jobs", json=question(sent))
    assert again.status_code == 200
    assert again.json()["id"] == placed["id"]
    assert again.json()["state"] == "done"


def test_a_result_is_a_document_for_what_follows(client: httpx.Client, tmp_path: Path) -> None:
    trace = chained_trace(0, 2, 4, 512, 1).write(tmp_path / "trace.npz")
    digest = client.post("/v1/traces", content=trace.read_bytes()).json()["digest"]
    placed = finished(client, client.post("/v1/jobs", json=question(digest)).json()["id"])
    mine = Placement.parse(client.get(f"/v1/documents/{placed['result']}").text, "the answer")
    asked = client.post("/v1/jobs", json={"kind": "explain", "placement": placed["result"]})
    assert finished(client, asked.json()["id"])["state"] == "done"
    found = client.get(f"/v1/jobs/{asked.json()['id']}/result").json()
    assert found["explanation"] == json.loads(json.dumps(explain(mine, Trace.read(trace)).to_dict()))


def test_an_export_has_the_engines_files(client: httpx.Client, tmp_path: Path) -> None:
    model = load_model("tiny-moe")
    wanted = place(Path(__file__).parents[1] / "examples/tiny_moe/trace.npz", devices=4, steps=50, time_limit=30)
    digest = client.post("/v1/placements", content=wanted.to_json()).json()["digest"]
    asked = {"kind": "export", "placement": digest, "to": "megatron", "model": "tiny-moe"}
    job = finished(client, client.post("/v1/jobs", json=asked).json()["id"])
    assert job["state"] == "done", job
    body = client.get(f"/v1/jobs/{job['id']}/result").json()
    assert body["files"] == export(wanted, "megatron", model).files
    wrong = asked | {"to": "nothing"}
    job = finished(client, client.post("/v1/jobs", json=wrong).json()["id"])
    assert job["state"] == "failed"
    assert "engine 'nothing': unknown" in job["error"]
    assert "it is failed and has no result: engine" in error(client.get(f"/v1/jobs/{job['id']}/result"), 409)


def test_a_plan_for_a_model_that_was_sent(client: httpx.Client, sent: str) -> None:
    machines = client.post("/v1/clusters", content=cluster(tiny_model()).to_json()).json()
    model = client.post("/v1/models?executed=true", content=tiny_model().to_json()).json()
    asked = {"kind": "solve", "model": model["digest"], "cluster": machines["digest"], "workload": "prefill:64@16"}
    job = finished(client, client.post("/v1/jobs", json=asked | {"trace": sent, "time_limit": 30}).json()["id"])
    assert job["state"] == "done", job
    plan = Plan.parse(client.get(f"/v1/jobs/{job['id']}/result").text, "the answer")
    assert plan.model.name == tiny_model().name
    assert plan.routing.kind == "trace"
    assert plan.routing.path == ""  # nothing of where it lies here


def test_events_tell_the_job_to_its_end(client: httpx.Client, sent: str) -> None:
    job = client.post("/v1/jobs", json=question(sent, seed=1)).json()["id"]
    told = list(events(client, job))
    assert [name for name, _ in told[:-1]] == ["progress"] * (len(told) - 1)
    name, last = told[-1]
    assert (name, last["state"]) == ("end", "done")
    assert last["progress"]["points"][-1][1:] == [last["progress"]["incumbent"], last["progress"]["bound"]]


@pytest.mark.parametrize(
    ("collection", "content", "said"),
    [
        ("traces", b"PK\x03\x04", "trace.npz: not a readable npz"),
        ("clusters", b"{", "cluster.json: not JSON"),
        ("clusters", b'{"kind": "moeplan.plan"}', "cluster.json: kind: expected 'moeplan.cluster'"),
        ("placements", b'{"kind": "moeplan.placement", "version": 99}', "version: this moeplan reads"),
        ("models", b"[]", "model.json: expected a JSON object"),
        ("models", b'{"model_type": "mixtral"}', "model.json: "),
        ("models", b"\xff", "model.json: cannot be read as UTF-8 text"),
    ],
)
def test_what_the_readers_refuse(client: httpx.Client, collection: str, content: bytes, said: str) -> None:
    known = client.get("/v1/documents").json()
    assert said in error(client.post(f"/v1/{collection}", content=content), 422)
    assert client.get("/v1/documents").json() == known


def test_a_trace_with_objects_is_refused(client: httpx.Client, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", expert_ids=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    said = error(client.post("/v1/traces", content=(tmp_path / "bad.npz").read_bytes()), 422)
    assert "no plain array" in said
    assert str(tmp_path) not in said


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"trace": "0" * 64}, 404, "trace: document 0000000000000000: unknown; send it first"),
        ({"trace": "../x"}, 422, "trace: String should match pattern"),
        ({"devices": 0}, 422, "devices: Input should be greater than or equal to 1 (got 0)"),
        ({"device": 4}, 422, "device: Extra inputs are not permitted (got 4)"),
        ({"model": "/etc/passwd"}, 422, "model '/etc/passwd': not in the catalogue"),
        ({"model": "mixtrall"}, 422, "nearest: mixtral"),
        ({"time_limit": 1e9}, 422, "time_limit: Input should be less than or equal to 3600"),
        ({"kind": "run"}, 422, "does not match any of the expected tags: 'place', 'solve', 'explain', 'export'"),
    ],
)
def test_what_cannot_be_asked(client: httpx.Client, sent: str, changes: dict, status: int, said: str) -> None:
    assert said in error(client.post("/v1/jobs", json=question(sent) | changes), status)


def test_what_is_no_question_is_said_plainly(client: httpx.Client) -> None:
    assert (
        error(client.post("/v1/jobs", json={}), 422) == "kind: missing; expected one of place, solve, explain, export"
    )
    said = error(client.post("/v1/jobs", content=b"nul", headers={"Content-Type": "application/json"}), 422)
    assert said == "body: not JSON (Expecting value)"


def test_what_the_planner_refuses_is_the_jobs_error(client: httpx.Client, sent: str) -> None:
    job = finished(client, client.post("/v1/jobs", json=question(sent, slots=3)).json()["id"])
    assert (job["state"], job["result"]) == ("failed", None)
    assert job["error"] == "8 experts need 8 slots, got 3: raise --slots"


def test_a_document_of_the_wrong_kind_is_refused(client: httpx.Client, sent: str) -> None:
    asked = {"kind": "explain", "placement": sent}
    assert "is a trace, expected a placement" in error(client.post("/v1/jobs", json=asked), 404)


def test_what_is_not_there(client: httpx.Client) -> None:
    assert "unknown" in error(client.get("/v1/jobs/" + "0" * 32), 404)
    assert "unknown" in error(client.delete("/v1/jobs/" + "0" * 32), 404)
    assert "unknown" in error(client.get("/v1/documents/" + "0" * 64), 404)
    assert error(client.get("/v2"), 404) == "Not Found"
    assert error(client.put("/v1/jobs"), 405) == "Method Not Allowed"
    assert error(client.get("/v1/jobs/..%2f..%2fetc"), 404) or True


def test_other_hosts_and_pages_are_refused(client: httpx.Client) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.evil:8321"):
        assert "this machine alone" in error(client.get("/healthz", headers={"Host": host}), 421)
    for host in ("localhost", "LOCALHOST:8321", "127.0.0.1:8321", "[::1]:1"):
        assert client.get("/healthz", headers={"Host": host}).status_code == 200
    evil = {"Origin": "http://evil.example"}
    assert "another page" in error(client.post("/v1/jobs", json={}, headers=evil), 403)
    assert "another page" in error(client.delete("/v1/jobs/" + "0" * 32, headers=evil), 403)
    own = {"Origin": "http://127.0.0.1:8321"}
    assert client.post("/v1/jobs", json={}, headers=own).status_code == 422


def test_sizes_are_limited(client: httpx.Client, tmp_path: Path, trace: Path) -> None:
    big = b" " * (guard.SMALL + 1)
    assert "larger than 1 MiB" in error(client.post("/v1/jobs", content=big), 413)
    pieces = (b" " * 2**16 for _ in range(64))  # without a length
    assert "larger than 1 MiB" in error(client.post("/v1/jobs", content=pieces), 413)
    with in_process(tmp_path / "small", max_upload=100_000) as small:
        assert error(small.post("/v1/traces", content=b" " * 100_001), 413)
        assert error(small.post("/v1/traces", content=(b" " * 1000 for _ in range(200))), 413)
        assert not list((tmp_path / "small" / "work").iterdir())
        assert small.post("/v1/traces", content=trace.read_bytes()).status_code == 201


def test_rates_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: clock[0])
    rates = Rates(60)
    assert [rates.wait("a") for _ in range(61)] == [0] * 60 + [1]
    assert rates.wait("b") == 0
    clock[0] += 1.0
    assert [rates.wait("a"), rates.wait("a")] == [0, 1]
    with in_process(tmp_path / "jobs", requests_a_minute=2) as client:
        answers = [client.post("/v1/jobs", json={}) for _ in range(3)]
        assert [a.status_code for a in answers] == [422, 422, 429]
        assert int(answers[-1].headers["retry-after"]) > 0
        assert client.get("/v1/jobs").status_code == 200


def test_too_many_waiting_jobs_are_refused(tmp_path: Path, trace: Path) -> None:
    with in_process(tmp_path / "jobs", max_queued=1) as client:
        client.app.state.service.supervisor.leases.claim = lambda: None  # type: ignore[attr-defined]
        digest = client.post("/v1/traces", content=trace.read_bytes()).json()["digest"]
        assert client.post("/v1/jobs", json=question(digest)).status_code == 201
        assert "1 jobs wait already" in error(client.post("/v1/jobs", json=question(digest, seed=1)), 429)
        job = client.get("/v1/jobs?state=queued").json()["jobs"][0]
        assert client.delete(f"/v1/jobs/{job['id']}").json()["state"] == "cancelled"
        assert client.post("/v1/jobs", json=question(digest, seed=1)).status_code == 201


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    with in_process(tmp_path / "jobs", token=TOKEN) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Cookie": "moeplan_token=x"}):
            assert "a token is needed" in error(client.get("/v1/jobs", headers=headers), 401)
        assert error(client.get("/metrics"), 401)
        for headers in ({"Authorization": f"Bearer {TOKEN}"}, {"Cookie": f"moeplan_token={TOKEN}"}):
            assert client.get("/v1/jobs", headers=headers).status_code == 200
        assert client.get("/healthz").status_code == 200


def test_settings_that_are_not_safe_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoeplanError, match="a token is needed"):
        Settings(str(tmp_path), host="0.0.0.0").check()
    with pytest.raises(MoeplanError, match="16 printable"):
        Settings(str(tmp_path), token="short").check()
    with pytest.raises(MoeplanError, match="expected a folder, or postgresql"):
        Settings("mysql://x").check()
    with pytest.raises(MoeplanError, match="--documents"):
        Settings("postgresql+psycopg://x/y").check()
    with pytest.raises(MoeplanError, match="--store is empty: name a folder, or leave it out"):
        Settings("").check()
    with pytest.raises(MoeplanError, match="--documents is empty"):
        Settings(str(tmp_path), documents="").check()
    Settings(str(tmp_path), host="0.0.0.0", token=TOKEN).check()
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "x.y")] == [
        *[True] * 3,
        *[False] * 4,
    ]
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(tmp_path / "token") == TOKEN
    monkeypatch.setenv("MOEPLAN_TOKEN", "of the environment")
    assert read_token(None) == "of the environment"


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    database = Database.sqlite(tmp_path / "jobs.sqlite")
    database.migrate()
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'later'"))
    with pytest.raises(MoeplanError, match=r"another version of moeplan .*: use that version, or name another --store"):
        database.migrate()
    database.close()


def test_a_store_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(MoeplanError, match="can be written by others"), in_process(folder):
        pass


def test_a_full_disk_and_a_lost_database_lose_nothing(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_process(tmp_path / "jobs") as client:
        digest = client.post("/v1/traces", content=trace.read_bytes()).json()["digest"]
        job = client.post("/v1/jobs", json=question(digest)).json()["id"]
        with monkeypatch.context() as full:
            full.setattr(files_module, "RESERVE", 2**62)
            assert "disk is full" in error(client.post("/v1/traces", content=b"x"), 503)
            assert "disk is full" in error(client.post("/v1/jobs", json=question(digest, seed=5)), 503)
            answer = client.get("/readyz")
            assert "disk is full" in error(answer, 503)
            assert answer.headers["retry-after"] == "5"
        database = client.app.state.service.store.database  # type: ignore[attr-defined]
        place = tmp_path / "jobs" / "jobs.sqlite"
        with monkeypatch.context() as lost:
            lost.setattr(database, "engine", type(database).sqlite(tmp_path / "other.sqlite").engine)
            assert "does not answer (no such table" in error(client.get("/v1/jobs"), 503)
            assert error(client.get("/readyz"), 503)
            assert "moeplan_store_up 0.0" in client.get("/metrics").text
        assert place.exists()
        assert finished(client, job)["state"] == "done"
        assert client.get("/readyz").json() == {"status": "ready"}


def test_a_damaged_document_is_not_used(client: httpx.Client, tmp_path: Path, trace: Path) -> None:
    with in_process(tmp_path / "jobs") as own:
        digest = own.post("/v1/traces", content=trace.read_bytes()).json()["digest"]
        (path,) = (tmp_path / "jobs" / "documents").glob(f"*/{digest}")
        path.write_bytes(b"changed")
        assert "is damaged" in error(own.get(f"/v1/documents/{digest}"), 404)
        job = finished(own, own.post("/v1/jobs", json=question(digest)).json()["id"])
        assert "is damaged; send it again" in job["error"]
        assert own.post("/v1/traces", content=trace.read_bytes()).status_code == 201
        assert own.get(f"/v1/documents/{digest}").content == trace.read_bytes()


def test_documents_at_a_url(tmp_path: Path, trace: Path) -> None:
    with in_process(tmp_path / "jobs", documents="memory://moeplan-test") as client:
        digest = client.post("/v1/traces", content=trace.read_bytes()).json()["digest"]
        job = finished(client, client.post("/v1/jobs", json=question(digest)).json()["id"])
        assert job["state"] == "done", job
        assert Placement.parse(client.get(f"/v1/jobs/{job['id']}/result").text, "the answer")
        assert not list((tmp_path / "jobs" / "work").iterdir())


def test_counters_and_schema(client: httpx.Client, placed: dict) -> None:
    text = client.get("/metrics").text
    assert 'moeplan_jobs{state="done"}' in text
    assert 'moeplan_requests_total{method="GET",path="/v1/jobs/{job}",status="200"}' in text
    assert 'moeplan_job_runs_total{kind="place",state="answered"}' in text
    assert placed["id"] not in text
    schema = client.get("/v1/openapi.json").json()
    assert set(schema["paths"]) >= {"/v1/jobs", "/v1/jobs/{job}", "/v1/traces", "/v1/jobs/{job}/events"}
    assert schema["components"]["schemas"]["PlaceRequest"]["examples"][0]["kind"] == "place"
