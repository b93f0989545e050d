"""Valid bodies of every document, and how a refusal must read."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moeplan.spec import Cluster, Model, Plan, Report, Workload
from moeplan.spec.advice import Advice
from moeplan.spec.calibration import Calibration
from moeplan.spec.catalogue import load_model
from moeplan.spec.document import Document
from moeplan.spec.errors import DocumentError
from moeplan.spec.serving import ServingPlan


def curve(name: str = "bytes") -> dict[str, Any]:
    axis = {"name": name, "values": [1.0, 1024.0], "beyond": "flagged"}
    return {"axes": [axis], "median": [1e-6, 1e-3], "spread": [0.1, 0.2]}


def cluster_body() -> dict[str, Any]:
    route = {"operator": "route", "shape": {"hidden": 8, "experts": 4, "top_k": 2}, "dtype": "f32"}
    kind = {
        "name": "processor",
        "type": "cpu",
        "stream_bandwidth": 1e10,
        "operators": [route | {"curve": curve("tokens")}],
    }
    device = {"kind": "processor", "host": "a", "memory_bytes": 2**30}
    edges = [{"source": f"device {i}", "target": "host a", "rate": 1e9} for i in (0, 1)]
    return {
        "kinds": [kind],
        "devices": [device, device | {"switch": "s", "details": {"numa_node": "0"}}],
        "hosts": [{"name": "a"}],
        "link_classes": [{"name": "host", "latency": 1e-5, "curve": curve()}],
        "link_rules": [{"scope": "host", "link": "host"}],
        "link_exceptions": [{"source": 1, "target": 0, "link": "host"}],
        "topology": {
            "nodes": [{"name": "s", "type": "switch"}],
            "edges": [*edges, {"source": "s", "target": "host a"}],
        },
        "collectives": [{"collective": "all_gather", "members": [2], "curve": curve(), "busy": curve()}],
        "provenance": {"created": "now", "command": "test", "versions": {}, "seconds": 1.0, "models": ["tiny-moe"]},
    }


def plan_body() -> dict[str, Any]:
    device = {"host": "a", "kind": "cpu", "name": "processor", "memory_bytes": 2**30}
    memory = {"weights": 1, "gathered": 0, "cache": 1, "activations": 1, "limit": 10}
    ep = {"strategy": "ep", "slots": [list(range(8)), list(range(8, 16))]}
    return {
        "model": load_model("tiny-moe").model_dump(mode="json"),
        "workload": {"phase": "decode", "tokens": 6, "sequences": 6, "context": 3},
        "dtype": "f32",
        "devices": [device, device],
        "degrees": {"tensor": 1, "data": 2, "expert": 2},
        "sequences": [2, 4],
        "tokens": [2, 4],
        "layers": [ep] * 7 + [{"strategy": "sharded", "slots": [[], []], "split": [28, 100]}],
        "stored_layers": 8,
        "routing": {"kind": "assumed", "assumption": "power law"},
        "predicted": {
            "step_seconds": 0.1,
            "layers": [{"layer": 0, "parts": {"attention": 0.1}}],
            "memory": [memory, memory],
            "traffic": [{"source": 0, "target": 1, "bytes": 5}],
        },
        "solver": {"status": "optimal", "objective": 0.1, "bound": 0.1, "gap": 0.0, "space": "all"},
        "solve_seconds": 1.0,
        "baselines": {"linear": 0.2},
        "digests": {},
    }


def model_body() -> dict[str, Any]:
    """The first layers of gpt-oss-20b: the model that sets most fields."""
    body = load_model("gpt-oss-20b").model_dump(mode="json")
    return body | {"blocks": body["blocks"][:2]}


def report_body() -> dict[str, Any]:
    return {
        "plan": "abc",
        "model": "tiny-moe",
        "workload": "decode:6@3",
        "step": {"predicted": 1.0, "measured": 2.0, "spread": 0.1},
        "repetitions": 3,
        "parts": [{"layer": 0, "part": "expert", "predicted": 1.0, "measured": 0.0, "spread": 0.0}],
        "memory": [1, 2],
        "check": {"relative_error": 1e-6, "tolerance": 1e-4, "layers": 8, "tokens": 6, "passed": True},
        "tolerance": 0.25,
        "passed": True,
        "environment": {"torch": "2"},
    }


def advice_body() -> dict[str, Any]:
    gain = {"low": -0.1, "middle": 0.1, "high": 0.3}
    phase = {
        "phase": "decode",
        "tokens": 128,
        "hottest_before": 1.5,
        "hottest": 1.1,
        "seconds_before": 0.01,
        "gain": gain,
        "steps": gain,
        "most": 0.4,
        "step_gain": gain,
        "pays": False,
    }
    option = {
        "placement": "eplb",
        "slots": 20,
        "redundant": 4,
        "memory_bytes": 1,
        "moved_bytes": 2,
        "move_seconds": 0.5,
        "replan_seconds": 0.1,
        "pays_back_steps": [10.0],
        "phases": [phase],
    }
    return {
        "model": "m",
        "device": "h200_sxm",
        "engine": "trtllm",
        "devices": 4,
        "kernel": "rows",
        "noise": 0.1,
        "link_bytes_per_second": 5e10,
        "replan_every": 1000,
        "options": [option],
        "best": [None],
        "phases": ["decode"],
        "trace": {"path": "t.npz"},
        "notes": ["a note"],
    }


def calibration_body() -> dict[str, Any]:
    times = {"isl": 1024, "osl": 128, "concurrency": 16, "ttft_ms": 100.0, "tpot_ms": 10.0}
    return {
        "compute_scale": 1.1,
        "step_overhead_ms": 0.2,
        "prefill_scale": 1.5,
        "points": [{"measured": times, "predicted": times}],
        "error_before": {"tpot": 0.1, "ttft": 0.2},
        "error_left_out": {},
        "predictions": "p.csv",
        "skipped": 1,
    }


def serving_plan_body() -> dict[str, Any]:
    served = {"ttft_s": 0.1, "tpot_s": 0.01, "tokens_per_s": 100.0, "tokens_per_s_per_gpu": 25.0}
    degrees = {"tp": 2, "dp": 1, "moe_tp": 2, "moe_ep": 1, "pp": 2}
    memory = {"weights": 4, "cache": 3, "activations": 2, "overhead": 1, "limit": 10}
    stage = {"kind": "h100_sxm", "per_host": 8, "gpus": 2, "layers": 4, "memory": memory}
    replicas = {
        "count": 1,
        "degrees": degrees,
        "stages": [stage, stage],
        "concurrency": 8,
        "share": 1.0,
        "each": served,
    }
    point = {"degrees": degrees, "kinds": ["h100_sxm"], "engine": "vllm", "concurrency": 8, "each": served}
    return {
        "model": "tiny-moe",
        "engine": "vllm",
        "precision": "bf16",
        "load": {"isl": 128, "osl": 16, "concurrency": 8},
        "replicas": [replicas],
        "predicted": served,
        "requests_per_s": 6.25,
        "gpus": 4,
        "gpus_there": 8,
        "front": [point],
        "baselines": [{"name": "only", "tokens_per_s": 50.0, "gpus": 4}],
        "solver": {"status": "optimal", "objective": 100.0, "bound": 100.0, "forms": 3, "offers": 5},
    }


BODIES: dict[type[Document], Callable[[], dict[str, Any]]] = {
    Model: model_body,
    Workload: lambda: {"phase": "prefill", "tokens": 512, "sequences": 4, "context": 0},
    Cluster: cluster_body,
    Plan: plan_body,
    Report: report_body,
    Advice: advice_body,
    Calibration: calibration_body,
    ServingPlan: serving_plan_body,
}
documents = pytest.mark.parametrize("document", BODIES, ids=lambda d: d.__name__)


def text(document: type[Document], body: dict[str, Any]) -> str:
    return json.dumps({"kind": document.kind, "version": document.version, **body})


def refused(document: type[Document], content: str) -> str:
    """The error of a content, which must be one printable line of bounded length."""
    with pytest.raises(DocumentError) as caught:
        document.parse(content, "file.json")
    message = str(caught.value)
    assert message.startswith("file.json: ")
    assert message.isprintable()
    assert len(message) < 1000
    return message


def complaint(read: Callable[[], object]) -> str:
    """The error of a reader, empty if it succeeds; any other exception passes through."""
    try:
        read()
    except DocumentError as error:
        return str(error)
    return ""


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values that are no containers."""
    if isinstance(value, dict):
        return [leaf for name, item in value.items() for leaf in leaves(item, (*path, name))]
    if isinstance(value, list):
        return [leaf for i, item in enumerate(value[:2]) for leaf in leaves(item, (*path, i))]
    return [path]


def changed(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body = json.loads(json.dumps(body))
    place: Any = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return body


def arrays(tokens: int = 6, layers: int = 3, experts: int = 5, top_k: int = 2, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(2)[:, :, :top_k]
    weights = rng.random(ids.shape).astype(np.float16).astype(np.float32)
    return {"expert_ids": ids, "expert_weights": weights, "seq_len": np.array([tokens]), "num_experts": experts}
