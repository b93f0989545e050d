"""The rendezvous that asks for a secret: what it keeps, whom it turns away, and ranks that meet there."""

import json
import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from multiprocessing.connection import Client

import pytest
import torch.distributed as dist

from moeplan.runtime.launch.environment import Place, meet
from moeplan.runtime.launch.secret_store import SecretStore, Server
from moeplan.spec.errors import MoeplanError
from moeplan.tests.test_launch import ENVIRONMENT, listening

SECRET = b"of this test"


@pytest.fixture
def server():
    return Server("127.0.0.1", 0, SECRET)


def test_answers_are_those_of_torchs_own_store(server):
    """The same calls on both, one after the other."""
    theirs = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    # torch's store counts one key of its own.
    ours, extra = SecretStore("127.0.0.1", server.port, SECRET), theirs.num_keys()
    for store in (ours, theirs):
        store.set("a", b"\x00\xff")
        store.set("b", "text")
    assert [store.add("n", 2) + store.add("n", 3) for store in (ours, theirs)] == [7, 7]
    assert ours.get("a") == theirs.get("a") == b"\x00\xff"
    assert ours.get("b") == theirs.get("b") == b"text"
    assert ours.get("n") == theirs.get("n") == b"5"
    assert ours.check(["a", "b"])
    assert theirs.check(["a", "b"])
    assert not ours.check(["a", "c"])
    assert not theirs.check(["a", "c"])
    for key, expected, desired in (("a2", "", "x"), ("a2", "y", "z"), ("a2", "x", "w"), ("a3", "no", "v")):
        assert ours.compare_set(key, expected, desired) == theirs.compare_set(key, expected, desired)
    assert ours.delete_key("b")
    assert theirs.delete_key("b")
    assert not ours.delete_key("b")
    assert not theirs.delete_key("b")
    assert ours.num_keys() == theirs.num_keys() - extra
    for store in (ours, theirs):
        with pytest.raises(dist.DistStoreError, match="wait timeout"):
            store.wait(["never"], timedelta(seconds=0.3))


def test_waiting_ends_when_another_rank_sets_the_key(server):
    first, second = (SecretStore("127.0.0.1", server.port, SECRET) for _ in range(2))
    threading.Timer(0.3, lambda: second.set("late", b"here")).start()
    assert first.get("late") == b"here"


def test_without_the_secret_nothing_is_answered(server):
    SecretStore("127.0.0.1", server.port, SECRET).set("key", b"value")
    with pytest.raises(MoeplanError, match="has another secret: give every rank the same MOEPLAN_SECRET"):
        SecretStore("127.0.0.1", server.port, b"guessed")
    # One that only connects holds up nobody; one that talks without an answer to the challenge is cut off.
    with socket.create_connection(("127.0.0.1", server.port)):
        assert SecretStore("127.0.0.1", server.port, SECRET).get("key") == b"value"
    stranger = Client(("127.0.0.1", server.port))
    stranger.recv_bytes()  # the challenge
    assert b"value" not in talk(stranger, [b"\2", b"get", b"key"])


def talk(stranger, messages):
    """All that is answered until the connection ends."""
    answers = []
    try:
        for message in messages:
            stranger.send_bytes(message)
        while True:
            answers.append(stranger.recv_bytes())
    except (EOFError, OSError):
        return answers


def test_a_place_that_others_reach_needs_a_secret(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "192.0.2.7")
    where = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
    with pytest.raises(MoeplanError, match="MOEPLAN_SECRET is not set, and others can reach the rendezvous at node7"):
        meet(Place(1, 2, 0, 0), where, 1.0)
    monkeypatch.setattr("moeplan.runtime.launch.secret_store.Client", refuse)
    with pytest.raises(MoeplanError, match=r"no rendezvous at 192.0.2.7 port 29500 within .*: refused"):
        meet(Place(1, 2, 0, 0), where | {"MOEPLAN_SECRET": "x"}, 0.5)
    with pytest.raises(MoeplanError, match="MASTER_PORT: expected 1 to 65535, got '0x1f'"):
        meet(Place(1, 2, 0, 0), where | {"MASTER_PORT": "0x1f"}, 1.0)
    assert meet(Place(1, 2, 0, 0), where | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, 1.0) is None


def refuse(*arguments, **options):
    raise ConnectionRefusedError("refused")


def slurm(secrets, folder):
    """Two processes as Slurm starts them, with these secrets."""
    (folder / "script.py").write_text(ENVIRONMENT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank, secret in enumerate(secrets):
        place = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MOEPLAN_SECRET": secret}
        place |= {"GLOO_SOCKET_IFNAME": "lo"}
        jobs = json.dumps(
            [["moeplan.tests.test_launch:show_sockets", {}], ["moeplan.tests.test_launch:hello", {"a": 1}]]
        )
        argv = [sys.executable, str(folder / "script.py"), jobs, str(folder)]
        started.append(subprocess.Popen(argv, env=os.environ | place, stderr=subprocess.PIPE, text=True))
    return started


def test_ranks_of_slurm_meet(tmp_path):
    started = slurm(["one", "one"], tmp_path)
    complaints = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], complaints
    results, _ = json.loads((tmp_path / "0.json").read_text())
    assert [(r["rank"], r["total"]) for r in results] == [(0, 3.0), (1, 3.0)]


def test_a_rank_of_slurm_with_another_secret_says_so(tmp_path):
    first, second = slurm(["one", "two"], tmp_path)
    _, complaint = second.communicate(timeout=120)
    first.kill()
    first.communicate()
    assert second.returncode != 0
    assert "has another secret" in complaint


def test_it_listens_where_it_was_told(server):
    assert set(listening(os.getpid())) >= {"0100007F"}
