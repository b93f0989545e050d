"""Stage 3: forward passes and training steps in bf16, timed by CUDA events beside what others compute the layer with.

Alternatives follow one another on the same weights and routing (a power law); where a call's weights are few, the next
call takes other experts, so that no cache holds them. "as called" is back to back from Python, as in our runtime;
"graph" replays a CUDA graph, of those that can be captured: what the kernels alone take. torch's grouped product is
given rows sorted without waiting for the device, which is better than its usual callers do.

Tuned configurations are collected here: FOLDER/sm_90.json.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from moeplan.benchmarks.gpu.cases import DRY_SHAPES, SHAPES, Error, Inputs, inputs, layer_on
from moeplan.benchmarks.gpu.stage import FAILED, TOLD, Row, Settings, judged, timed
from moeplan.benchmarks.gpu.warm import tuning_by
from moeplan.benchmarks.kernels_alternatives import (
    GROUPED_MM,
    Layer,
    Method,
    UnavailableError,
    loop,
    transformers_batched,
    transformers_eager,
    transformers_grouped,
)
from moeplan.benchmarks.kernels_alternatives import triton as ours
from moeplan.benchmarks.kernels_measure import ring
from moeplan.runtime.kernels.activation import activate
from moeplan.runtime.kernels.counting import count_expert_ffn, count_expert_ffn_backward
from moeplan.runtime.kernels.gpu.device import architecture, device_name
from moeplan.runtime.kernels.gpu.shipped import Tuned, read
from moeplan.runtime.kernels.gpu.tuning import cache_path

STAGE = "kernels_time"
DECODE, PREFILL, DRY_TOKENS = (1, 8, 64), (512, 2048, 8192), (1,)
TRAINING, DRY_TRAINING = (2048,), (4,)
AGREE = 2e-2  # of results with each other, in bf16
MOST_GATHERED = 8  # tokens for which Transformers' batched form gathers weights: 8 of Mixtral take 6 GB
DOMINATES = 4.0  # times the other side of the roofline: then a call is bound by one
WANTED_MEDIAN, WANTED_LEAST, WANTED_SHARE = 1.3, 0.9, 0.7
WARM_SECONDS = 60


class Case(NamedTuple):
    """One measured case: seconds by method, and the roofline's."""

    decode: bool
    training: bool
    called: dict[str, float]
    graph: dict[str, float]
    roofline: float
    dominated: bool


def grouped_mm(layer: Layer) -> Method:
    """As in ``kernels_alternatives``, but nothing waits for the device, so that a graph can hold it."""
    s = layer.shape
    projections = layer.gate_up.flatten(1, 2)
    bias = None if layer.gate_up_bias is None else layer.gate_up_bias.flatten(1)
    every = torch.arange(s.experts, device=layer.down.device)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        experts, order = ids.flatten().sort()
        token = order // s.top_k
        ends = (experts <= every[:, None]).sum(1, dtype=torch.int32)
        hidden = GROUPED_MM(x[token], projections.transpose(1, 2), offs=ends)
        hidden = activate(hidden if bias is None else hidden + bias[experts], s.matrices, s.activation)
        out = GROUPED_MM(hidden, layer.down.transpose(1, 2), offs=ends)
        out = out if layer.down_bias is None else out + layer.down_bias[experts]
        y = x.new_zeros(x.shape, dtype=torch.float32)
        return y.index_add(0, token, out * weights.flatten()[order].unsqueeze(1)).to(x.dtype)

    return Method(run, layer.parameters)


METHODS: dict[str, Callable[[Layer], Method]] = {
    "moeplan": ours,
    "grouped_mm": grouped_mm,
    "loop": loop,
    "Transformers eager": transformers_eager,
    "Transformers batched_mm": transformers_batched,
    "Transformers grouped_mm": transformers_grouped,
}
CAPTURED = ("moeplan", "grouped_mm")  # the others wait for the device


