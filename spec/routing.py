"""Routing of one step: drawn from a trace, or from a stated assumption.

The planner predicts for these very tokens and the runtime forces them, so a prediction is checked on what it was
made for.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import MoeplanError
from .model import Model
from .trace import Trace
from .workload import Workload

ASSUMED_EXPONENT = 0.5
MAX_STEP_CHOICES = 2**25
"""Tokens x layers x top-k of one step: 72,000 tokens of DeepSeek-V3, at some 20 bytes a choice in a prediction."""
_DRAWS = 2**16  # at a time: they stay in the cache


@dataclass(frozen=True)
class Routing:
    """expert_ids, expert_weights: [tokens, moe_layers, top_k]; tokens in sequence-major order; id -1 is an identity
    expert.

    scale: tokens of the step for each of these, where they are a sample.
    """

    expert_ids: np.ndarray
    expert_weights: np.ndarray
    scale: float = 1.0

    @cached_property
    def by_layer(self) -> np.ndarray:
        """[moe_layers, tokens, top_k] expert ids."""
        return np.ascontiguousarray(self.expert_ids.transpose(1, 0, 2))

    def counts(self, num_experts: int) -> np.ndarray:
        """[moe_layers, experts] tokens per expert; expected ones where these tokens are a sample."""
        counts = np.stack([chosen_counts(ids, num_experts) for ids in self.by_layer])
        return counts if self.scale == 1 else counts * self.scale


def chosen_counts(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """[experts] how often ``ids`` (any shape) name each; identity experts, -1, are left out."""
    flat = ids.ravel()
    return np.bincount(flat[flat >= 0] if (flat < 0).any() else flat, minlength=num_experts)


def sample_routing(trace: Trace | None, model: Model, workload: Workload, seed: int, most: int) -> Routing:
    """The routing of as many whole sequences as choose at most ``most`` times, in place of all of them."""
    moe = model.moe_block().moe
    assert moe is not None
    each = workload.length * len(model.moe_layers) * moe.top_k
    sequences = min(workload.sequences, max(1, most // each))
    part = workload.model_copy(update={"sequences": sequences, "tokens": sequences * workload.length})
    drawn = draw_routing(trace, model, part, seed)
    return Routing(drawn.expert_ids, drawn.expert_weights, workload.sequences / sequences)


def check_shape(trace: Trace, model: Model, where: str = "trace") -> None:
    """A trace must have the model's mixture-of-experts layers, experts and top-k."""
    moe = model.moe_block().moe
    assert moe is not None
    got = (trace.layers, trace.num_experts, trace.top_k if not trace.counts_only else moe.top_k)
    want = (len(model.moe_layers), moe.num_experts, moe.top_k)
    if got != want:
        raise MoeplanError(
            f"{where}: has {got[0]} layers x {got[1]} experts, top-{got[2]}; "
            f"{model.name} has {want[0]} x {want[1]}, top-{want[2]}"
        )
    if not trace.counts_only and trace.zero_experts != moe.zero_experts:
        raise MoeplanError(
            f"{where}: has {trace.zero_experts} identity experts (zero_experts) beside the {trace.num_experts}; "
            f"{model.name} has {moe.zero_experts}"
        )


def check_size(workload: Workload, layers: int, top_k: int) -> None:
    """Raise MoeplanError where a step chooses more often than is planned for."""
    choices = workload.tokens * layers * top_k
    if choices > MAX_STEP_CHOICES:
        raise MoeplanError(
            f"workload {workload}: {workload.tokens:,} tokens x {layers:,} layers x top-{top_k:,} are {choices:,} "
            f"choices, at most {MAX_STEP_CHOICES:,} are planned for: give a step of fewer tokens"
        )


def draw_routing(trace: Trace | None, model: Model, workload: Workload, seed: int) -> Routing:
    """The step's routing: rows of the trace, or ``assumed_routing`` when there is none."""
    if trace is None or trace.counts_only:
        weights = None if trace is None else trace.expert_counts
        return assumed_routing(model, workload, seed, weights)
    return traced_routing(trace, workload, seed)


def traced_routing(trace: Trace, workload: Workload, seed: int) -> Routing:
    """That of the rows that ``traced_rows`` draws."""
    check_size(workload, trace.layers, trace.top_k)
    rows = traced_rows(trace, workload, seed)
    return Routing(trace.expert_ids[rows], trace.expert_weights[rows])


