"""Expert kernels beside what else computes the same layer, and beside this machine's limits.

    python benchmarks/kernels.py [--quick] [--shapes NAME ...] [--tokens N ...] [--dtypes f32 bf16]

Layers of the shapes of four models, with the routing of a recorded trace (by default the one that ships), `expert_ffn`
without gradients and a step of training (forward, and the gradients of all inputs; of Mixtral a quarter of the columns,
as on each of four devices). Calls are interleaved: each alternative once a round, after a call that does not count.
Medians, ± half the distance between the quartiles. Weights are cold: where those of a call are less than 512 MiB, the
next call uses other experts. Results are compared with one another before they are timed. "moeplan grouped" is
moeplan's own other implementation, which runs where there is no compiler; "best other" leaves it out. "slower": over
three times the fastest alternative at fewer tokens, and left out here; "too long": over --longest seconds there.
Switch's experts in Transformers are single parameters, of which idle ones get no gradient; everyone else gives zeros.

The roofline of a call is the greater of bytes / stream and flops / peak. Bytes and flops are those that the routed
tokens need (`runtime/kernels/counting.py`); stream is the faster read of 512 MiB (a sum, or a product with a vector),
peak the faster square product of the dtype, torch's or an `esmm` of one expert. Both take their turns among the calls
of the row and are medians like theirs: what a shared machine's memory gives varies by half within minutes. "possible"
is the speedup over the best other of a call that takes no longer than the roofline. Prints the tables and writes them,
with hardware and command, to benchmarks/results/kernels.md.

DeepSpeed-MoE is measured where it is installed. In an environment beside the project's:
`DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed==0.19.8`
"""

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.kernels_alternatives import (
    METHODS,
    OURS,
    Layer,
    Method,
    Shape,
    UnavailableError,
    make_layer,
)
from moeplan.benchmarks.kernels_measure import (
    Limits,
    Probes,
    Timing,
    interleaved,
    peak_memory,
    recorded_routing,
    ring,
    seconds,
)
from moeplan.runtime.kernels.counting import count_expert_ffn, count_expert_ffn_backward
from moeplan.runtime.kernels.registry import choose
from moeplan.spec import Trace

ROOT = Path(__file__).parents[1]
SHAPES = (
    Shape("mixtral", 4096, 14336, 8, 2),
    Shape("deepseek-lite", 2048, 1408, 64, 6),
    Shape("gpt-oss", 2880, 2880, 32, 4, "swiglu_clamped"),
    Shape("switch", 768, 3072, 64, 1, "relu", 1),
)
TOKENS = (1, 8, 64, 512, 2048)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
AGREE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
FAR = 3.0  # what takes over so many times the fastest is left out at more tokens
WIDEST = 3584  # columns of a training step, where a whole Mixtral layer with gradients is more memory than many have


class Row(NamedTuple):
    """What one case gave."""

    shape: Shape
    dtype: torch.dtype
    tokens: int
    training: bool
    times: dict[str, Timing | str]
    flops: int
    moved: int
    limits: Limits

    @property
    def ours(self) -> float:
        found = self.times["moeplan"]
        assert isinstance(found, Timing)
        return found.median

    @property
    def roofline(self) -> float:
        return self.limits.roofline(self.flops, self.moved)

    @property
    def best_other(self) -> float:
        """NaN where all others are left out."""
        others = (t.median for name, t in self.times.items() if name not in OURS and isinstance(t, Timing))
        return min(others, default=math.nan)