def rows(settings: Settings) -> Iterator[Row]:
    tuned = settings.folder / "tuned.json"
    tuning: AbstractContextManager[None]
    if settings.dry:
        # Trying all in the interpreter takes minutes: the narrowest is taken for the fastest.
        tuning = tuning_by(tuned, lambda launch, config: float(config.columns))
    else:
        os.environ["MOEPLAN_TUNE"] = "1"
        yield warm_up()
        tuning = nullcontext()  # tuned as for a user
        tuned = cache_path(device_name(settings.device), triton.__version__)
    cases = []
    with tuning:
        for shape in (DRY_SHAPES if settings.dry else SHAPES).values():
            layer = layer_on(shape, torch.bfloat16, settings.device)
            plan = [(t, False) for t in (DRY_TOKENS if settings.dry else DECODE + PREFILL)]
            plan += [(t, True) for t in (DRY_TRAINING if settings.dry else TRAINING)]
            if settings.dry and shape.name != "mixtral":
                del plan[1:]
            for tokens, training in plan:
                case, told = measure(layer, tokens, training, settings)
                cases.append(case)
                yield from told
            del layer
    yield from verdicts(cases, settings)
    yield bring(tuned, settings)


def warm_up() -> Row:
    """Compile in parallel; one that does not end in time is left to compile when it is measured."""
    begin, running = time.monotonic(), []
    for name in SHAPES:
        groups = [*(str(t) for t in DECODE), *(str(t) for t in PREFILL)]
        for arguments in (*([group] for group in groups), [str(TRAINING[0]), "train"]):
            command = [sys.executable, "-P", "-m", "moeplan.benchmarks.gpu.warm", name, *arguments]
            # Log and table are others'; a worker of its own that fails is found out by what is measured.
            running.append(subprocess.Popen(command, stdout=2, env=os.environ | {"OMP_NUM_THREADS": "1"}))
    late = 0
    for process in running:
        try:
            process.wait(max(0.1, WARM_SECONDS - (time.monotonic() - begin)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    failed = sum(process.returncode not in (0, -9) for process in running)
    told = f"{len(running)} processes, {late} stopped, {failed} failed, {time.monotonic() - begin:.0f} s"
    return Row(STAGE, "kernels compiled ahead", told, "", FAILED if failed else TOLD)


def measure(layer: Layer, tokens: int, training: bool, settings: Settings) -> tuple[Case, list[Row]]:
    """Results are compared with ours before they are timed."""
    shape, device = layer.shape, settings.device
    given = inputs(shape, torch.bfloat16, device, tokens, skewed=True, elsewhere=False)
    cpu_ids = given.ids.cpu()
    routes = [ids.to(device) for ids in ring(cpu_ids, shape.experts, 3 * shape.model * shape.ffn * 2)]
    what = f"{shape.name} {tokens} tokens{', training' if training else ''}"
    called, graph, told = dict[str, float](), dict[str, float](), list[Row]()
    want: Tensor | None = None
    for name, build in METHODS.items():
        if ("batched" in name and tokens > MOST_GATHERED) or (training and name in ("loop", "Transformers batched_mm")):
            continue
        try:
            method = build(layer)
            call = caller(method, given, routes, training)
            first = call()
        except (UnavailableError, RuntimeError) as error:  # a form that this version or layer has not
            told.append(Row(STAGE, f"{what}: {name}", " ".join(str(error).split())[:120], "", "left out", detail=True))
            if name == "moeplan":
                raise
            continue
        difference = Error()
        difference.add(first, first if want is None else want)
        want = first if want is None else want
        called[name] = timed(call, device).median
        if name in CAPTURED and not training and device.type == "cuda":
            graph[name] = replayed(method, given, routes, device)
        times = f"{1e3 * called[name]:.4g} ms as called" + (
            f", {1e3 * graph[name]:.4g} in a graph" if name in graph else ""
        )
        agrees = difference.relative <= AGREE
        told.append(Row(STAGE, f"{what}: {name}", times, "", judged(agrees), detail=True))
    case = Case(tokens in DECODE, training, called, graph, *roofline(layer, cpu_ids, training, settings))
    told.append(summary(what, case))
    return case, told


def caller(method: Method, given: Inputs, routes: list[Tensor], training: bool) -> Callable[[], Tensor]:
    """A call over the next route; with gradients of everything where ``training``. Returns the output."""
    count = -1

    def forward() -> Tensor:
        nonlocal count
        count += 1
        with torch.inference_mode():
            return method.run(given.x, routes[count % len(routes)], given.gates)

    def train() -> Tensor:
        x, gates = given.x.detach().requires_grad_(), given.gates.detach().requires_grad_()
        for parameter in method.parameters:
            parameter.requires_grad_()
        y = method.run(x, routes[0], gates)
        torch.autograd.grad(y, [x, gates, *method.parameters], given.dy, allow_unused=True)
        for parameter in method.parameters:
            parameter.requires_grad_(False)
        return y.detach()

    return train if training else forward


def replayed(method: Method, given: Inputs, routes: list[Tensor], device: torch.device) -> float:
    """Seconds of one call in a CUDA graph of a call for every route."""
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        kept = [method.run(given.x, ids, given.gates) for ids in routes]
    return timed(graph.replay, device).median / len(kept)


def roofline(layer: Layer, ids: Tensor, training: bool, settings: Settings) -> tuple[float, bool]:
    """Seconds that no implementation can do without, and whether one side dominates."""
    s, ceilings = layer.shape, settings.ceilings
    sizes = (ids, s.experts, s.matrices, s.ffn, s.model, torch.bfloat16)
    work = [count_expert_ffn(*sizes, biases=s.biases, save=training)]
    work += [count_expert_ffn_backward(*sizes, biases=s.biases)] if training else []
    flops = sum(w.flops for w in work) / ceilings["product"]
    moved = sum(w.bytes for w in work) / ceilings["copy"]
    return max(flops, moved), max(flops, moved) >= DOMINATES * min(flops, moved)


def summary(what: str, case: Case) -> Row:
    mine = case.called["moeplan"]
    others = {name: t for name, t in case.called.items() if name != "moeplan"}
    best = min(others, key=lambda name: others[name]) if others else "none"
    figure = f"{1e3 * mine:.4g} ms"
    if "moeplan" in case.graph:
        figure += f" (graph {1e3 * case.graph['moeplan']:.4g})"
    figure += f", {case.roofline / case.graph.get('moeplan', mine):.0%} of roofline"
    if "grouped_mm" in others:
        figure += f", grouped_mm {1e3 * others['grouped_mm']:.4g}"
    return Row(STAGE, what, figure + (f", best {best}" if others else ""))


def verdicts(cases: list[Case], settings: Settings) -> Iterator[Row]:
    """What was wanted of all cases; dry times mean nothing and are not judged."""
    for how in ("called", "graph"):
        both = [(c, t) for c in cases if {"moeplan", "grouped_mm"} <= (t := getattr(c, how)).keys()]
        ratios = [t["grouped_mm"] / t["moeplan"] for _, t in both]
        decode = [r for r, (c, _) in zip(ratios, both, strict=True) if c.decode]
        if decode:
            middle = float(np.median(decode))
            good = judged(middle >= WANTED_MEDIAN)
            yield _told(
                f"decode, grouped_mm's time over ours, {how}: median", f"{middle:.2f}", ">= 1.3", good, settings
            )
        if ratios:
            good = judged(min(ratios) >= WANTED_LEAST)
            yield _told(
                f"all, grouped_mm's time over ours, {how}: least", f"{min(ratios):.2f}", ">= 0.9", good, settings
            )
    shares = [c.roofline / c.graph.get("moeplan", c.called["moeplan"]) for c in cases if c.dominated]
    if shares:
        least = min(shares)
        good = judged(least >= WANTED_SHARE)
        yield _told("one side dominates: least share of the roofline", f"{least:.0%}", ">= 70 %", good, settings)


def _told(what: str, figure: str, want: str, verdict: str, settings: Settings) -> Row:
    return Row(STAGE, what, figure, want, TOLD if settings.dry else verdict)


def bring(tuned: Path, settings: Settings) -> Row:
    """The tuned configurations as a document that ``shipped.install`` takes."""
    found = json.loads(tuned.read_text()) if tuned.exists() else {}
    arch = 90 if settings.dry else architecture(settings.device)
    document = Tuned(
        arch=arch,
        device=device_name(settings.device),
        triton=triton.__version__,
        date=date.today().isoformat(),
        configs=found,
    )
    path = document.write(settings.folder / f"sm_{arch}.json")
    read(path)
    return Row(STAGE, f"tuned configurations, {path.name}", str(len(found)), "> 0", judged(len(found) > 0))
