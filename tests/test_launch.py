"""The launchers: what a run returns, and how every way to fail ends. The entries that ranks call are here too."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moeplan.runtime.launch.environment import EnvironmentLauncher, read_place
from moeplan.runtime.launch.local import LocalLauncher
from moeplan.runtime.launch.rank import divide_cores, resolve_entry, to_json
from moeplan.spec.errors import MoeplanError, RunError

HERE = "moeplan.tests.test_launch"


def hello(rank, job):
    rank.emit({"from": rank.rank, "pid": os.getpid()})
    total = torch.tensor([rank.rank + 1.0])
    dist.all_reduce(total)
    return {
        "rank": rank.rank,
        "job": job,
        "hosts": list(rank.hosts),
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)),
        "share": rank.cpu_share,
        "total": total.item(),
    }


def fail(rank, job):
    """Rank 1 fails as told; the others wait for it in a collective."""
    os.symlink(str(os.getpid()), f"{job['pids']}/{rank.rank}")  # appears with its content at once
    rank.emit({"started": rank.rank})
    if rank.rank == 1:
        how = job["how"]
        if how == "raise":
            raise ValueError("two\nlines")
        if how == "expected":
            raise MoeplanError("weights are missing: fetch them")
        if how == "os._exit":
            os._exit(7)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "set":
            return {"bad": {1}}
        if how == "hang":
            wait_for_nothing()
    dist.barrier()
    return {}


def wait_for_nothing():
    while True:
        time.sleep(0.1)


def chat(rank, job):
    """Rank 1 alone gives signs of life, for longer than the timeout."""
    for _ in range(8):
        if rank.rank == 1:
            rank.emit({})
        time.sleep(0.5)
    return {}


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def written(folder):
    """Process ids of the ranks that called ``fail``."""
    return [int(os.readlink(link)) for link in folder.iterdir()]


def gone(pids, seconds=5.0):
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.fixture(autouse=True)
def logs_apart(tmp_path_factory, monkeypatch):
    """Failed runs keep their logs: not beyond the tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))


def test_results_in_rank_order_and_events_of_rank_0():
    events = []
    launcher = LocalLauncher(2)
    results = launcher.run(f"{HERE}:hello", {"x": [1, "é"]}, timeout=60, on_event=events.append)
    assert [r["rank"] for r in results] == [0, 1]
    assert all(r["job"] == {"x": [1, "é"]} and r["total"] == 3.0 for r in results)
    assert all(r["hosts"] == [socket.gethostname()] * 2 for r in results)
    assert [event["from"] for event in events] == [0]
    cores = sorted(os.sched_getaffinity(0))
    divided = divide_cores(cores, 2)
    assert [r["cores"] for r in results] == divided
    assert [r["threads"] for r in results] == [len(own) for own in divided]
    assert sum(r["share"] for r in results) == pytest.approx(len(cores))
    assert gone([event["pid"] for event in events])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"ValueError: two lines; its log: "),
        ("expected", r"weights are missing: fetch them$"),
        ("os._exit", r"exited with code 7 without a result; its log: "),
        ("kill", r"was killed by SIGKILL \(out of memory\?\) without a result"),
        ("set", r"the result is not JSON: Object of type set is not JSON serializable$"),
    ],
)
def test_a_failing_rank_ends_the_run_with_its_name(how, message, tmp_path):
    with pytest.raises(MoeplanError, match=rf"^rank 1 \(host {socket.gethostname()}\): {message}") as raised:
        LocalLauncher(2).run(f"{HERE}:fail", {"how": how, "pids": str(tmp_path)}, timeout=60)
    # What a user can mend exits with 2, a broken run with 3.
    assert raised.value.exit_code == (2 if how in ("expected", "set") else 3)
    assert gone(written(tmp_path))
    if how == "raise":
        with open(str(raised.value).rpartition("its log: ")[2]) as log:
            assert "Traceback (most recent call last)" in log.read()


def test_a_hang_names_the_rank_and_where_it_is(tmp_path):
    started = time.monotonic()
    with pytest.raises(RunError, match=r"^rank 1 .*: no sign of life for 8 s \(last in .*test_launch.py:\d+ wait_for"):
        LocalLauncher(2).run(f"{HERE}:fail", {"how": "hang", "pids": str(tmp_path)}, timeout=8)
    assert time.monotonic() - started < 50
    assert gone(written(tmp_path))


