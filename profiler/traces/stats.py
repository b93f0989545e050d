"""What a trace says: balance of the experts' load, affinity between layers, fan-out of tokens, shift between domains.

Shapes: T tokens, L layers with experts, E experts, K top-k, G devices.
Entropies and divergences are in bits. Placement here is always linear: consecutive experts share a device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...spec import MoeplanError, Trace
from ...spec.balance import balance
from ...spec.routing import chosen_counts

if TYPE_CHECKING:
    import pandas

DEFAULT_DEVICES, DEFAULT_HOSTS = 8, 2
SHUFFLES = 5


@dataclass(frozen=True)
class Affinity:
    """Mutual information of the top-1 experts of adjacent layers, in bits; boundary j joins layers j and j + 1.

    information: [L - 1], of the counted pairs (the plug-in estimate, biased upwards on few tokens).
    corrected: [L - 1], with Miller and Madow's first-order correction of that bias (1955).
    control: [shuffles, L - 1], plug-in, after permuting the tokens of every layer independently: the bias alone,
        at the same loads and number of tokens.
    corrected_control: [shuffles, L - 1].
    entropy: [L], of the top-1 expert; an upper bound on the information of the boundaries beside it.
    """

    information: np.ndarray
    corrected: np.ndarray
    control: np.ndarray
    corrected_control: np.ndarray
    entropy: np.ndarray

    @property
    def ratio(self) -> float:
        """Mean information over that of the shuffled control; 1 means no affinity."""
        return float(self.information.mean() / max(self.control.mean(), np.finfo(float).tiny))


@dataclass(frozen=True)
class FanOut:
    """Where a token's top-k experts live under linear placement.

    devices: [L, min(K, G) + 1], share of the tokens that need exactly 0, 1, 2, ... distinct devices.
    hosts: [L, min(K, hosts) + 1], the same for distinct hosts.
    """

    devices: np.ndarray
    hosts: np.ndarray

    @property
    def mean_devices(self) -> np.ndarray:
        """[L] distinct devices per token."""
        return self.devices @ np.arange(self.devices.shape[1])

    @property
    def mean_hosts(self) -> np.ndarray:
        """[L] distinct hosts per token."""
        return self.hosts @ np.arange(self.hosts.shape[1])


@dataclass(frozen=True)
class DomainShift:
    """Jensen-Shannon divergence of expert loads, in bits (0 the same, 1 disjoint), per layer [L].

    ``own`` and ``others`` are the divergences between the two halves of either trace: what to expect without a shift.
    """

    divergence: np.ndarray
    own: np.ndarray | None
    others: np.ndarray | None


@dataclass(frozen=True)
class TraceStats:
    """Statistics of one trace; ``affinity``, ``fan_out`` and ``halves`` are None where a trace has counts only, the
    first two also where tokens chose identity experts.

    expert_counts: [L, E], token-expert pairs.
    halves: [L], Jensen-Shannon divergence between the expert loads of the trace's two halves (None for one sequence).
    shift: from another trace, where one was given.
    """

    model: str
    tokens: int
    sequences: int
    top_k: int
    devices: int
    hosts: int
    expert_counts: np.ndarray
    affinity: Affinity | None
    fan_out: FanOut | None
    halves: np.ndarray | None
    shift: DomainShift | None = None

    @property
    def expert_imbalance(self) -> np.ndarray:
        """[L] load of the busiest expert over the mean; 1 is even, and a layer without tokens."""
        return balance(self.expert_counts)

    @property
    def device_imbalance(self) -> np.ndarray:
        """[L] load of the busiest device over the mean, under linear placement; the balance that ``place`` gives."""
        load = np.zeros((len(self.expert_counts), self.devices))
        np.add.at(load.T, linear_placement(self.expert_counts.shape[1], self.devices), self.expert_counts.T)
        return balance(load)

    @property
    def idle_experts(self) -> np.ndarray:
        """[L] experts that no token chose."""
        return (self.expert_counts == 0).sum(1)

    def frame(self) -> "pandas.DataFrame":
        """One row per layer with every number of the table; boundaries count for the layer before them, nan after."""
        import pandas as pd  # takes half a second, and few ask for it

        layers = len(self.expert_counts)
        columns = {"expert_imbalance": self.expert_imbalance, "device_imbalance": self.device_imbalance}
        columns["idle_experts"] = self.idle_experts
        if self.fan_out is not None:
            columns |= {"devices_per_token": self.fan_out.mean_devices, "hosts_per_token": self.fan_out.mean_hosts}
        if self.affinity is not None:
            own, shuffled = self.affinity.information, self.affinity.control.mean(0)
            columns |= {"affinity_bits": np.append(own, np.nan), "shuffled_bits": np.append(shuffled, np.nan)}
        if self.halves is not None:
            columns["halves_bits"] = self.halves
        if self.shift is not None:
            columns["shift_bits"] = self.shift.divergence
        return pd.DataFrame(columns, index=pd.RangeIndex(layers, name="layer"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: every number of the table, per layer or per boundary."""
        layers, experts = self.expert_counts.shape
        values: dict[str, Any] = {"model": self.model, "layers": layers, "experts": experts, "top_k": self.top_k}
        values |= {"tokens": self.tokens, "sequences": self.sequences, "devices": self.devices, "hosts": self.hosts}
        values["expert_imbalance"] = self.expert_imbalance.tolist()
        values["device_imbalance"] = self.device_imbalance.tolist()
        values["idle_experts"] = self.idle_experts.tolist()
        for name in ("affinity", "fan_out", "shift"):
            part = getattr(self, name)
            values[name] = part and {key: _plain(value) for key, value in vars(part).items()}
        if self.affinity:
            values["affinity"]["ratio"] = self.affinity.ratio
        values["halves"] = _plain(self.halves)
        return values


