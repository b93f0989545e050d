"""Durations from measured curves: what an operator or a collective of the runtime takes on these devices.

Nothing is fitted. An operator's seconds are read from its curve at the actual counts, once for each kind of device. A
collective's seconds are read from its measured equal-traffic curve, at the size whose equal exchange takes, in the
flow model, as long as the actual bytes do: exact for equal traffic, and the flow model only translates skew. Readings
beyond what was measured grow as the operator's work does, and are collected in ``beyond``.
"""

# B layers that are costed together, G devices, n members of a group, E experts

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..spec.cluster import SCOPES, Cluster
from ..spec.executed import ELSE, not_executed
from ..spec.levels import Groups
from ..spec.model import DTYPE_BYTES, Block, Model
from ..spec.operators import Collective, Shape, expert_shape
from .curves import Table
from .extrapolation import Extrapolation
from .flows import FlowModel
from .spread import Spread
from .traffic import Traffic
from .unmeasured import Unmeasured

LISTED = 64  # members up to which all pairs of a collective are listed
OFFLOAD_REMEDY = "measure it with `moeplan profile --model {} --dtype {} --offload FOLDER`"
MOST_LISTED = 256  # and of hosts whose links differ


RESOURCES = ("compute", "out", "in", "uplink out", "uplink in")


@dataclass(frozen=True)
class Exchange:
    """One collective over ``group`` for each of B layers: [B, n] seconds alone, [B] of which are latency.

    seconds: from when all members but one have come, each as late as its processors let it be; last: [B, n] of these
    from when the last has come.
    parts: where ``group`` is all devices and each of these groups has a collective of its own, all at the same time.
    """

    collective: Collective
    group: tuple[int, ...]
    traffic: Traffic | Spread
    seconds: np.ndarray
    latency: np.ndarray
    last: np.ndarray
    parts: Groups = ()

    @property
    def waiting(self) -> Groups:
        """Devices that wait for each other."""
        return self.parts or (self.group,)

    def only(self, index: int) -> "Exchange":
        """That of one layer."""
        if len(self.seconds) == 1:
            return self
        row = slice(index, index + 1)
        own = {name: getattr(self, name)[row] for name in ("seconds", "latency", "last")}
        return replace(self, traffic=self.traffic.only(index), **own)


class Measured(NamedTuple):
    """What is known of a collective over a group; see ``spec.cluster.CollectiveCurve``."""

    flow: FlowModel
    curve: Table
    busy: Table
    last: Table


