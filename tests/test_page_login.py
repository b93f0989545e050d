"""The page of a service with a token: it asks a person for it, and keeps it where no script and no other site reads."""

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="FastAPI is in moeplan[service]")
from starlette.testclient import TestClient

from moeplan.service.http.app import create_app
from moeplan.service.jobs.settings import Settings

TOKEN = "0123456789abcdef0123456789abcdef"
HERE = {"origin": "http://127.0.0.1:8321"}
PERSON = {"accept": "text/html,*/*"}


def test_a_person_logs_in(tmp_path: Path) -> None:
    app = create_app(Settings(store=str(tmp_path / "store"), workers=1, token=TOKEN))
    with TestClient(app, base_url="http://127.0.0.1:8321", follow_redirects=False) as client:
        asked = client.get("/jobs", headers=PERSON)
        assert (asked.status_code, asked.headers["location"]) == (303, "/login")
        assert client.get("/v1/jobs").status_code == 401
        assert client.get("/static/style.css").status_code == 200
        assert "password" in client.get("/login").text
        wrong = client.post("/login", data={"token": "another"}, headers=HERE)
        assert wrong.status_code == 401
        assert "set-cookie" not in wrong.headers
        assert client.post("/login", data={"token": TOKEN}, headers={"origin": "http://evil"}).status_code == 403
        right = client.post("/login", data={"token": TOKEN}, headers=HERE)
        assert right.status_code == 303
        cookie = right.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert client.get("/jobs", headers=PERSON).status_code == 200
        assert client.post("/place", data={"devices": "2"}).status_code == 403