def linear_placement(num_experts: int, devices: int) -> np.ndarray:
    """[E] device of each expert: consecutive experts together, as engines place them by default.

    Where devices do not divide the experts, the first devices hold one more, as in the placements of ``place``.
    """
    blocks = np.array_split(np.arange(num_experts), devices)
    return np.repeat(np.arange(devices), [len(block) for block in blocks])


def trace_stats(
    trace: Trace,
    *,
    devices: int = DEFAULT_DEVICES,
    hosts: int = DEFAULT_HOSTS,
    other: Trace | None = None,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> TraceStats:
    """Balance, affinity and fan-out of a trace, on ``devices`` spread evenly over ``hosts``; shift from ``other``."""
    if not 1 <= hosts <= devices or devices % hosts:
        raise MoeplanError(f"{devices} devices do not divide over {hosts} hosts: give a multiple")
    if devices > trace.num_experts:
        raise MoeplanError(f"{devices} devices for {trace.num_experts} experts: give at most one device per expert")
    return TraceStats(
        model=trace.model,
        tokens=trace.tokens,
        sequences=len(trace.seq_len),
        top_k=trace.top_k,
        devices=devices,
        hosts=hosts,
        expert_counts=trace.expert_counts,
        affinity=_affinity(trace, shuffles, seed) if trace.tells_movement and trace.layers > 1 else None,
        fan_out=_fan_out(trace, devices, hosts) if trace.tells_movement else None,
        halves=_halves(trace),
        shift=domain_shift(trace, other) if other else None,
    )


def domain_shift(trace: Trace, other: Trace) -> DomainShift:
    """How far the expert loads of two traces of one model lie apart, beside the shift within each of them."""
    if trace.expert_counts.shape != other.expert_counts.shape:
        (layers, experts), (others, their) = trace.expert_counts.shape, other.expert_counts.shape
        raise MoeplanError(
            f"traces of different models: {layers} layers x {experts} experts against {others} x {their}; "
            "compare two traces of the same model"
        )
    return DomainShift(divergence(trace.expert_counts, other.expert_counts), _halves(trace), _halves(other))


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits between the rows of two arrays of counts [L, E] (Lin, 1991)."""
    p, q = (x / np.maximum(x.sum(1, keepdims=True), 1) for x in (p, q))
    return np.maximum(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2, 0.0)


def mutual_information(first: np.ndarray, second: np.ndarray, num_experts: int) -> tuple[float, float]:
    """Bits that one sequence of experts [T] tells about another: the plug-in estimate, and Miller-Madow's.

    Miller-Madow adds (cells seen - 1) / (2 T ln 2) bits to each of the three entropies of H(X) + H(Y) - H(X, Y).
    """
    joint = np.bincount(first * num_experts + second, minlength=num_experts**2).reshape(num_experts, num_experts)
    total = joint.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    entropies = _entropy(np.stack([rows, columns]) / total).sum() - _entropy(joint.reshape(1, -1) / total)[0]
    cells = np.count_nonzero(rows) + np.count_nonzero(columns) - np.count_nonzero(joint) - 1
    return max(float(entropies), 0.0), float(entropies + cells / (2 * total * np.log(2)))


def _affinity(trace: Trace, shuffles: int, seed: int) -> Affinity:
    rng = np.random.default_rng(seed)
    top1 = trace.expert_ids[:, :, 0].astype(np.int64)
    own = _boundaries(top1, trace.num_experts)
    shuffled = np.stack([_boundaries(rng.permuted(top1, axis=0), trace.num_experts) for _ in range(shuffles)])
    counts = np.stack([np.bincount(column, minlength=trace.num_experts) for column in top1.T])
    entropy = _entropy(counts / trace.tokens)
    return Affinity(own[:, 0], own[:, 1], shuffled[:, :, 0], shuffled[:, :, 1], entropy)


def _boundaries(top1: np.ndarray, num_experts: int) -> np.ndarray:
    """[L - 1, 2] plug-in and corrected information between adjacent columns of [T, L]."""
    return np.array([mutual_information(a, b, num_experts) for a, b in zip(top1.T[:-1], top1.T[1:], strict=True)])


def _fan_out(trace: Trace, devices: int, hosts: int) -> FanOut:
    device = linear_placement(trace.num_experts, devices)[trace.expert_ids]
    return FanOut(_distinct(device, devices), _distinct(device * hosts // devices, hosts))


def _distinct(places: np.ndarray, number: int) -> np.ndarray:
    """Shares of tokens by how many distinct places [T, L, K] they name."""
    ordered = np.sort(places, axis=2)
    distinct = 1 + (np.diff(ordered, axis=2) != 0).sum(2)
    bins = min(places.shape[2], number) + 1
    return np.stack([np.bincount(column, minlength=bins) for column in distinct.T]) / len(places)


def _halves(trace: Trace) -> np.ndarray | None:
    """Divergence between the first and the second half of the sequences."""
    if trace.counts_only or len(trace.seq_len) < 2:
        return None
    ends = np.cumsum(trace.seq_len)[:-1]
    cut = ends[np.abs(ends - trace.tokens / 2).argmin()]
    return divergence(
        _counts(trace.expert_ids[:cut], trace.num_experts), _counts(trace.expert_ids[cut:], trace.num_experts)
    )


def _counts(ids: np.ndarray, num_experts: int) -> np.ndarray:
    return np.stack([chosen_counts(ids[:, j], num_experts) for j in range(ids.shape[1])])


def _plain(values: np.ndarray | None) -> list | None:
    return None if values is None else values.tolist()


def _entropy(p: np.ndarray) -> np.ndarray:
    """Bits, of each row."""
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(1)
