"""The lab: an emulated cluster is as slow as asked, and nothing of it is ever left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moeplan.runtime.launch import lab_cpu
from moeplan.runtime.launch.lab import Lab, LabLauncher, LabSpec
from moeplan.runtime.launch.lab_network import Network
from moeplan.runtime.launch.lab_watchdog import groups, namespaces
from moeplan.spec.errors import MoeplanError, RunError

HERE = "moeplan.tests.test_lab"
LABS = Path(__file__).parent.parent / "examples" / "labs"
SPEC = {"name": "small", "hosts": [{"name": "a", "ranks": 1, "cpu_share": 0.3}], "uplink_gbit": 1}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root")


def measure(rank, job):
    """GEMMs per second in a loop and after waits; seconds per MiB to a rank of this host and of the other."""
    matrix = torch.randn(192, 192)

    def work(calls):
        started = time.perf_counter()
        for _ in range(calls):
            torch.mm(matrix, matrix)
        return calls / (time.perf_counter() - started)

    work(20)
    dist.barrier()
    until, rates = time.perf_counter() + 3, []
    while time.perf_counter() < until:
        rates.append(work(20))
    loop = len(rates) / sum(1 / rate for rate in rates)
    after_waits = []
    for _ in range(40):
        dist.barrier()
        time.sleep(0.005)
        after_waits.append(work(max(1, int(loop * 0.01))))
    megabytes, seconds = 8, {}
    buffer = torch.zeros(megabytes << 20, dtype=torch.uint8)
    for source, target in [(0, 1), (0, 2), (3, 1)] * 2:
        dist.barrier()
        started = time.perf_counter()
        if rank.rank == source:
            dist.send(buffer, target)
        if rank.rank == target:
            dist.recv(buffer, source)
            took = time.perf_counter() - started
            seconds[f"{source}-{target}"] = min(took, seconds.get(f"{source}-{target}", took))
    return {
        "host": rank.hosts[rank.rank],
        "cores": sorted(os.sched_getaffinity(0)),
        "loop": loop,
        "after_waits": sorted(after_waits)[len(after_waits) // 2],
        "rates": {pair: (megabytes << 20) / took for pair, took in seconds.items()},
    }


def die(rank, job):
    if rank.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return {}


def leftovers(owner):
    prefix = f"moeplan-{owner}-"
    return namespaces(prefix) + groups(prefix, lab_cpu.hierarchy().root)


def cleaned(owner, seconds=15.0):
    until = time.monotonic() + seconds
    while leftovers(owner) and time.monotonic() < until:
        time.sleep(0.05)
    return not leftovers(owner)


@pytest.fixture(scope="module")
def lab():
    with Lab(LabSpec.read(LABS / "two-hosts.yaml")) as lab:
        yield lab
    assert leftovers(os.getpid()) == []


@pytest.fixture(scope="module")
def measured(lab):
    return LabLauncher(lab).run(f"{HERE}:measure", {}, timeout=60)


@needs_root
def test_ranks_are_where_the_lab_says(lab, measured):
    assert [r["host"] for r in measured] == ["a", "a", "b", "b"]
    assert [r["cores"] for r in measured] == lab.cores


@needs_root
def test_a_host_of_half_the_share_is_half_as_fast(measured):
    fast, slow = (sum(r["loop"] for r in measured if r["host"] == host) for host in "ab")
    assert 1.5 < fast / slow < 2.7


@needs_root
def test_work_after_a_wait_is_as_slow_as_in_a_loop(measured):
    ratios = [r["after_waits"] / r["loop"] for r in measured]
    assert all(0.55 < ratio < 1.8 for ratio in ratios), ratios


@needs_root
def test_the_link_between_hosts_has_its_rate_and_the_loopback_is_faster(measured):
    rates = {pair: rate for r in measured for pair, rate in r["rates"].items()}
    for pair in ("0-2", "3-1"):
        assert 60e6 < rates[pair] < 130e6, rates
    assert rates["0-1"] > 2 * max(rates["0-2"], rates["3-1"]), rates


@needs_root
def test_a_killed_rank_is_named_with_its_host_and_the_lab_lives_on(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a failed run keeps its logs
    with pytest.raises(RunError, match=r"^rank 3 \(host b\): was killed by SIGKILL"):
        LabLauncher(lab).run(f"{HERE}:die", {}, timeout=60)
    assert lab.popen("b", ["true"]).wait() == 0
    root = lab_cpu.hierarchy().root
    assert [(group / "cgroup.procs").read_text() for group in groups(lab.prefix, root)] == [""] * 6


TORCHRUN = """
import json, sys
from moeplan.runtime.launch.environment import EnvironmentLauncher
launcher = EnvironmentLauncher()
results = launcher.run("moeplan.tests.test_launch:hello", {}, timeout=60)
if launcher.rank == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
"""


@needs_root
def test_torchrun_over_two_hosts(lab, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(TORCHRUN)
    agents = []
    for node, host in enumerate("ab"):
        argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        argv += ["--node-rank", str(node), "--master-addr", lab.address("a"), "--master-port", "29400"]
        agents.append(lab.popen(host, [*argv, str(script), str(out)], stderr=subprocess.PIPE, text=True))
    for agent in agents:
        _, complaint = agent.communicate(timeout=120)
        assert agent.returncode == 0, complaint
    results = json.loads(out.read_text())
    assert [r["total"] for r in results] == [3.0, 3.0]
    assert len(set(results[0]["hosts"])) == 2


@needs_root
def test_an_unknown_host(lab):
    with pytest.raises(MoeplanError, match=r"lab two-hosts has no host 'c', only \['a', 'b'\]"):
        lab.popen("c", ["true"])


@needs_root
def test_cleaned_after_an_exception_in_it():
    def use():
        with Lab(LabSpec.model_validate(SPEC)) as lab:
            sleeper = lab.popen("a", ["sleep", "1000"])
            try:
                assert [name for name in namespaces(lab.prefix) if name.endswith("-a")]
                raise ZeroDivisionError
            finally:
                use.lab, use.sleeper = lab, sleeper

    with pytest.raises(ZeroDivisionError):
        use()
    assert use.sleeper.wait(timeout=10) == -signal.SIGKILL
    assert namespaces(use.lab.prefix) == []
    assert groups(use.lab.prefix, lab_cpu.hierarchy().root) == []


HOLD = f"""
import subprocess, time
from moeplan.runtime.launch.lab import Lab, LabSpec
with Lab(LabSpec.model_validate({SPEC!r})) as lab:
    ranks = [lab.popen("a", ["sleep", "1000"], stdout=subprocess.DEVNULL)]
    with lab.shares.held([rank.pid for rank in ranks]):
        print("open", flush=True)
        time.sleep(1000)