class Bench:
    """Measures, and collects the lines of the report."""

    def __init__(self, trace: Trace, budget: float, drop_from: int, longest: float, console: Console) -> None:
        self.trace, self.budget, self.drop_from, self.longest, self.console = trace, budget, drop_from, longest, console
        self.probes, self.rows, self.lines = Probes(), list[Row](), list[str]()

    def part(self, shape: Shape, dtype: torch.dtype, tokens: tuple[int, ...], training: bool) -> None:
        """One table: a shape, a type, with or without gradients."""
        layer = make_layer(shape, dtype)
        methods: dict[str, Method | str] = {}
        for name, build in METHODS.items():
            if training and name == "Transformers" and shape.matrices == 2:
                methods[name] = "-"  # a zeroed gradient of the whole layer for each expert: minutes
                continue
            try:
                methods[name] = build(layer)
            except UnavailableError as error:
                methods[name] = "-" if shape.matrices == 1 and "Transformers" in name else str(error)
        rows = list[Row]()
        for n in sorted(tokens):
            rows.append(self._case(layer, methods, n, training))
            for name, t in rows[-1].times.items():
                slow = isinstance(t, Timing) and t.median > FAR * rows[-1].best_other
                if slow and n >= self.drop_from and name != "moeplan":
                    methods[name] = "slower"
                elif isinstance(t, Timing) and t.median > self.longest and name != "moeplan":
                    methods[name] = "too long"
        del layer, methods
        gc.collect()  # modules refer to themselves, and a layer is gigabytes
        self.rows += rows
        self._table(shape, dtype, training, rows)

    def _case(self, layer: Layer, methods: dict[str, Method | str], tokens: int, training: bool) -> Row:
        shape, dtype = layer.shape, layer.down.dtype
        ids, weights = recorded_routing(self.trace, shape.experts, shape.top_k, tokens)
        x = torch.randn(tokens, shape.model, generator=torch.Generator().manual_seed(1)).to(dtype)
        dy = torch.randn(tokens, shape.model, generator=torch.Generator().manual_seed(2)).to(dtype)
        expert_bytes = (shape.matrices + 1) * shape.model * shape.ffn * dtype.itemsize
        routes = ring(ids, shape.experts, expert_bytes)
        able = {name: m for name, m in methods.items() if isinstance(m, Method)}

        def caller(method: Method) -> Any:
            return lambda number: call(method, x, routes[number % len(routes)], weights, dy if training else None)

        calls = {name: caller(method) for name, method in able.items()}
        results, first = {}, []
        for name, run in calls.items():
            first.append(seconds(lambda: results.update({name: run(0)[:3]})))  # noqa: B023 called at once
        compare(results, AGREE[dtype])
        probes = self.probes.calls(dtype)
        first += [seconds(lambda: probe(0)) for probe in probes]  # noqa: B023 called at once
        timings = interleaved(list(calls.values()), probes, first, self.budget)
        measured = dict(zip(calls, timings, strict=False))
        times = {name: m for name, m in methods.items() if isinstance(m, str)} | measured
        limits = self.probes.limits(timings[len(calls) :])
        sizes = shape.experts, shape.matrices, shape.ffn, shape.model, dtype
        forward = count_expert_ffn(ids, *sizes, biases=shape.biases, save=training)
        backward = count_expert_ffn_backward(ids, *sizes, biases=shape.biases)
        flops = forward.flops + training * backward.flops
        moved = forward.bytes + training * backward.bytes
        return Row(shape, dtype, tokens, training, times, flops, moved, limits)

    def memory(self, shapes: list[Shape], dtypes: list[str], trace: Path) -> None:
        """Peak memory of a call at 2,048 tokens, each shape in a process of its own."""
        self._say("\n## Memory of a call of 2,048 tokens, beyond inputs, weights and output (MiB)\n")
        self._line("shape", "dtype", *METHODS, "of padded", "of sorted copy")
        self._line(*["---"] * (len(METHODS) + 4))
        for shape in shapes:
            for dtype in dtypes:
                command = [sys.executable, __file__, "--trace", str(trace), "--longest", str(self.longest)]
                command += ["--memory-of", shape.name, dtype]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
                peak = json.loads(done.stdout.splitlines()[-1])
                mib = [f"{peak[name] / 2**20:.1f}" if name in peak else "-" for name in METHODS]
                copies = "padded bmm", "grouped_mm"
                ratios = [f"{peak['moeplan'] / peak[name]:.2f}" if name in peak else "-" for name in copies]
                self._line(shape.name, dtype, *mib, *ratios)

    def summary(self) -> None:
        self._say("\n## Against the targets\n")
        self._line(
            "rows",
            "share of the roofline, mean",
            "least",
            "speedup over the best other, least",
            "median",
            "at 1 and 8 tokens: least",
            "rows of 2.5 and more",
            "rows where 2.5 is possible",
            "over moeplan grouped, least",
        )
        self._line(*["---"] * 9)
        for training in (False, True):
            for label, dtype in DTYPES.items():
                rows = [r for r in self.rows if r.training == training and r.dtype == dtype]
                if rows:
                    self._line(f"{'training' if training else 'forward'} {label} ({len(rows)})", *self._summary(rows))

    def _summary(self, rows: list[Row]) -> list[str]:
        # A call that is faster than the probes' medians counts as 100 %.
        share = [min(1.0, r.roofline / r.ours) for r in rows]
        beside = [r for r in rows if not math.isnan(r.best_other)]
        speedup = [r.best_other / r.ours for r in beside]
        few = [r for r in beside if r.tokens <= 8]
        possible = [r.roofline * 2.5 <= r.best_other for r in few]
        vendor = [t.median / r.ours for r in rows if isinstance(t := r.times["moeplan grouped"], Timing)]
        return [
            f"{np.mean(share):.0%}",
            f"{min(share):.0%}",
            f"{min(speedup):.2f}" if beside else "-",
            f"{np.median(speedup):.2f}" if beside else "-",
            f"{min(r.best_other / r.ours for r in few):.2f}" if few else "-",
            f"{sum(r.best_other / r.ours >= 2.5 for r in few)} of {len(few)}",
            f"{sum(possible)} of {len(few)}",
            f"{min(vendor):.2f}" if vendor else "-",
        ]

    def _table(self, shape: Shape, dtype: torch.dtype, training: bool, rows: list[Row]) -> None:
        kind = "training step" if training else "forward"
        s = shape
        self._say(
            f"\n## {s.name}, {str(dtype).removeprefix('torch.')}, {kind} (ms)\n\n"
            f"D {s.model}, H {s.ffn}, E {s.experts}, K {s.top_k}, {s.activation}"
            f"{', gated' if s.matrices == 2 else ''}{', biases' if s.biases else ''}\n"
        )
        limits = "stream, GB/s", "peak, GFLOP/s", "bound", "roofline", "share"
        self._line("tokens", *METHODS, "best other / moeplan", "possible", *limits)
        self._line(*["---"] * (len(METHODS) + 8))
        for row in rows:
            found = [row.times[name] for name in METHODS]
            cells = [t if isinstance(t, str) else milliseconds(t) for t in found]
            best = row.best_other
            ratio, possible = ("-" if math.isnan(best) else f"{best / t:.2f}" for t in (row.ours, row.roofline))
            stream, peak = f"{row.limits.stream / 1e9:.1f}", f"{row.limits.peak / 1e9:.0f}"
            bound, least = row.limits.bound(row.flops, row.moved), f"{1e3 * row.roofline:.3g}"
            share = f"{row.roofline / row.ours:.0%}"
            self._line(f"{row.tokens:,}", *cells, ratio, possible, stream, peak, bound, least, share)

    def _line(self, *cells: str) -> None:
        self._say(f"| {' | '.join(cells)} |")

    def _say(self, text: str) -> None:
        self.lines.append(text)
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def call(method: Method, x: Tensor, ids: Tensor, weights: Tensor, dy: Tensor | None) -> list[Tensor]:
    """The output and, with dy, the gradients of x, the gate weights and the parameters (None where one has none)."""
    if dy is None:
        with torch.inference_mode():
            return [method.run(x, ids, weights)]
    leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
    for parameter in method.parameters:
        parameter.requires_grad_()
    y = method.run(leaves[0], ids, leaves[1])
    gradients = torch.autograd.grad(y, [*leaves, *method.parameters], dy, allow_unused=True)
    for parameter in method.parameters:
        parameter.requires_grad_(False)
    return [y.detach(), *gradients]


