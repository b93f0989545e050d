"""Links: every ordered pair of devices alone, and what a host's uplink carries when all its devices use it at once."""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..spec.cluster.measurement import MeasuredLink
from .grids import SIZES, Coordinates, Point, grow
from .measure import LOST, LOW, TRIES, WORK, Bench, Timing, Work, summary, timer

ACK_BYTES = 1
PAUSE = 0.05  # seconds until a disturbed batch is tried again
UPLINK_MESSAGE = 1 << 20
UPLINK_SECONDS = 0.4  # long enough to outlast the burst that a shaped link lets through


class Flow(NamedTuple):
    """One stream of bytes between two devices."""

    source: int
    target: int


class LinkTiming(NamedTuple):
    """A link, and how many of its points other programs disturbed."""

    link: MeasuredLink
    disturbed: int


def measure_links(bench: Bench, allowance: float) -> list[LinkTiming]:
    """The links that leave this rank; the pairs take turns, all other ranks wait.

    One-way time of n bytes = round trip of n bytes and a one-byte answer, minus the one-way latency, which is half the
    round trip of one byte. With many pairs, and on slow links, each gets fewer sizes.
    """
    pairs = [Flow(i, j) for i in range(bench.world) for j in range(bench.world) if i != j]
    links = []
    for pair in pairs:
        bench.agree(0.0)
        if bench.rank == pair.source:
            links.append(_probe(pair, bench, allowance / len(pairs)))
        elif bench.rank == pair.target:
            _answer(pair, bench)
    return links


def disturbed(bench: Bench) -> bool:
    """Whether another program has this rank's processor now."""
    return bench.device.type == "cpu" and not bench.shared and Work()()[1] > LOST * WORK


def _probe(pair: Flow, bench: Bench, allowance: float) -> LinkTiming:
    device, pace, noisy = bench.device, bench.pace, 0

    def trip(size: int) -> Timing:
        out = torch.zeros(size, dtype=torch.uint8, device=device)
        back = torch.zeros(ACK_BYTES, dtype=torch.uint8, device=device)

        def once() -> None:
            dist.send(out, pair.target)
            dist.recv(back, pair.target)

        def run(times: int) -> tuple[float, bool]:
            dist.send(torch.tensor([times, size], device=device), pair.target)
            mine = disturbed(bench)
            dist.recv(back, pair.target)  # the other side is ready: its buffer exists
            return timer([once], device)(times), mine or bool(back.item())

        first = min(run(1)[0] for _ in range(3))
        calls = max(1, round(pace.batch / 2 / first))
        repetitions = max(3, min(9, round(pace.window / (calls * first))))
        clean, every = list[float](), list[float]()
        most = repetitions if noisy else TRIES * repetitions  # who stayed through one point's tries is here to stay
        while len(clean) < repetitions and len(every) < most:
            seconds, others = run(calls)
            every.append(seconds / calls)
            if others and not noisy:
                time.sleep(PAUSE)
            if not others:
                clean.append(seconds / calls)
        return summary(clean) if len(clean) >= 3 else summary(every, LOW)._replace(clean=False)

    latency = trip(ACK_BYTES).median / 2

    def visit(point: Coordinates) -> Point:
        nonlocal noisy
        there_and_back = trip(point["bytes"])
        noisy += not there_and_back.clean
        one_way = there_and_back._replace(median=max(there_and_back.median - latency, latency))
        return Point(one_way, there_and_back.median, 0.0)

    curve = grow(SIZES, visit, pace, allowance)
    dist.send(torch.tensor([0, 0], device=device), pair.target)
    return LinkTiming(MeasuredLink(source=pair.source, target=pair.target, latency=latency, curve=curve), noisy)


def _answer(pair: Flow, bench: Bench) -> None:
    """The other side of ``_probe``: told how many messages of what size follow, until told none.

    Its first answer says whether it is disturbed.
    """
    device = bench.device
    header = torch.zeros(2, dtype=torch.int64, device=device)
    ack = torch.zeros(ACK_BYTES, dtype=torch.uint8, device=device)
    buffer = torch.empty(0, dtype=torch.uint8, device=device)
    while True:
        dist.recv(header, pair.source)
        times, size = (int(x) for x in header.tolist())
        if times == 0:
            return
        if buffer.numel() != size:
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        dist.send(ack.fill_(disturbed(bench)), pair.source)
        for _ in range(times):
            dist.recv(buffer, pair.source)
            dist.send(ack, pair.source)


def uplink_flows(hosts: tuple[str, ...], host: str, outward: bool) -> list[Flow]:
    """Flows that load one host's uplink with all its devices, spread over all devices of the other hosts."""
    local = [r for r, h in enumerate(hosts) if h == host]
    others = [r for r, h in enumerate(hosts) if h != host]
    pairs = [(local[k % len(local)], others[k % len(others)]) for k in range(max(len(local), len(others)))]
    return [Flow(a, b) if outward else Flow(b, a) for a, b in pairs]


def measure_uplinks(bench: Bench) -> dict[str, tuple[float, float]]:
    """Bytes per second (out, in) of every host's uplink with all its devices at work; empty for a single host."""
    names = list(dict.fromkeys(bench.hosts))
    if len(names) == 1:
        return {}

    def rate(name: str, outward: bool) -> float:
        return _rate(bench, uplink_flows(bench.hosts, name, outward))

    return {name: (rate(name, True), rate(name, False)) for name in names}


def _rate(bench: Bench, flows: list[Flow]) -> float:
    """Bytes per second of all flows together: the amount grows until it takes ``UPLINK_SECONDS``; median of three."""
    times = 1
    seconds = _transfer(bench, flows, times)
    while seconds < UPLINK_SECONDS / 2:
        times = min(8 * times, max(times + 1, round(times * UPLINK_SECONDS / seconds)))
        seconds = _transfer(bench, flows, times)
    timing = summary([_transfer(bench, flows, times) for _ in range(3)])
    return len(flows) * UPLINK_MESSAGE * times / timing.median


def _transfer(bench: Bench, flows: list[Flow], times: int) -> float:
    """Seconds (agreed) until every flow has delivered ``times`` messages and been acknowledged."""
    outgoing = [f for f in flows if f.source == bench.rank]
    incoming = [f for f in flows if f.target == bench.rank]

    def buffers(count: int, size: int) -> list[torch.Tensor]:
        return [torch.zeros(size, dtype=torch.uint8, device=bench.device) for _ in range(count)]

    data, acks = buffers(1, UPLINK_MESSAGE)[0], buffers(len(outgoing), ACK_BYTES)
    arriving, ack = buffers(len(incoming), UPLINK_MESSAGE), buffers(1, ACK_BYTES)[0]
    there = [dist.P2POp(dist.isend, data, f.target) for f in outgoing]
    there += [dist.P2POp(dist.irecv, b, f.source) for b, f in zip(arriving, incoming, strict=True)]
    back = [dist.P2POp(dist.irecv, a, f.target) for a, f in zip(acks, outgoing, strict=True)]
    back += [dist.P2POp(dist.isend, ack, f.source) for f in incoming]

    def once() -> None:
        for operations in [there] * times + [back]:
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()

    bench.agree(0.0)
    return bench.agree(timer([once], bench.device)(1))