def test_signs_of_life_of_any_rank_extend_the_run():
    assert LocalLauncher(2).run(f"{HERE}:chat", {}, timeout=3) == [{}, {}]


LAUNCH = """
import sys
from moeplan.runtime.launch.local import LocalLauncher
LocalLauncher(2).run("moeplan.tests.test_launch:fail", {"how": "hang", "pids": sys.argv[1]}, timeout=100)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_their_launcher(number, tmp_path):
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while len(written(tmp_path)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    pids = written(tmp_path)
    assert len(pids) == 2
    assert all(map(alive, pids))
    launcher.send_signal(number)
    _, complaint = launcher.communicate(timeout=30)
    assert launcher.returncode == -number
    assert ("KeyboardInterrupt" in complaint) == (number == signal.SIGINT)
    assert gone(pids)


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            MoeplanError, match=f"rank 0 .*: cannot listen on 127.0.0.1 port {port}: port in use; choose"
        ):
            LocalLauncher(1, port=port).run(f"{HERE}:hello", {}, timeout=60)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("os:system", "expected 'moeplan.package.module:function'"),
        ("moeplanet.x:f", "expected 'moeplan.package.module:function'"),
        ("moeplan.spec.model", "expected 'moeplan.package.module:function'"),
        ("moeplan.spec.modell:f", "No module named"),
        ("moeplan.spec.model:f", "has no attribute 'f'"),
    ],
)
def test_only_entries_of_moeplan_are_called(entry, message):
    with pytest.raises(MoeplanError, match=message):
        LocalLauncher(1).run(entry, {}, timeout=10)


@pytest.mark.parametrize("result", [{1}, {"x": float("nan")}, {"x": b""}])
def test_only_json_is_a_result(result):
    with pytest.raises(MoeplanError, match="the result is not JSON: "):
        to_json(result)


def test_an_entry_resolves():
    assert resolve_entry("moeplan.spec.model:Model").__name__ == "Model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 0}, "ranks: at least 1"),
        ({"ranks": 1, "threads": 10_000}, r"threads: each of 1 ranks has \d+ core"),
        ({"ranks": 10_000, "kind": "cuda"}, r"10000 ranks need 10000 GPUs, this machine has \d+"),
    ],
)
def test_what_the_machine_lacks(arguments, message):
    with pytest.raises(MoeplanError, match=message):
        LocalLauncher(**arguments)


@given(cores=st.sets(st.integers(0, 200), min_size=1, max_size=40), ranks=st.integers(1, 50))
def test_cores_are_divided_fairly(cores, ranks):
    cores = sorted(cores)
    divided = divide_cores(cores, ranks)
    assert len(divided) == ranks
    assert set().union(*divided) == set(cores)
    sizes = [len(own) for own in divided]
    assert max(sizes) - min(sizes) <= 1
    users = [sum(core in own for own in divided) for core in cores]
    assert max(users) - min(users) <= 1


def test_places_in_the_environment():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1", "SLURM_PROCID": "0"}
    place = read_place(torchrun)
    assert (place.rank, place.world, place.local, place.node) == (3, 4, 1, 1)
    place = read_place({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"})
    assert (place.rank, place.world, place.local, place.node) == (2, 4, 0, 1)
    assert read_place({}) is None
    with pytest.raises(MoeplanError, match="RANK: expected 0 to 1, got 2"):
        read_place({"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(MoeplanError, match="expected whole numbers"):
        read_place({"RANK": "zero", "WORLD_SIZE": "2"})


ENVIRONMENT = """
import json, sys
from moeplan.runtime.launch.environment import EnvironmentLauncher
assert EnvironmentLauncher.present()
launcher, events = EnvironmentLauncher(), []
for entry, job in json.loads(sys.argv[1]):
    results = launcher.run(entry, job, timeout=60, on_event=events.append)
with open(f"{sys.argv[2]}/{launcher.rank}.json", "w") as file:
    json.dump([results, events], file)
