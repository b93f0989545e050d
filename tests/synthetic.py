"""Synthetic clusters and models: plausible curves from a few numbers, for tests that need no measurement.

A device of speed v computes v * 100 GFLOP/s and moves v * 10 GB/s; every call costs 20 us. Links inside a host carry
``local`` bytes per second, links between hosts ``uplink``, which all devices of a host share.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product

from moeplan.spec import Cluster, Model
from moeplan.spec.cluster import (
    SCOPES,
    CollectiveCurve,
    Copies,
    Device,
    DeviceKind,
    Disk,
    Host,
    LinkClass,
    LinkRule,
    OperatorCurve,
    Provenance,
    Scope,
)
from moeplan.spec.curve import Axis, Curve
from moeplan.spec.levels import across_groups, inside_groups, two_levels
from moeplan.spec.model import DTYPE_BYTES, Attention, Block, Dense, Moe
from moeplan.spec.operators import (
    COLLECTIVES,
    OPERATORS,
    attention_shape,
    batch_shape,
    cache_shape,
    dense_shape,
    exchange_shape,
    expert_shape,
    frame_shape,
    levels_shape,
    mixer_shape,
    route_shape,
    vocabulary_shape,
)

FLOPS, BYTES, CALL, LATENCY = 1e11, 1e10, 20e-6, 50e-6
HOST_FLOPS, HOST_BYTES = 5e9, 5e9  # of a GPU's host
TOKENS = (1, 8, 64, 512, 4096)
SIZES = tuple(float(1 << i) for i in range(10, 25, 2))


def tiny_model(
    *,
    layers: int = 4,
    hidden: int = 64,
    ffn: int = 128,
    experts: int = 8,
    top_k: int = 2,
    dense: int = 0,
    shared: int = 0,
    zero: int = 0,
) -> Model:
    """A small gqa model: ``dense`` dense layers, then ``layers`` mixture-of-experts layers; zero: identity experts."""
    attention = Attention(heads=8, kv_heads=4, head_dim=16)
    moe = Moe(num_experts=experts, top_k=top_k, ffn_size=ffn, shared_ffn_size=shared, zero_experts=zero)
    blocks = []
    if dense:
        blocks.append(Block(count=dense, hidden_size=hidden, attention=attention, dense=Dense(ffn_size=4 * ffn)))
    blocks.append(Block(count=layers, hidden_size=hidden, attention=attention, moe=moe))
    return Model(name="tiny", family="test", vocab_size=256, blocks=tuple(blocks), dtype="f32")


def shortcut_model(shortcut: str, *, layers: int = 2, shared: int = 0, beside: bool = False) -> Model:
    """``layers`` layers whose experts read as ``shortcut`` says, each behind a dense one; beside: with a dense FFN."""
    dense, *_, experts = tiny_model(layers=1, dense=1, shared=shared).blocks
    changes = {"shortcut": shortcut} | ({"dense": dense.dense} if beside else {})
    pair = (dense, experts.model_copy(update=changes))
    return Model(name=f"shortcut-{shortcut}", family="test", vocab_size=256, blocks=pair * layers, dtype="f32")


def grid(axes: dict[str, Sequence[float]], seconds: Callable[..., float], linear: Sequence[str] = ()) -> Curve:
    """A curve of ``seconds(**coordinates)`` over a grid."""
    points = [seconds(**dict(zip(axes, point, strict=True))) for point in product(*axes.values())]
    return Curve(
        axes=tuple(
            Axis(name=name, values=tuple(values), beyond="linear" if name in linear else "flagged")
            for name, values in axes.items()
        ),
        median=tuple(points),
        spread=(0.0,) * len(points),
    )


def copying(rate: float) -> Curve:
    """Seconds over bytes."""
    return grid({"bytes": SIZES}, lambda bytes: CALL + bytes / rate)


def operators(
    model: Model, speed: float, devices: int, hosts: int, tensors: Sequence[int], dtype: str
) -> tuple[OperatorCurve, ...]:
    """Every curve that a plan for ``model`` reads on one device."""
    element = DTYPE_BYTES[dtype]

    def time(flops: float, moved: float) -> float:
        return CALL + flops / (FLOPS * speed) + moved / (BYTES * speed)

    found: dict[tuple, OperatorCurve] = {}

    def add(operator: str, shape: dict, curve: Curve) -> None:
        found[(operator, *shape.values())] = OperatorCurve(operator=operator, shape=shape, dtype=dtype, curve=curve)

    for block in dict.fromkeys(model.layers):
        D = block.hidden_size
        for tensor in tensors if block.attention else ():
            a = block.attention
            assert a is not None
            weights = a.parameters(D) / tensor

            def prefill(sequences: float, length: float, weights=weights, a=a, t=tensor, D=D) -> float:
                rows = sequences * length
                flops = 2 * rows * (weights + length * a.heads * a.head_dim / t)
                return time(flops, element * (weights + rows * D))

            def decode(sequences: float, context: float, weights=weights, a=a, t=tensor) -> float:
                return time(2 * sequences * weights, element * (weights + sequences * context * a.cache_values() / t))

            shape = attention_shape(block, tensor)
            counts = (1, 2, 4, 8, 16, 64)
            add("attention_prefill", shape, grid({"sequences": counts, "length": (16, 64, 256)}, prefill))
            add("attention_decode", shape, grid({"sequences": counts, "context": (64, 512, 4096)}, decode))
            if tensor == 1:

                def apart(sequences: float, context: float, decode=decode) -> float:
                    return decode(sequences, context) + (sequences - 1) * CALL

                add("attention_scattered", shape, grid({"sequences": counts, "context": (64, 512, 4096)}, apart))
                size = a.cache_values() * element
                keep = grid({"tokens": TOKENS}, lambda tokens, size=size: time(0, 3 * tokens * size))
                add("coherent_cache", cache_shape(block, devices), keep)
        for phase, name, points in (("prefill", "length", (16, 64, 256)), ("decode", "context", (64, 512))):
            sizes: dict[str, Sequence[float]] = {"sequences": (1, 8, 64), name: points}
            if block.counted:

                def mixer(sequences: float, length: float = 1, context: float = 0, P=block.counted.parameters) -> float:
                    return time(2 * sequences * length * P, element * P)

                add(f"mixer_{phase}", mixer_shape(block), grid(sizes, mixer))
                add(f"frame_{phase}", frame_shape(model), grid(sizes, lambda **at: CALL))
        ffns = [(block.dense.ffn_size, block.dense.gated)] if block.dense else []
        if block.moe:
            m = block.moe
            ffns += [(m.shared_ffn_size, True)] if m.shared_ffn_size else []

            def expert(ffn: float, experts: float, tokens: float, D: int = D) -> float:
                weights = 3 * D * ffn
                return time(2 * experts * tokens * weights, element * experts * (weights + 2 * tokens * D))

            def hosted(tokens: float, m: Moe = m, D: int = D) -> float:
                weights = 3 * D * m.ffn_size
                return 3 * CALL + 2 * tokens * weights / HOST_FLOPS + element * weights / HOST_BYTES

            columns = tuple(m.ffn_size * i // 8 for i in (1, 2, 4, 8))
            actives = tuple(sorted({1, min(2, m.num_experts), m.num_experts}))
            axes: dict[str, Sequence[float]] = {"ffn": columns, "experts": actives, "tokens": TOKENS}
            add("expert_ffn", expert_shape(block), grid(axes, expert, ("experts",)))
            tables = grid({"copied": (1.0, 8.0, 64.0)}, lambda copied: CALL + copied * 1e-5)
            add("by_batch", batch_shape(block, devices), tables)
            add("offload_host", expert_shape(block), grid({"tokens": TOKENS}, hosted))
            add("route", route_shape(block), grid({"tokens": TOKENS}, lambda tokens, D=D: time(0, 8 * tokens * D)))
            for operator in OPERATORS:
                own = ("ep_", "sharded_", "gathered_", "hierarchical_", "coherent_", "offload_")
                if operator.startswith(own) and operator not in ("coherent_cache", "offload_host"):
                    moving = grid({"tokens": TOKENS}, lambda tokens, D=D: time(0, 2 * tokens * D * element))
                    levels = operator.startswith("hierarchical_")
                    add(
                        operator,
                        levels_shape(block, devices, hosts) if levels else exchange_shape(block, devices),
                        moving,
                    )
        for size, gated in ffns:
            weights = 3 * D * size
            curve = grid({"tokens": TOKENS}, lambda tokens, w=weights: time(2 * tokens * w, element * w))
            add("dense_ffn", dense_shape(block, size, gated), curve)
    D, V = model.layers[-1].hidden_size, model.vocab_size
    add("embed", vocabulary_shape(model), grid({"tokens": TOKENS}, lambda tokens: time(0, tokens * D * element)))
    head = grid({"tokens": TOKENS}, lambda tokens: time(2 * tokens * D * V, D * V * element))
    add("head", vocabulary_shape(model), head)
    return tuple(found.values())


Members = tuple[tuple[int, ...], Scope | None]
"""How many members a group has on each host, most first; its scope, where hosts have several switches."""


def collective(
    name: str, shape: Members, local: float, uplink: float, busy: float = 1.0, late: float = 0.0
) -> CollectiveCurve:
    """A collective of groups of one shape; ``uplink``: a group's part, where several share one at the same time; busy:
    times as much of the processors as usual; late: seconds that the last of equally busy devices comes late."""
    members, scope = shape
    count = sum(members)
    across, sharing = count - min(members), max(members)
    rate = local if scope in (None, "switch") else local / 2

    def seconds(bytes: float) -> float:
        return CALL + LATENCY + bytes * max((count - 1) / rate, across * sharing / uplink)

    taken = grid({"bytes": SIZES}, lambda bytes: busy * (1e-5 + 2 * (count - 1) * bytes / 1e10))
    whole = grid({"bytes": SIZES}, lambda bytes: late + seconds(bytes))
    last = grid({"bytes": SIZES}, seconds) if late else None
    return CollectiveCurve(collective=name, members=members, scope=scope, curve=whole, busy=taken, last=last)


def group_shape(devices: Sequence[Device]) -> Members:
    """The shape of a group of these devices."""
    members = tuple(sorted(Counter(device.host for device in devices).values(), reverse=True))
    switches = {device.switch for device in devices}
    if None in switches:
        return members, None
    return members, "cluster" if len(members) > 1 else "host" if len(switches) > 1 else "switch"


def link_classes(local: float, uplink: float, switches: int) -> tuple[LinkClass, ...]:
    """A class for each scope, called like it."""
    rates = {"host": local if switches == 1 else local / 2, "cluster": min(local, uplink)}
    rates |= {} if switches == 1 else {"switch": local}

    def link(scope: str, rate: float) -> LinkClass:
        curve = grid({"bytes": SIZES}, lambda bytes: LATENCY + bytes / rate)
        return LinkClass(name=scope, latency=LATENCY, curve=curve)

    return tuple(link(scope, rates[scope]) for scope in SCOPES if scope in rates)


def cluster(
    model: Model,
    speeds: Sequence[Sequence[float]] = ((1.0, 1.0), (1.0, 1.0)),
    *,
    local: float = 4e9,
    uplink: float = 1e9,
    memory: float | Sequence[float] = 4 * 2**30,
    dtype: str = "f32",
    tensors: Sequence[int] = (1, 2, 4),
    switches: int = 1,
    busy: float = 1.0,
    late: float = 0.0,
    disk: float | None = None,
    copied: float | None = None,
) -> Cluster:
    """One device per speed, one host per group of speeds; a kind per speed.

    tensors: degrees of tensor parallelism to have curves for, where they divide every host. switches: of each host,
    with as many of its devices each, one after another; between them links carry half of ``local``. busy: processor
    time of collectives, in times of what is usual here. disk: bytes per second of its reads, where there is one.
    copied: bytes per second between a host's memory and its devices, which are GPUs then.
    """
    flat = [speed for group in speeds for speed in group]
    n, per_host = len(flat), [len(group) for group in speeds]
    tensors = [t for t in tensors if all(count % t == 0 for count in per_host)]
    memories = [memory] * n if isinstance(memory, int | float) else list(memory)
    kinds = tuple(
        DeviceKind(
            name=f"speed {speed:g}",
            type="cuda" if copied else "cpu",
            product="synthetic",
            copies=copied and Copies(to_device=copying(copied), to_host=copying(copied)),
            stream_bandwidth=BYTES * speed,
            operators=operators(model, speed, n, len(speeds), tensors, dtype),
            disk=disk and Disk(folder="/disk", read=copying(disk)),
        )
        for speed in dict.fromkeys(flat)
    )
    seats = [(h, s * switches // count) for h, count in enumerate(per_host) for s in range(count)]
    devices = tuple(
        Device(
            kind=f"speed {speed:g}",
            host=f"host{h}",
            switch=str(switch) if switches > 1 else None,
            memory_bytes=int(bytes),
        )
        for speed, (h, switch), bytes in zip(flat, seats, memories, strict=True)
    )
    groups = [devices[i : i + t] for t in dict.fromkeys((*tensors, n)) for i in range(0, n, t) if t > 1]
    shapes = dict.fromkeys(map(group_shape, groups), 1)
    if two_levels(hosts := [device.host for device in devices]):
        for levels, at_once in ((inside_groups(hosts), 1), (across := across_groups(hosts), len(across))):
            for group in levels:
                if len(group) > 1:
                    shapes.setdefault(group_shape([devices[i] for i in group]), at_once)
    rates = {"uplink_out": uplink, "uplink_in": uplink} if len(speeds) > 1 else {}
    classes = link_classes(local, uplink, switches)
    return Cluster(
        kinds=kinds,
        devices=devices,
        hosts=tuple(Host(name=f"host{h}", **rates) for h in range(len(speeds))),
        link_classes=classes,
        link_rules=tuple(LinkRule(scope=link.name, link=link.name) for link in classes),
        collectives=tuple(
            collective(name, shape, local, uplink / at_once, busy, late)
            for shape, at_once in shapes.items()
            for name in COLLECTIVES
        ),
        provenance=Provenance(created="", command="synthetic", versions={}, seconds=0.0, models=(model.name,)),
    )
