"""What every rank of ``benchmarks/layers.py`` does: build the methods, compare their outputs, time them in turn."""

from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.benchmarks.layers_methods import (
    METHODS,
    Batch,
    Method,
    Shape,
    UnavailableError,
    Weights,
    make_batch,
    make_weights,
)
from moeplan.runtime.check import TOLERANCE
from moeplan.runtime.executor import DTYPES
from moeplan.runtime.kernels import expert_ffn
from moeplan.runtime.launch import Rank
from moeplan.runtime.memory import keep_freed_memory
from moeplan.runtime.worker import agree
from moeplan.spec.errors import MoeplanError

ROUNDS = (3, 40)  # at least, at most


def measure(rank: Rank, job: dict[str, Any]) -> dict[str, Any]:
    """job: ``shapes`` {name: fields}, ``dtypes``, ``tokens``, ``routings``, ``methods``, ``seconds`` of each row.

    Result: ``rows`` [{shape, dtype, tokens, routing, seconds {method: [seconds of each round]}}], ``errors`` {method:
    largest error of this rank's outputs}, ``missing`` {method: why}. Raises MoeplanError where an output is wrong.
    """
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, fields in job["shapes"].items():
        shape = Shape(**fields)
        for dtype in job["dtypes"]:
            weights = make_weights(shape, DTYPES[dtype], seed=len(name))
            methods = build(rank, shape, weights, job["methods"], missing)
            for tokens in job["tokens"]:
                for routing in job["routings"]:
                    row = {"shape": name, "dtype": dtype, "tokens": tokens, "routing": routing}
                    rank.emit({"what": " ".join(map(str, row.values()))})
                    batch = make_batch(shape, DTYPES[dtype], tokens, routing, rank.rank, rank.world)
                    wanted = reference(shape, weights, batch)
                    with torch.inference_mode():
                        first = check(methods, batch, wanted, dtype, errors)
                        rows.append(row | {"seconds": timed(methods, batch, first, job["seconds"], rank)})
    return {"rows": rows, "errors": errors, "missing": missing}


def build(rank: Rank, shape: Shape, weights: Weights, wanted: list[str], missing: dict[str, str]) -> dict[str, Method]:
    """The methods that can run this shape here; why others cannot goes into ``missing``."""
    names = list(dict.fromkeys(rank.hosts))
    hosts, built = [names.index(host) for host in rank.hosts], {}
    for name in wanted:
        try:
            built[name] = METHODS[name](shape, weights, hosts)
        except UnavailableError as error:
            missing[name] = str(error)
    return built


def reference(shape: Shape, w: Weights, batch: Batch) -> Tensor:
    """Output for this rank's tokens, computed by itself."""
    own = batch.own()
    common: dict[str, Any] = {"activation": shape.activation, "implementation": "reference"}
    return own.residual.float() + expert_ffn(own.x, w.gate_up, w.down, own.ids, own.weights, **common).float()


def check(methods: dict[str, Method], batch: Batch, wanted: Tensor, dtype: str, errors: dict[str, float]) -> float:
    """Every output equals the reference; the seconds of a round."""
    begin = perf_counter()
    for name, method in methods.items():
        got = method(batch)
        got = got[batch.layout.own] if len(got) != len(wanted) else got
        error = ((got.float() - wanted).norm() / wanted.norm()).item() if len(wanted) else 0.0
        errors[name] = max(errors.get(name, 0.0), error)
        if not error <= TOLERANCE[dtype]:
            raise MoeplanError(f"{name}: output differs from the reference by {error:.1e} in {dtype}")
    return perf_counter() - begin


def timed(methods: dict[str, Method], batch: Batch, first: float, seconds: float, rank: Rank) -> dict[str, list[float]]:
    """Seconds of each call, from a barrier; who begins a round goes in turn."""
    rounds = int(min(max(seconds / agree(first, rank.device), ROUNDS[0]), ROUNDS[1]))
    found: dict[str, list[float]] = {name: [] for name in methods}
    names = list(methods)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            dist.barrier()
            begin = perf_counter()
            methods[name](batch)
            found[name].append(perf_counter() - begin)
        rank.emit({"what": f"round {i + 1} of {rounds}"})
    return found