class Costs:
    """Reads the curves of one cluster for one model and dtype.

    asked: what the user typed for the model, which is what a command to type must name; by default its name.
    """

    def __init__(self, cluster: Cluster, model: Model, dtype: str, asked: str = "") -> None:
        cluster.check_size()
        self.cluster, self.model, self.dtype, self.asked = cluster, model, dtype, asked or model.name
        self.element_bytes = DTYPE_BYTES[dtype]
        self.devices = len(cluster.devices)
        self.hosts: list[int] = cluster.host_index.tolist()
        self.kinds = cluster.kind_index
        self._cores = np.array([kind.cpu_share if kind.type == "cpu" else 1.0 for kind in cluster.kinds])
        self.representatives = [int(np.argmax(self.kinds == kind)) for kind in range(len(cluster.kinds))]
        self._of_kind = [np.flatnonzero(self.kinds == kind) for kind in range(len(cluster.kinds))]
        self.beyond = Unmeasured()
        self._operators: dict[tuple, Table] = {}
        self._collectives: dict[tuple, Measured] = {}
        self._flows: dict[tuple, FlowModel] = {}
        # What a search asks for again and again.
        self._readings: dict[tuple, np.ndarray] = {}
        self._exchanges: dict[tuple, Exchange] = {}

    def operator(self, operator: str, shape: Shape, **at: ArrayLike) -> np.ndarray:
        """Seconds of one call on every device, in the common shape [..., G] of the coordinates; 0 where one is 0."""
        points = {name: np.asarray(value) for name, value in at.items()}
        common = np.broadcast_shapes((self.devices,), *(value.shape for value in points.values()))
        key = (operator, *shape.values(), common, *(value.tobytes() for value in points.values()))
        if key not in self._readings:
            seconds = np.zeros(common)
            for devices in self._of_kind:
                mine = {name: np.broadcast_to(value, common)[..., devices] for name, value in points.items()}
                if min(value.max() for value in mine.values()) <= 0:
                    continue  # nothing to do, so that no curve is needed
                table = self.table(int(devices[0]), operator, shape)
                seconds[..., devices], beyond = table.read(**mine)
                if beyond.any():
                    self.beyond.add(operator, table.axes, {name: value[beyond] for name, value in mine.items()})
            self._readings[key] = seconds
        return self._readings[key]

    def expert_ffn(self, block: Block, columns: ArrayLike, counts: np.ndarray, devices: ArrayLike) -> np.ndarray:
        """[...] seconds of the grouped FFN with ``counts`` [..., E] rows for each expert and so many columns, on these
        devices; columns and devices broadcast to [...].

        The measured call has ``a`` active experts with equal rows n: curve(columns, a, n). With unequal rows every
        active expert takes its share of the call that would have its rows everywhere: the mean of
        curve(columns, a, n_e) over the active experts e; exact for equal rows.
        """
        shape = counts.shape[:-1]
        rows = counts.reshape(-1, counts.shape[-1])
        width = np.broadcast_to(columns, shape).ravel()
        kind = np.broadcast_to(self.kinds[np.asarray(devices)], shape).ravel()
        seconds = np.zeros(len(rows))
        for k in np.unique(kind):
            mine = np.flatnonzero((kind == k) & (width > 0))
            if len(mine):
                seconds[mine] = self._experts(self.representatives[k], block, width[mine], rows[mine])
        return seconds.reshape(shape)

    def _experts(self, device: int, block: Block, columns: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """[N] seconds on one device for [N] columns (above 0) and [N, E] rows."""
        call, expert = np.nonzero(counts > 0)
        active = np.bincount(call, minlength=len(counts))
        # Calls of equal width and active experts read one line of the curve.
        choices, line = np.unique(np.stack([columns, active]), axis=1, return_inverse=True)
        table = self.table(device, "expert_ffn", expert_shape(block))
        lines, tokens = table.lines(*choices), counts[call, expert]
        each, beyond = lines.read(line.ravel()[call], tokens)
        if beyond.any():
            far = {"ffn": columns[call[beyond]], "experts": active[call[beyond]], "tokens": tokens[beyond]}
            self.beyond.add("expert_ffn", table.axes, far)
        return np.bincount(call, each, len(counts)) / np.maximum(active, 1)

    def of_devices(self, of_kinds: np.ndarray) -> np.ndarray:
        """[devices, ...] from [kinds, ...]."""
        return of_kinds[self.kinds]

    def all_to_all(self, group: tuple[int, ...], traffic: Traffic | Spread) -> Exchange:
        return self._collective("all_to_all", group, traffic)

    def all_to_all_in(self, parts: Groups, traffic: Traffic) -> Exchange:
        """One in each of these groups, which together are all devices: at the same time, so that they share links and
        uplinks, while each waits for its own members only. traffic: among all devices, but inside the groups."""
        if len(parts) == 1:
            return self.all_to_all(parts[0], traffic)
        flow = self._flow_in(parts)
        flows, seconds = flow.seconds(traffic), np.zeros((traffic.count, self.devices))
        last = seconds.copy()
        for number, part in enumerate(parts):
            if len(part) > 1:
                members = list(part)
                size = flow.equal_size(flows[:, members].max(1), number)
                seconds[:, members], last[:, members] = self._read("all_to_all", part, flows[:, members], size)
        apart = [device for part in parts if len(part) > 1 for device in part]
        latency = np.minimum(flow.worst_latency, seconds[:, apart].min(1, initial=np.inf))
        return Exchange("all_to_all", tuple(range(self.devices)), traffic, seconds, latency, last, parts)

    def all_gather(self, group: tuple[int, ...], own: np.ndarray) -> Exchange:
        """own: [B, n] bytes of each member, all of which go to every other member, each copy by itself."""
        return self._known("all_gather", group, own, "outward")

    def reduce_scatter(self, group: tuple[int, ...], own: np.ndarray) -> Exchange:
        """own: [B, n] bytes of each member's result, which every other member sends it a partial of."""
        return self._known("reduce_scatter", group, own, "inward")

    def scatter(self, group: tuple[int, ...], own: np.ndarray) -> Exchange:
        """An all-to-all in which every member receives its own [B, n] bytes from every other."""
        return self._known("all_to_all", group, own, "inward")

    def all_reduce(self, group: tuple[int, ...], size: float) -> Exchange:
        """size: bytes of the whole buffer, which every member holds; traffic as a ring would send it."""
        members = len(group)
        sizes = np.full((1, members), 2 * size / members**2)
        return self._known("all_reduce", group, sizes, "outward", size)

    def least(self, collective: Collective, group: tuple[int, ...]) -> float:
        """Seconds that whoever comes last spends at least: of the fastest message, which need not be the smallest."""
        if len(group) == 1:
            return 0.0
        curve = self._measured(collective, group).last
        return float(curve.read(bytes=np.append(1.0, curve.values[0]))[0].min())

    def _known(
        self,
        collective: Collective,
        group: tuple[int, ...],
        own: np.ndarray,
        form: Literal["outward", "inward"],
        equal: float | None = None,
    ) -> Exchange:
        """Remembered for groups that are alike: the same curve over links of the same classes."""
        key = (collective, form, self._alike(collective, group), own.astype(float).tobytes())
        if key not in self._exchanges:
            traffic = self._uniform(collective, group, own.astype(float), form)
            self._exchanges[key] = self._collective(collective, group, traffic, equal)
        return replace(self._exchanges[key], group=group)

    def _uniform(
        self, collective: Collective, group: tuple[int, ...], own: np.ndarray, form: Literal["outward", "inward"]
    ) -> Traffic | Spread:
        """Every member sends (receives) its own [B, n] bytes to (from) every other."""
        if self.spreads(collective, group):
            ones = np.ones(own.shape)
            hosts = len(np.unique(self._measured(collective, group).flow.host))
            return Spread.of(own, ones, hosts) if form == "outward" else Spread.of(ones, own, hosts)
        return Traffic.outward(own) if form == "outward" else Traffic.inward(own)

    def spreads(self, collective: Collective, group: tuple[int, ...]) -> bool:
        """Whether the group has too many pairs to list, and hosts that are all alike; far too many, and as many members
        on each: links that differ then count as the slowest of them."""
        flow = self._measured(collective, group).flow if len(group) > LISTED else None
        return flow is not None and (flow.regular or (len(group) > MOST_LISTED and flow.even))

    def _collective(
        self, collective: Collective, group: tuple[int, ...], traffic: Traffic | Spread, equal: float | None = None
    ) -> Exchange:
        """A collective with this traffic; ``equal``: where on its curve, if that is known."""
        if len(group) == 1:
            none = np.zeros((traffic.count, 1))
            return Exchange(collective, group, traffic, none, none[:, 0], none)
        flow = self._measured(collective, group).flow
        flows = flow.seconds(traffic)
        size = flow.equal_size(flows.max(1)) if equal is None else np.full(traffic.count, max(equal, 1.0))
        seconds, last = self._read(collective, group, flows, size)
        latency = np.minimum(flow.worst_latency, seconds.min(1))
        return Exchange(collective, group, traffic, seconds, latency, last)

    def _read(
        self, collective: Collective, group: tuple[int, ...], flows: np.ndarray, size: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """[B, n] seconds of a collective at [B] ``size`` of its curves, and of these from when the last member has
        come; flows: [B, n] what the flow model says of it."""
        measured = self._measured(collective, group)
        if (beyond := measured.curve.read(bytes=size)[1]).any():
            what = f"{collective} over devices {_named(group)}"
            self.beyond.add(what, measured.curve.axes, {"bytes": size[beyond]})
        seconds = _by_member(measured.curve, flows, size)
        return seconds, np.minimum(_by_member(measured.last, flows, size), seconds)

    def busy(self, exchange: Exchange) -> np.ndarray:
        """[B, n] fraction of its compute that each member spends on the collective, over the longest member's time."""
        used = np.zeros(exchange.seconds.shape)
        moved = (exchange.traffic.sent() + exchange.traffic.received()) / 2
        for part in exchange.waiting:
            if len(part) > 1:
                members = list(part) if exchange.parts else slice(None)
                mean = np.maximum(moved[:, members] / (len(part) - 1), 1)
                used[:, members] = self._measured(exchange.collective, part).busy.read(bytes=mean)[0]
        cores = self._cores[self.kinds[list(exchange.group)]]
        return np.minimum(used / cores / self._duration(exchange), 1.0)

    def fractions(self, exchange: Exchange, index: int) -> np.ndarray:
        """[RESOURCES, n] fractions of compute, links and uplinks that each member of two or more uses over the whole
        collective of one layer.

        They are averages over its longest member's time and never exceed a capacity in sum, so that a collective that
        runs alone is slowed by nothing.
        """
        group = exchange.group
        flow = self._flow_of(exchange)
        duration, traffic = float(self._duration(exchange)[index, 0]), exchange.traffic
        sent, received = traffic.across(flow.host)
        used = (
            self.busy(exchange)[index],
            traffic.sent()[index] / flow.out_rate / duration,
            traffic.received()[index] / flow.in_rate / duration,
            _share(sent[index], flow.host, flow.uplink_out * duration),
            _share(received[index], flow.host, flow.uplink_in * duration),
        )
        return np.minimum(used, 1.0) if np.isfinite(duration) else np.zeros((len(RESOURCES), len(group)))

    def demands(self, exchange: Exchange, index: int, members: Sequence[int]) -> list[dict[str, float]]:
        """The same by resource, for some members (positions in the group)."""
        group = exchange.group
        if len(group) == 1:
            return [{} for _ in members]
        host, used = self._flow_of(exchange).host, self.fractions(exchange, index)
        return [
            {
                f"{resource} {host[a] if resource.startswith('uplink') else group[a]}": float(fraction)
                for resource, fraction in zip(RESOURCES, used[:, a], strict=True)
                if fraction > 0
            }
            for a in members
        ]

    @staticmethod
    def _duration(exchange: Exchange) -> np.ndarray:
        """[B, 1] seconds that the longest member's transfer works; infinite where it is all latency."""
        duration = (exchange.seconds - exchange.latency[:, None]).max(1, keepdims=True)
        return np.where(duration > 0, duration, np.inf)

    def _alike(self, collective: Collective, group: tuple[int, ...]) -> tuple:
        """Equal for groups whose collective of equal bytes is predicted equal."""
        if len(group) == 1:
            return ()
        measured = self._measured(collective, group)
        return id(measured.flow), id(measured.curve)

    def _measured(self, collective: Collective, group: tuple[int, ...]) -> Measured:
        key = (collective, group)
        if key not in self._collectives:
            entry, flow = self.cluster.collective(collective, group), self._flow(group)
            if (id(entry),) not in self._collectives:
                tables = (Table(entry.curve), Table(entry.busy), Table(entry.last or entry.curve))
                self._collectives[id(entry),] = Measured(flow, *tables)
            self._collectives[key] = self._collectives[id(entry),]._replace(flow=flow)
        return self._collectives[key]

    def _flow_of(self, exchange: Exchange) -> FlowModel:
        if exchange.parts:
            return self._flow_in(exchange.parts)
        return self._measured(exchange.collective, exchange.group).flow

    def _flow_in(self, parts: Groups) -> FlowModel:
        """That of all devices, of which only those in one part exchange."""
        if parts not in self._flows:
            self._flows[parts] = FlowModel(self.cluster, tuple(range(self.devices)), parts)
        return self._flows[parts]

    def _flow(self, group: tuple[int, ...]) -> FlowModel:
        """Groups with links of the same classes, each inside a host, share a flow model."""
        members = np.array(group)
        key: tuple = group
        if len(set(self.cluster.host_index[members].tolist())) == 1:
            key = (len(group), self.cluster.link_class_index(members[:, None], members[None, :]).tobytes())
        if key not in self._flows:
            self._flows[key] = FlowModel(self.cluster, group)
        return self._flows[key]

    def link_seconds(self, size: int) -> tuple[float | None, float | None]:
        """Mean seconds of ``size`` bytes over a link inside a host, and over one between hosts; None without any."""
        seconds = np.array([link.curve.at(bytes=size).seconds for link in self.cluster.link_classes])
        counts, inside = self.cluster.link_counts(), SCOPES.index("host") + 1
        found = (counts[:inside].sum(0), counts[inside:].sum(0))
        within, between = (float(count @ seconds / count.sum()) if count.sum() else None for count in found)
        return within, between

    def table(self, device: int, operator: str, shape: Shape) -> Table:
        key = (self.kinds[device], operator, *shape.values())
        if key not in self._operators:
            remedy = self._remedy() or (OFFLOAD_REMEDY.format(self.asked, self.dtype) if "offload" in operator else "")
            curve = self.cluster.operator(device, operator, shape, self.dtype, self.asked, remedy)
            self._operators[key] = Table(curve, Extrapolation(operator, shape, curve))
        return self._operators[key]

    def _remedy(self) -> str:
        """What to do about a missing curve of a model that cannot be profiled."""
        missing = not_executed(self.model)
        return f"`moeplan profile` cannot measure {self.asked} ({missing}); {ELSE}" if missing else ""


def _by_member(curve: Table, flows: np.ndarray, size: np.ndarray) -> np.ndarray:
    """[B, n] seconds of each member at [B] ``size``: the longest takes all of the curve's, the others their part."""
    longest = flows.max(1)
    whole = curve.read(bytes=size)[0]
    share = np.where(longest > 0, 1.0, 0.0)[:, None] * flows / np.where(longest > 0, longest, 1.0)[:, None]
    share[longest <= 0] = 1.0
    least = np.minimum(float(curve.read(bytes=1)[0]), whole)  # who has nothing to move still takes part
    return np.maximum(whole[:, None] * share, least[:, None])


def _named(group: tuple[int, ...]) -> str:
    """The devices of a group, long ones by their ends."""
    return str(list(group)) if len(group) <= 16 else f"{group[0]} to {group[-1]}"


def _share(amount: np.ndarray, host: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Each device's part of what its host's uplink can carry; in sum at most all of it."""
    total = np.bincount(host, amount, len(capacity))
    return amount / np.maximum(np.maximum(total, capacity), 1e-300)[host]