def traced_rows(trace: Trace, workload: Workload, seed: int) -> np.ndarray:
    """[tokens] of the trace: whole runs of consecutive rows for each sequence, from random sequences of it.

    Prefill takes the beginning of a sequence (going on into the next where it is shorter), or a random stretch where
    the trace is one long sequence; decode takes one random row of each. Sequences are drawn without replacement until
    the trace is used up.
    """
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(trace.seq_len)[:-1]])
    rows = []
    order: list[int] = []
    for _ in range(workload.sequences):
        if not order:
            order = list(rng.permutation(len(starts)))
        chosen = order.pop()
        first = starts[chosen]
        if workload.phase == "decode" or len(starts) == 1:
            first += rng.integers(trace.seq_len[chosen])
        rows.append((first + np.arange(workload.length)) % trace.tokens)
    return np.concatenate(rows)


def assumed_routing(model: Model, workload: Workload, seed: int, counts: np.ndarray | None = None) -> Routing:
    """Independent draws: expert of popularity rank r has probability proportional to (r + 1) ** -0.5.

    The popularity order is random per layer. With ``counts`` [moe_layers, experts] the probabilities are those
    counts instead. Top-k without replacement: of exponential times, each over its probability, the first k (which is
    the Gumbel trick without its outer logarithm); gate weights fall off geometrically. Identity experts stand in the
    popularity order like all others; beside ``counts``, which do not have them, each is as popular as the mean expert.
    """
    moe = model.moe_block().moe
    assert moe is not None
    rng = np.random.default_rng(seed)
    layers, experts, top_k = len(model.moe_layers), moe.router_outputs, moe.top_k
    check_size(workload, layers, top_k)
    ids = np.empty((layers, workload.tokens, top_k), np.int32)
    rows = max(1, _DRAWS // experts)
    for j in range(layers):
        if counts is None:
            popularity = (1.0 + rng.permutation(experts)) ** -ASSUMED_EXPONENT
        else:
            popularity = np.append(counts[j], np.full(moe.zero_experts, counts[j].mean())) + 1e-9
        for first in range(0, workload.tokens, rows):
            times = rng.random((min(rows, workload.tokens - first), experts))
            np.log(np.subtract(1.0, times, out=times), out=times)
            times *= -1 / popularity
            ids[j, first : first + rows] = _smallest(times, top_k)
    if moe.zero_experts:
        ids[ids >= moe.num_experts] = -1
    weights = (0.5 ** np.arange(top_k) / (0.5 ** np.arange(top_k)).sum()).astype(np.float32)
    by_token = ids.transpose(1, 0, 2)
    return Routing(by_token, np.broadcast_to(weights, by_token.shape).copy())


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """[rows, count] columns of the smallest ``values`` of each row, in rising order."""
    edge = np.partition(values, count - 1, axis=1)[:, count - 1 : count]
    place = np.flatnonzero(values <= edge)
    if len(place) != len(values) * count:  # equal values at an edge
        return np.argsort(values, axis=1)[:, :count]
    order = np.argsort(values.ravel()[place].reshape(-1, count), axis=1)
    return np.take_along_axis((place % values.shape[1]).reshape(-1, count), order, axis=1)


COPY_PHASES = 256
COPY_STEP = 159  # odd, so that consecutive tokens visit all phases; near 256 / golden ratio, so that they do so evenly


def copy_table(
    slots: tuple[tuple[int, ...], ...],
    shares: tuple[tuple[float, ...], ...] | None,
    hosts: list[int],
    num_experts: int,
) -> np.ndarray:
    """Which copy of an expert serves a token: [source device, expert, phase] -> device, int32.

    A token of global index t looks at phase ``(t * COPY_STEP) % COPY_PHASES``. With ``shares``, an expert's phases are
    divided by them (honoured to 1/256). Without, a copy on the token's own device serves it, else the copies on its
    host evenly, else all copies evenly. ``hosts`` [devices] numbers each device's host.
    """
    devices = len(slots)
    weight = np.zeros((num_experts, devices))
    for device, experts in enumerate(slots):
        for i, expert in enumerate(experts):
            weight[expert, device] = 1.0 if shares is None else shares[device][i]
    held, host_of = weight > 0, np.asarray(hosts)
    if not held.any(1).all():
        raise ValueError(f"no device serves expert {int(np.argmin(held.any(1)))}")
    if shares is not None:  # the same from everywhere
        return np.broadcast_to(divided(weight), (devices, num_experts, COPY_PHASES))
    table = np.empty((devices, num_experts, COPY_PHASES), np.int32)
    for source in range(devices):
        local = held & (host_of == host_of[source])
        near = np.where(local.any(1, keepdims=True), local, held).astype(float)
        near[held[:, source]] = np.eye(devices)[source]
        table[source] = divided(near)
    return table


def divided(weight: np.ndarray) -> np.ndarray:
    """[experts, phases] device of each phase, by the devices' weights [experts, devices]."""
    phases = (np.arange(COPY_PHASES) + 0.5) / COPY_PHASES
    bounds = np.cumsum(weight / weight.sum(1, keepdims=True), axis=1)
    return (phases[None, :, None] > bounds[:, None, :-1]).sum(2).astype(np.int32)
