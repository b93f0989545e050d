"""MoNTA's case: under tensor parallelism t devices hold the same tokens, and a plain all-to-all sends each of them.

    python -m moeplan.benchmarks.duplicates [--tensor 4] [--gbit 0.25] [--tokens 64,256,1024] [--output FILE.md]

Two emulated hosts of t devices (Linux and root); each host is one tensor group. ``duplicate``: every device sends all
tokens of its group to their experts, as the all-to-all of DeepSpeed-MoE without dropping does, in moeplan's own rows.
``ep`` and ``hierarchical``, as moeplan runs them: a device sends its part of the group's tokens, and the outputs are
brought together inside the group. All three end with the same outputs on every device, compared before they are timed.
Exchange: all of a layer's seconds that are not its experts', mean over devices; medians over rounds in turn.
"""

import argparse
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.layers_methods import Batch, Shape, Weights, make_batch, make_weights
from moeplan.runtime.collectives import all_gather
from moeplan.runtime.groups import consecutive_group, open_levels
from moeplan.runtime.launch import Lab, LabLauncher, LabSpec, Rank
from moeplan.runtime.layout import Layout
from moeplan.runtime.memory import keep_freed_memory
from moeplan.runtime.strategies import LayerContext, Region, strategy_of
from moeplan.spec.document import write_atomically
from moeplan.spec.errors import MoeplanError
from moeplan.spec.layout import even
from moeplan.spec.plan import LayerPlan, Strategy

HERE = Path(__file__).parent
ENTRY = "moeplan.benchmarks.duplicates:measure"
SHAPE = Shape(experts=32, top_k=8, hidden=1024, ffn=64)  # small experts: the exchange is what is compared
WAYS = ("duplicate", "ep", "hierarchical")
CORES = 1.8  # of the machine's two, for all devices together

Way = Callable[[Callable[[str], None]], Tensor]