"""


def hold():
    owner = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert owner.stdout.readline() == "open\n"
    assert len(leftovers(owner.pid)) == 4  # two namespaces, two groups
    return owner


def end(owner, number):
    os.kill(owner.pid, number)
    owner.communicate(timeout=60)
    assert owner.returncode == -number


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_cleaned_when_its_owner_is_ended(number):
    owner = hold()
    end(owner, number)
    assert cleaned(owner.pid)


@needs_root
def test_the_next_lab_cleans_after_a_killed_watchdog():
    owner = hold()
    found = subprocess.run(
        ["pgrep", "-f", f"lab_watchdog.py moeplan-{owner.pid}-"], capture_output=True, text=True, check=True
    )
    os.kill(int(found.stdout), signal.SIGKILL)
    end(owner, signal.SIGKILL)
    assert leftovers(owner.pid)
    with Lab(LabSpec.model_validate(SPEC)):
        assert leftovers(owner.pid) == []


@pytest.mark.beside
def test_no_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MoeplanError, match="the lab needs root"), Lab(LabSpec.model_validate(SPEC)):
        pass


@pytest.mark.beside
@needs_root
def test_no_tools(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MoeplanError, match="the lab needs ip and tc: install"), Lab(LabSpec.model_validate(SPEC)):
        pass


@pytest.mark.beside
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("[]", "document: Input should be a valid dictionary"),
        ("name: x", "hosts: Field required"),
        ("name: x\nhosts: []\nuplink_gbit: 1", "hosts: Tuple should have at least 1 item"),
        (
            "name: x\nhosts: [{name: a, ranks: 0, cpu_share: 1}]",
            r"hosts\[0\].ranks: .*greater than or equal to 1 \(got 0\)",
        ),
        ("name: x\nhosts: [{name: a, ranks: 1, cpu_share: -1}]", r"hosts\[0\].cpu_share: .*greater than 0"),
        ("name: x\nhosts: [{name: a, ranks: 1, cpu_share: .nan}]", r"hosts\[0\].cpu_share: .*"),
        ("name: x\nhosts: [{name: a, ranks: 1, cpu_share: 1.5}]", r"cpu_share 1.5 is more than 1 thread\(s\) x 0.95"),
        ("name: x\nhosts: [{name: a/../b, ranks: 1, cpu_share: 0.5}]", r"hosts\[0\].name: String should match"),
        ("name: x\nhosts: [{name: a, ranks: 1, cpu_share: 0.5, speed: 3}]", r"hosts\[0\].speed: Extra inputs"),
        ("name: x\nhosts: [{name: a, ranks: 1, cpu_share: 0.1}, {name: a, ranks: 1, cpu_share: 0.1}]", "repeat"),
        (
            "name: x\nhosts: [{name: a, ranks: 1, cpu_share: 0.1}, {name: b, ranks: 1, cpu_share: 0.1}]",
            "no uplink_gbit",
        ),
    ],
)
def test_a_bad_lab_file_is_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(text)
    with pytest.raises(MoeplanError, match=f"^{re.escape(str(path))}: .*{message}") as raised:
        LabSpec.read(path)
    assert "\n" not in str(raised.value)


@pytest.mark.beside
def test_a_missing_lab_file():
    with pytest.raises(MoeplanError, match=r"nowhere\.yaml: no such file"):
        LabSpec.read("nowhere.yaml")


@pytest.mark.beside
@pytest.mark.parametrize("path", sorted(LABS.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_labs_fit_two_cores(path):
    spec = LabSpec.read(path)
    lab_cpu.place([(host.cpu_share, host.threads) for host in spec.ranks()], [0, 1])


@pytest.mark.beside
def test_too_much_is_refused_with_the_totals():
    with pytest.raises(MoeplanError, match=r"2.8 in total: they do not fit into 2 core\(s\) of 0.95 each"):
        lab_cpu.place([(0.7, 1)] * 4, [0, 1])


@pytest.mark.beside
@given(
    demands=st.lists(st.tuples(st.floats(0.01, 3), st.integers(1, 4)), min_size=1, max_size=8),
    cores=st.sets(st.integers(0, 63), min_size=1, max_size=8),
)
def test_placing_never_oversubscribes_a_core(demands, cores):
    cores = sorted(cores)
    try:
        placed = lab_cpu.place(demands, cores)
    except MoeplanError:
        # A list that needs less than half of every core always fits where there are cores enough for its threads.
        light = sum(share for share, _ in demands) <= lab_cpu.FULL / 2
        assert not light or max(threads for _, threads in demands) > len(cores)
        return
    load = dict.fromkeys(cores, 0.0)
    for (share, threads), own in zip(demands, placed, strict=True):
        assert len(set(own)) == threads
        for core in own:
            load[core] += share / threads
    assert max(load.values()) <= lab_cpu.FULL + 1e-6


@pytest.mark.beside
def test_the_cpu_controller_is_found_in_both_versions():
    one = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0\n"
    two = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"
    other = "cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n"
    found = lab_cpu.find_hierarchy(two + other + one)
    assert (str(found.root), found.weight) == ("/sys/fs/cgroup/cpu,cpuacct", "cpu.shares")
    found = lab_cpu.find_hierarchy(other + two)
    assert (str(found.root), found.weight) == ("/sys/fs/cgroup", "cpu.weight")
    assert lab_cpu.find_hierarchy(other) is None


RECEIVE = """
import socket, sys
server = socket.create_server((sys.argv[1], 9000))
print("ready", flush=True)
connection, _ = server.accept()
with connection:
    while (left := int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")):
        while left:
            left -= len(connection.recv(left))
        connection.sendall(b"x")
"""
SEND = """
import socket, statistics, sys, time
with socket.create_connection((sys.argv[1], 9000)) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for pause in (0.0, 0.02):
        seconds = []
        for _ in range(15):
            time.sleep(pause)
            started = time.perf_counter()
            connection.sendall((1 << 15).to_bytes(4, "big") + bytes(1 << 15))
            connection.recv(1)
            seconds.append(time.perf_counter() - started)
        print(statistics.median(seconds))
    connection.sendall(bytes(4))
"""


@needs_root
def test_a_slow_link_is_as_slow_after_a_pause():
    """32 KiB take 2.6 ms at 0.1 Gbit/s. A bucket of 64 KiB, as there was, lets them through in 0.2 ms after a pause."""
    network = Network(f"moeplanPause{os.getpid()}", {"a": 0.1, "b": 0.1})
    try:
        network.build()
        address = network.addresses["b"]
        receiver = [*network.prefix("b"), sys.executable, "-c", RECEIVE, address]
        with subprocess.Popen(receiver, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "ready\n"
            sender = [*network.prefix("a"), sys.executable, "-c", SEND, address]
            sent = subprocess.run(sender, capture_output=True, text=True, timeout=60, check=True)
            server.wait(10)
    finally:
        for name in (network.name + "a", network.name + "b", network.name + "Switch"):
            subprocess.run(["ip", "netns", "del", name], check=True)
    in_a_row, paused = map(float, sent.stdout.split())
    link = (1 << 15) * 8 / 0.1e9
    assert in_a_row > 0.8 * link
    assert paused > 0.6 * link