"""


def torchrun(runs, folder):
    script = folder / "script.py"
    script.write_text(ENVIRONMENT)
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run([*argv, json.dumps(runs), str(folder)], capture_output=True, text=True, timeout=120)


def test_ranks_of_torchrun_run_entries_in_process(tmp_path):
    done = torchrun([[f"{HERE}:hello", {"run": 1}], [f"{HERE}:hello", {"run": 2}]], tmp_path)
    assert done.returncode == 0, done.stderr
    results, events = json.loads((tmp_path / "0.json").read_text())
    others, silence = json.loads((tmp_path / "1.json").read_text())
    assert results == others
    assert [r["rank"] for r in results] == [0, 1]
    assert all(r["job"] == {"run": 2} and r["total"] == 3.0 for r in results)
    assert [r["cores"] for r in results] == divide_cores(sorted(os.sched_getaffinity(0)), 2)
    assert [event["from"] for event in events] == [0, 0]
    assert silence == []


def test_a_failing_rank_of_torchrun_says_so(tmp_path):
    done = torchrun([[f"{HERE}:fail", {"how": "raise", "pids": str(tmp_path)}]], tmp_path)
    assert done.returncode != 0
    assert "RunError: rank 1 (host " in done.stderr
    assert "ValueError: two lines" in done.stderr


def test_no_environment_to_run_in(monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert not EnvironmentLauncher.present()
    with pytest.raises(MoeplanError, match="neither torchrun nor Slurm"):
        EnvironmentLauncher()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(MoeplanError, match="MASTER_ADDR is not set"):
        EnvironmentLauncher()


def pause(rank, job):
    """Every rank says who it is, then rank 1 stops its own process; the others wait for it."""
    os.symlink(str(os.getpid()), f"{job['pids']}/{rank.rank}")
    if rank.rank == job["who"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    if job["asynchronous"]:
        dist.all_reduce(torch.ones(1), async_op=True).wait()
    dist.barrier()
    return {}


@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stopped_rank_is_the_one_named(who, asynchronous, tmp_path):
    job = {"pids": str(tmp_path), "who": who, "asynchronous": asynchronous}
    with pytest.raises(
        RunError, match=rf"^rank {who} .*: no sign of life for 4 s \(its process \d+ is stopped\); its log"
    ):
        LocalLauncher(3, threads=1).run(f"{HERE}:pause", job, timeout=4)
    assert gone(written(tmp_path))


def stop_first_child():
    """Stop the first rank that appears among this process's children, before it can be ready."""
    me, until = str(os.getpid()), time.monotonic() + 20
    while time.monotonic() < until:
        for entry in os.listdir("/proc"):
            try:
                with open(f"/proc/{entry}/stat") as stat, open(f"/proc/{entry}/cmdline") as line:
                    parent, command = stat.read().rpartition(")")[2].split()[1], line.read()
            except (OSError, ValueError):
                continue
            if parent == me and "moeplan.runtime.child" in command:
                os.kill(int(entry), signal.SIGSTOP)
                return
        time.sleep(0.01)


def test_the_limit_holds_while_ranks_start():
    """A rank that is stopped before it is ready: named within the limit, not after that of a slow import."""
    stopper, started = threading.Thread(target=stop_first_child), time.monotonic()
    stopper.start()
    with pytest.raises(RunError, match=r"^rank \d .*: no sign of life for 3 s \(its process \d+ is stopped\)"):
        LocalLauncher(2, threads=1).run(f"{HERE}:hello", {}, timeout=3)
    assert time.monotonic() - started < 60  # it was 120 before; importing torch on a busy machine counts too
    stopper.join()


def listening(pid):
    """Addresses on which a process listens, of /proc/net/tcp and tcp6: 0100007F is 127.0.0.1."""
    sockets = set()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        try:
            sockets.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
        except FileNotFoundError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        found += [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    return found


def show_sockets(rank, job):
    dist.barrier()
    return {"addresses": listening(os.getpid())}


def test_ranks_listen_on_loopback_only():
    results = LocalLauncher(2).run(f"{HERE}:show_sockets", {}, timeout=60)
    assert len(results[0]["addresses"]) >= 2  # the store, and gloo
    assert {address for result in results for address in result["addresses"]} == {"0100007F"}