class Laps:
    """Seconds of each part of a call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = perf_counter()

    def __call__(self, part: str) -> None:
        now = perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


def layer_of(strategy: Strategy, weights: Weights, context: LayerContext, world: int) -> Any:
    """The layer with consecutive experts on each device."""
    each = SHAPE.experts // world
    slots = tuple(tuple(range(g * each, (g + 1) * each)) for g in range(world))
    layer = strategy_of(LayerPlan(strategy=strategy, slots=slots), context)
    here = slice(context.rank * each, (context.rank + 1) * each)
    layer.prepare(weights.gate_up[here], weights.down[here])
    return layer


def ways(batch: Batch, layers: dict[str, Any], tensor: int, rank: int, world: int, group: Any) -> dict[str, Way]:
    """Calls that return the outputs of all tokens of the group on each of its devices; batch: tokens of all groups."""
    groups, tokens = world // tensor, len(batch.x)
    held = even(tokens, groups)
    start = sum(held[: rank // tensor])
    whole = slice(start, start + held[rank // tensor])
    copies = tuple(count for count in held for _ in range(tensor))
    parts = tuple(part for count in held for part in even(count, tensor))
    divided = Layout(rank, 1, parts, parts, 1)
    of_group = parts[rank // tensor * tensor : (rank // tensor + 1) * tensor]

    def given(own: slice) -> list[Tensor]:
        return [t[own] for t in (batch.x, batch.ids, batch.weights, batch.residual)]

    def duplicate(lap: Callable[[str], None]) -> Tensor:
        return layers["ep"].forward(*given(whole), Layout(rank, 1, copies, copies, 1), lap)

    def dropped(name: str) -> Way:
        def call(lap: Callable[[str], None]) -> Tensor:
            y = layers[name].forward(*given(divided.own), divided, lap)
            y = all_gather(y, of_group, group)
            lap("gather")
            return y

        return call

    return {"duplicate": duplicate, "ep": dropped("ep"), "hierarchical": dropped("hierarchical")}


def measure(rank: Rank, job: dict[str, Any]) -> dict[str, Any]:
    """job: ``tensor``, ``tokens`` of all groups, ``rounds``. Result: ``rows`` {tokens: {way: [[exchange, whole] of each
    round]}}. Raises MoeplanError where outputs differ."""
    keep_freed_memory()
    names = list(dict.fromkeys(rank.hosts))
    hosts, dtype = [names.index(host) for host in rank.hosts], torch.float32
    region = Region(dtype, rank.device)
    context = LayerContext(rank.rank, hosts, SHAPE.moe(), SHAPE.hidden, rank.device, region, open_levels(hosts))
    group, weights = consecutive_group(job["tensor"]), make_weights(SHAPE, dtype, 1)
    layers = {name: layer_of(name, weights, context, rank.world) for name in ("ep", "hierarchical")}
    rows: dict[str, dict[str, list[list[float]]]] = {}
    with torch.inference_mode():
        for tokens in job["tokens"]:
            batch = make_batch(SHAPE, dtype, tokens, "balanced", rank.rank, rank.world)
            called = ways(batch, layers, job["tensor"], rank.rank, rank.world, group)
            outputs = {name: call(lambda part: None) for name, call in called.items()}
            for name, y in outputs.items():
                error = float((y - outputs["duplicate"]).norm() / outputs["duplicate"].norm())
                if not error < 1e-5:
                    raise MoeplanError(f"{name}: output differs from that of the duplicates by {error:.1e}")
            found: dict[str, list[list[float]]] = {name: [] for name in called}
            for i in range(job["rounds"]):
                for name, call in called.items():
                    dist.barrier()
                    laps, begin = Laps(), perf_counter()
                    call(laps)
                    whole = perf_counter() - begin
                    found[name].append([whole - laps.seconds["expert"], whole])
                rank.emit({"what": f"{tokens} tokens, round {i + 1}"})
            rows[str(tokens)] = found
    return {"rows": rows}


def table(results: list[dict[str, Any]]) -> str:
    """Milliseconds of the exchange and of the layer, and what dropping gains."""
    head = "| tokens | way | exchange ms | spread | duplicate / it | layer ms | duplicate / it |"
    lines = [head, "|--:|---|--:|--:|--:|--:|--:|"]
    for tokens in results[0]["rows"]:
        taken = np.array(
            [[result["rows"][tokens][way] for way in WAYS] for result in results]
        )  # [ranks, ways, rounds, 2]
        exchange, layer = taken[..., 0].mean(0), taken[..., 1].max(0)
        middle, whole = np.median(exchange, axis=1), np.median(layer, axis=1)
        for i, way in enumerate(WAYS):
            low, high = np.percentile(exchange[i], (10, 90))
            lines.append(
                f"| {tokens} | {way} | {middle[i] * 1e3:.1f} | {(high - low) / middle[i]:.0%} | "
                f"{middle[0] / middle[i]:.2f} | {whole[i] * 1e3:.1f} | {whole[0] / whole[i]:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=4)
    parser.add_argument("--gbit", type=float, default=0.25)
    parser.add_argument("--tokens", default="64,256,1024", help="of both hosts together, comma-separated")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "duplicates.md")
    args = parser.parse_args()
    tensor: int = args.tensor
    if SHAPE.experts % (2 * tensor):
        parser.error(f"--tensor: 2 x {tensor} devices must divide {SHAPE.experts} experts")
    share = CORES / (2 * tensor)
    hosts = [{"name": name, "ranks": tensor, "cpu_share": share} for name in "ab"]
    job = {"tensor": tensor, "tokens": [int(text) for text in args.tokens.split(",")], "rounds": args.rounds}
    with Lab(LabSpec.model_validate({"name": "duplicates", "hosts": hosts, "uplink_gbit": args.gbit})) as lab:
        results = LabLauncher(lab).run(ENTRY, job, timeout=120)
    s = SHAPE
    command = shlex.join(["python", "-m", "moeplan.benchmarks.duplicates", *sys.argv[1:]])
    text = (
        f"# Tokens that tensor-parallel devices share, sent once or by each\n\n{processor()}, Linux "
        f"{platform.release()}; `{command}`. Two emulated hosts "
        f"of {tensor} devices of {share:g} cores, {args.gbit:g} Gbit/s between them; {s.experts} experts of {s.ffn}, "
        f"top-{s.top_k}, hidden {s.hidden}, f32. Exchange: what is not the experts' time, mean over devices; layer: "
        "the slowest device; medians over interleaved rounds, spread (90th - 10th percentile) / median. Outputs are "
        f"equal.\n\n{table(results)}\n"
    )
    write_atomically(args.output, lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()