def compare(results: dict[str, list[Tensor]], agree: float) -> None:
    """Output, and gradients of x and of the gate weights, of everyone against ours."""
    for name, found in results.items():
        for got, wanted in zip(found, results["moeplan"], strict=True):
            error = (got.float() - wanted.float()).norm() / wanted.float().norm()
            if not error <= agree:
                raise SystemExit(f"{name} differs from moeplan by {error:.1e} of the norm")


def milliseconds(t: Timing) -> str:
    return f"{1e3 * t.median:.3g} ± {1e3 * t.spread:.1g}" if t.runs > 2 else f"{1e3 * t.median:.3g}"


def memory_of(shape: Shape, dtype: torch.dtype, trace: Trace, longest: float) -> dict[str, int]:
    """Peak of each method's call of 2,048 tokens. A first call of a single token loads code and libraries.

    Others than ours that take too long with 64 tokens for ``longest`` seconds with 2,048 are left out.
    """
    layer = make_layer(shape, dtype)
    found = {}
    for name, build in METHODS.items():
        try:
            method = build(layer)
        except UnavailableError:
            continue
        for tokens in (1, 64, 2048):
            ids, weights = recorded_routing(trace, shape.experts, shape.top_k, tokens)
            x = torch.randn(tokens, shape.model).to(dtype)
            start = time.perf_counter()
            peak = peak_memory(lambda: call(method, x, ids, weights, None)[0])  # noqa: B023 called at once
            if tokens == 64 and time.perf_counter() - start > longest * 64 / 2048 and name != "moeplan":
                break
        else:
            found[name] = peak
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, three token counts, bf16: under two minutes")
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], default=[s.name for s in SHAPES])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--trace", type=Path, default=ROOT / "examples" / "tiny_moe" / "trace.npz")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each alternative of a case")
    parser.add_argument("--drop-from", type=int, default=64, metavar="N", help="from N tokens on, leave out the slow")
    parser.add_argument(
        "--longest", type=float, default=60, metavar="S", help="leave out what took S s for fewer tokens"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.md")
    parser.add_argument("--memory-of", nargs=2, metavar=("SHAPE", "DTYPE"), help="only print one shape's peaks as JSON")
    args = parser.parse_args()
    trace = Trace.read(args.trace)
    by_name = {s.name: s for s in SHAPES}
    if args.memory_of:
        name, dtype = args.memory_of
        print(json.dumps(memory_of(by_name[name], DTYPES[dtype], trace, args.longest)))
        return
    if args.quick:
        args.shapes, args.tokens, args.dtypes = ["deepseek-lite", "switch"], [1, 8, 512], ["bf16"]
    shapes = [by_name[n] for n in args.shapes]
    bench = Bench(trace, args.budget, args.drop_from, args.longest, Console(width=200))
    chosen = {d: choose(None, "cpu", DTYPES[d]) for d in args.dtypes}
    head = (
        f"# Kernels\n\n{date.today()}, {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        f"Command: `python benchmarks/kernels.py {' '.join(sys.argv[1:])}`. moeplan's implementation: "
        f"{', '.join(f'{n} in {d}' for d, n in chosen.items())}.\n\n{body(__doc__ or '')}\n"
    )

    def write() -> None:
        args.output.write_text(head + "\n".join(bench.lines) + "\n")

    for shape in shapes:
        for dtype in args.dtypes:
            for training in (False, True):
                part = shape._replace(ffn=min(shape.ffn, WIDEST)) if training else shape
                bench.part(part, DTYPES[dtype], tuple(args.tokens), training)
                write()
    bench.summary()
    write()
    bench.memory(shapes, args.dtypes, args.trace)
    write()


def body(doc: str) -> str:
    """The explaining paragraphs of the module's docstring."""
    return "\n\n".join(doc.strip().split("\n\n")[2:4])


if __name__ == "__main__":
    main()
