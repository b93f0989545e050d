"""The published schemas: JSON Schema for every JSON document, a description of the arrays for the trace."""

import json
from functools import partial
from pathlib import Path
from typing import IO, Any

from .advice import Advice
from .calibration import Calibration
from .cluster import Cluster
from .document import write_atomically
from .model import MAX_EXPERTS, Model
from .placement import Placement
from .plan import Plan
from .report import Report
from .serving import ServingPlan
from .workload import Workload

TRACE: dict[str, Any] = {
    "title": "Trace",
    "description": "How a model really routes: an npz file without pickled content. Either expert_ids with what goes "
    "with it, or expert_counts alone (a counts-only trace: balance can be planned with it, affinity cannot).",
    "arrays": {
        "expert_ids": {
            "shape": ["tokens", "layers", "top_k"],
            "dtype": "integer",
            "rule": "0 <= id < num_experts, no id twice in a row of top_k; where there are zero_experts also -1",
            "description": "chosen experts, highest gate weight first; rows aligned across layers; -1: a choice of an "
            "identity expert, which nothing holds or computes",
        },
        "expert_weights": {
            "shape": ["tokens", "layers", "top_k"],
            "dtype": "float",
            "rule": "finite",
            "default": "1 / top_k",
            "description": "gate weights in the order of expert_ids",
        },
        "seq_len": {
            "shape": ["sequences"],
            "dtype": "integer",
            "rule": "positive, summing to tokens",
            "default": "one sequence",
            "description": "tokens of each sequence, in order",
        },
        "num_experts": {
            "shape": [],
            "dtype": "integer",
            "rule": f"top_k <= num_experts <= {MAX_EXPERTS}",
            "default": "highest id + 1",
            "description": "routed experts of a layer",
        },
        "zero_experts": {
            "shape": [],
            "dtype": "integer",
            "rule": f"0 <= zero_experts <= {MAX_EXPERTS}",
            "default": 0,
            "description": "identity experts of a layer beside these (LongCat-Flash)",
        },
        "expert_counts": {
            "shape": ["layers", "experts"],
            "dtype": "integer or float",
            "rule": "finite, not negative",
            "description": "tokens per expert; read only where there are no expert_ids",
        },
        "model": {"shape": [], "dtype": "text", "default": "", "description": "name of the model"},
        "source": {"shape": [], "dtype": "text", "default": "", "description": "where the routing comes from"},
    },
}


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> content."""
    documents = (Model, Cluster, Workload, Plan, Placement, Report, Advice, Calibration, ServingPlan)
    named = {f"{document.__name__.lower()}.schema.json": document.json_schema() for document in documents}
    return named | {"trace.json": TRACE}


def write_schemas(folder: str | Path) -> list[Path]:
    """Write every schema into ``folder``; returns the paths."""
    paths = []
    for name, schema in schemas().items():
        text = (json.dumps(schema, indent=1) + "\n").encode()
        paths.append(write_atomically(Path(folder) / name, partial(_fill, text)))
    return paths


def _fill(text: bytes, file: IO[bytes]) -> None:
    file.write(text)
