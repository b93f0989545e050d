"""The lab's network: one namespace per host, joined by a switch, every uplink shaped both ways.

A host's namespace has one interface, ``uplink``, whose other end is a port of a bridge in a namespace of its own. A
token bucket (``tc tbf``) at the host's end limits what the host sends, one at the bridge's end what it receives; all
ranks of the host share both. Ranks of one host talk over its loopback, which is not limited.

Addresses come from 198.18.0.0/16, set aside for benchmarks (RFC 2544), and exist inside the namespaces only.
"""

import os
import shutil
import subprocess

from ...spec.errors import MoeplanError

INTERFACE = "uplink"
NETWORK = "198.18.0"

# A bucket that has filled while devices computed lets its content through at once, as no real link does: it holds what
# the link sends in BURST seconds, at least two frames. A packet of TCP's segmentation offload must fit into it, or is
# cut in the queue, which costs processor time; the largest is 64 KiB, which 1 Gbit/s sends in BURST seconds.
# The queue holds QUEUE seconds of traffic, enough that an incast of several hosts is not dropped (a lost last packet
# costs a 200 ms retransmission timeout).
BURST = 0.5e-3
SMALLEST_BURST, LARGEST_BURST = 4096, 1 << 16
QUEUE = 0.05
SMALLEST_QUEUE = 1 << 18


class Network:
    """``uplinks``: Gbit/s per host name, None without limit. ``addresses``: IP address per host name."""

    def __init__(self, prefix: str, uplinks: dict[str, float | None]) -> None:
        self.name = prefix
        self.uplinks = uplinks
        self.addresses = {host: f"{NETWORK}.{i}" for i, host in enumerate(uplinks, start=1)}

    def prefix(self, host: str) -> list[str]:
        """What to put before a command to run it on a host."""
        return ["ip", "netns", "exec", self.name + host]

    def build(self) -> None:
        switch = self.name + "Switch"  # upper case: no host can have this name
        run("ip", "netns", "add", switch)
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        for i, (host, rate) in enumerate(self.uplinks.items()):
            name, port = self.name + host, f"port{i}"
            run("ip", "netns", "add", name)
            run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            run("ip", "-n", name, "address", "add", f"{self.addresses[host]}/24", "dev", INTERFACE)
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", INTERFACE, "up")
            if rate is not None:
                shape(name, INTERFACE, rate)
                shape(switch, port, rate)


def shape(namespace: str, interface: str, gbit: float) -> None:
    """Limit what an interface sends."""
    queue = max(int(gbit * 1e9 / 8 * QUEUE), SMALLEST_QUEUE)
    burst = min(max(int(gbit * 1e9 / 8 * BURST), SMALLEST_BURST), LARGEST_BURST)
    run("ip", "-n", namespace, "link", "set", "dev", interface, "gso_max_size", str(burst))
    bucket = ["rate", f"{int(gbit * 1e9)}bit", "burst", str(burst), "limit", str(queue)]
    run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *bucket)


def run(*command: str) -> None:
    """Run ``ip`` or ``tc``; its complaint becomes the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MoeplanError(f"the lab's network: `{' '.join(command)}` failed: {' '.join(done.stderr.split())}")


def check_tools() -> None:
    """One clear error where the lab cannot work."""
    if os.geteuid() != 0:
        raise MoeplanError("the lab needs root (network namespaces and cgroups): run it with sudo")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise MoeplanError(f"the lab needs {' and '.join(missing)}: install the package iproute2")
