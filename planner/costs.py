"""Durations from measured curves: what an operator or a collective of the runtime takes on these devices.

Nothing is fitted. An operator's seconds are read from its curve at the actual counts. A collective's seconds are read
from its measured equal-traffic curve, at the size whose equal exchange takes, in the flow model, as long as the actual
byte matrix does: exact for equal traffic, and the flow model only translates skew. Readings beyond what was measured
are collected in ``notes``.
"""

from dataclasses import dataclass

import numpy as np

from ..spec.cluster import SCOPES, Cluster
from ..spec.curve import Curve
from ..spec.executed import ELSE, not_executed
from ..spec.model import DTYPE_BYTES, Block, Model
from ..spec.operators import Collective, Shape, expert_shape
from .curves import Table
from .flows import FlowModel


@dataclass(frozen=True)
class Exchange:
    """One collective over ``group``: seconds alone and resource demands of each member.

    sizes: [source, target] bytes by position in the group, its own share excluded.
    """

    group: tuple[int, ...]
    sizes: np.ndarray
    seconds: tuple[float, ...]
    latency: float
    demands: tuple[dict[str, float], ...]


class Costs:
    """Reads the curves of one cluster for one model and dtype.

    asked: what the user typed for the model, which is what a command to type must name; by default its name.
    """

    def __init__(self, cluster: Cluster, model: Model, dtype: str, asked: str = "") -> None:
        self.cluster, self.model, self.dtype, self.asked = cluster, model, dtype, asked or model.name
        self.element_bytes = DTYPE_BYTES[dtype]
        self.devices = len(cluster.devices)
        self.hosts: list[int] = cluster.host_index.tolist()
        cores = np.array([kind.cpu_share if kind.type == "cpu" else 1.0 for kind in cluster.kinds])
        self._cores = cores[cluster.kind_index]
        self._beyond: dict[str, dict[str, float]] = {}
        self._operators: dict[tuple, Table] = {}
        self._collectives: dict[tuple, tuple[FlowModel, Table, Table]] = {}
        # What a search asks for again and again.
        self._readings: dict[tuple, float] = {}
        self._experts: dict[tuple, np.ndarray] = {}
        self._exchanges: dict[tuple, Exchange] = {}

    def operator(self, device: int, operator: str, shape: Shape, **at: float) -> float:
        """Seconds of one call on one device; 0 when any coordinate is 0."""
        if min(at.values()) <= 0:
            return 0.0
        key = (device, operator, *shape.values(), *at.values())
        if key not in self._readings:
            seconds, beyond = self.table(device, operator, shape).read(**at)
            if beyond:
                self._note(operator, at)
            self._readings[key] = float(seconds)
        return self._readings[key]

    def expert_ffn(self, device: int, block: Block, columns: int | np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Seconds of the grouped FFN with ``counts[e]`` rows for each expert, for one or more numbers of columns.

        The measured call has ``a`` active experts with equal rows n: curve(columns, a, n). With unequal rows every
        active expert takes its share of the call that would have its rows everywhere: the mean of
        curve(columns, a, n_e) over the active experts e; exact for equal rows.
        """
        active, times = np.unique(counts[counts > 0], return_counts=True)
        columns, shape = np.asarray(columns), expert_shape(block)
        if not len(active):
            return np.zeros(columns.shape)
        key = (device, *shape.values(), columns.tobytes(), active.tobytes(), times.tobytes())
        if key not in self._experts:
            experts = int(times.sum())
            table = self.table(device, "expert_ffn", shape)
            seconds, beyond = table.read(ffn=columns[..., None], experts=experts, tokens=active)
            if beyond.any():
                self._note("expert_ffn", {"ffn": int(columns.max()), "tokens": int(active.max())})
            self._experts[key] = (seconds * times).sum(-1) / experts
        return self._experts[key]

    def all_to_all(self, group: tuple[int, ...], sizes: np.ndarray) -> Exchange:
        """sizes: [source, target] bytes; what a device sends itself is free."""
        return self._collective("all_to_all", group, sizes)

    def all_gather(self, group: tuple[int, ...], own: np.ndarray) -> Exchange:
        """own: bytes of each member, all of which go to every other member, each copy by itself."""
        return self._collective("all_gather", group, np.repeat(np.asarray(own, float)[:, None], len(group), axis=1))

    def reduce_scatter(self, group: tuple[int, ...], own: np.ndarray) -> Exchange:
        """own: bytes of each member's result, which every other member sends it a partial of."""
        return self._collective("reduce_scatter", group, np.repeat(np.asarray(own, float)[None, :], len(group), axis=0))

    def all_reduce(self, group: tuple[int, ...], size: float) -> Exchange:
        """size: bytes of the whole buffer, which every member holds; traffic as a ring would send it."""
        members = len(group)
        return self._collective("all_reduce", group, np.full((members, members), 2 * size / members**2), size)

    def _collective(
        self, collective: Collective, group: tuple[int, ...], sizes: np.ndarray, equal: float | None = None
    ) -> Exchange:
        """A collective with these bytes [source, target]; ``equal``: where on its curve, if that is known."""
        if len(group) == 1:
            return Exchange(group, np.zeros((1, 1)), (0.0,), 0.0, ({},))
        key = (collective, group, sizes.astype(float).tobytes())
        if key not in self._exchanges:
            flow, curve, busy = self._measured(collective, group)
            sizes = np.where(flow.off, sizes, 0.0)
            flows = flow.seconds(sizes)
            size = flow.equal_size(flows.max()) if equal is None else max(equal, 1.0)
            whole, beyond = curve.read(bytes=size)
            if beyond:
                self._note(f"{collective} over devices {list(group)}", {"bytes": round(size)})
            share = flows / flows.max() if flows.max() > 0 else np.ones(len(group))
            least = min(float(curve.read(bytes=1)[0]), float(whole))  # who has nothing to move still takes part
            seconds = np.maximum(float(whole) * share, least)
            latency = float(min(flow.latency.max(), seconds.min()))
            demands = self._demands(flow, busy, group, sizes, seconds - latency)
            self._exchanges[key] = Exchange(group, sizes, tuple(seconds.tolist()), latency, demands)
        return self._exchanges[key]

    def _demands(
        self, flow: FlowModel, busy_curve: Table, group: tuple[int, ...], sizes: np.ndarray, seconds: np.ndarray
    ) -> tuple[dict[str, float], ...]:
        """Fractions of links, uplinks and compute that each member uses over the whole collective.

        They are averages over its longest member's time and never exceed a capacity in sum, so that a collective that
        runs alone is slowed by nothing.
        """
        duration = float(seconds.max())
        if duration <= 0:
            return tuple({} for _ in group)
        mean_size = (sizes.sum(0) + sizes.sum(1)) / (2 * (len(group) - 1))
        busy = busy_curve.read(bytes=np.maximum(mean_size, 1))[0]
        outward, inward = flow.crossing(sizes)
        used = {
            "compute": busy / self._cores[list(group)] / duration,
            "out": sizes.sum(1) / flow.out_rate / duration,
            "in": sizes.sum(0) / flow.in_rate / duration,
            "uplink out": _share(outward, flow.host, flow.uplink_out * duration),
            "uplink in": _share(inward, flow.host, flow.uplink_in * duration),
        }
        return tuple(
            {
                f"{resource} {flow.host[a] if resource.startswith('uplink') else i}": min(float(fraction[a]), 1.0)
                for resource, fraction in used.items()
                if fraction[a] > 0
            }
            for a, i in enumerate(group)
        )

    def _measured(self, collective: Collective, group: tuple[int, ...]) -> tuple[FlowModel, Table, Table]:
        key = (collective, group)
        if key not in self._collectives:
            entry = self.cluster.collective(collective, group)
            same = next((known[0] for (_, g), known in self._collectives.items() if g == group), None)
            self._collectives[key] = (same or FlowModel(self.cluster, group), Table(entry.curve), Table(entry.busy))
        return self._collectives[key]

    def link_seconds(self, size: int) -> tuple[float | None, float | None]:
        """Mean seconds of ``size`` bytes over a link inside a host, and over one between hosts; None without any."""
        seconds = np.array([link.curve.at(bytes=size).seconds for link in self.cluster.link_classes])
        counts, inside = self.cluster.link_counts(), SCOPES.index("host") + 1
        found = (counts[:inside].sum(0), counts[inside:].sum(0))
        within, between = (float(count @ seconds / count.sum()) if count.sum() else None for count in found)
        return within, between

    def table(self, device: int, operator: str, shape: Shape) -> Table:
        key = (device, operator, *shape.values())
        if key not in self._operators:
            curve: Curve = self.cluster.operator(device, operator, shape, self.dtype, self.asked, self._remedy())
            self._operators[key] = Table(curve)
        return self._operators[key]

    def _remedy(self) -> str:
        """What to do about a missing curve of a model that cannot be profiled."""
        missing = not_executed(self.model)
        return f"`moeplan profile` cannot measure {self.asked} ({missing}); {ELSE}" if missing else ""

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each curve that was read beyond what was measured, with the furthest such reading."""
        return tuple(
            f"extrapolated: {what} up to {', '.join(f'{name} {value:g}' for name, value in at.items())} "
            "lies beyond what was measured"
            for what, at in self._beyond.items()
        )

    def _note(self, what: str, at: dict[str, float]) -> None:
        known = self._beyond.setdefault(what, dict(at))
        known.update({name: max(value, known[name]) for name, value in at.items()})


def _share(amount: np.ndarray, host: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Each device's part of what its host's uplink can carry; in sum at most all of it."""
    total = np.bincount(host, amount, len(capacity))
    return amount / np.maximum(np.maximum(total, capacity), 1e-300)[host]
