"""Data sheets: one YAML file for each type of GPU."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...spec.errors import DocumentError
from ...spec.files import read_text
from ...spec.tabled import System
from ...spec.texts import MAX_YAML_BYTES, parse_yaml, show

# By CUDA's compute capability.
GENERATIONS = {
    80: "Ampere",
    86: "Ampere",
    89: "Ada",
    90: "Hopper",
    100: "Blackwell",
    103: "Blackwell",
    120: "Blackwell",
}
_SUFFIX = "_tc_flops"


def list_sheets(root: Path) -> tuple[str, ...]:
    """Names of the GPU types that have a data sheet, sorted."""
    return tuple(sorted(path.stem for path in root.glob("*.yaml") if _is_sheet(path)))


def _is_sheet(path: Path) -> bool:
    """Other YAML files lie beside them; a data sheet says where its tables are."""
    return "\ndata_dir:" in "\n" + read_text(path, limit=MAX_YAML_BYTES)


def read_sheet(root: Path, name: str) -> System:
    """The data sheet of one GPU type. Raises DocumentError that names the file and the field."""
    path = root / f"{name}.yaml"
    body = parse_yaml(read_text(path, limit=MAX_YAML_BYTES), str(path))
    gpu, node = (_part(path, body, part) for part in ("gpu", "node"))
    capability = gpu.get("sm_version")
    flops = {key.removesuffix(_SUFFIX): _number(path, gpu, key) for key in gpu if key.endswith(_SUFFIX)}
    per_rack, inter_rack = node.get("num_gpus_per_rack"), node.get("inter_rack_bw")
    return System(
        name=name,
        generation="other" if capability is None else GENERATIONS.get(capability, f"sm_{capability}"),
        memory_bytes=_number(path, gpu, "mem_capacity"),
        memory_bytes_per_second=_number(path, gpu, "mem_bw"),
        flops=flops,
        intra_node_bytes_per_second=_number(path, node, "intra_node_bw"),
        inter_node_bytes_per_second=_number(path, node, "inter_node_bw"),
        pcie_bytes_per_second=_number(path, node, "pcie_bw"),
        gpus_per_node=int(_number(path, node, "num_gpus_per_node")),
        watts=None if gpu.get("power") is None else _number(path, gpu, "power"),
        gpus_per_rack=None if per_rack is None else int(_number(path, node, "num_gpus_per_rack")),
        inter_rack_bytes_per_second=None if inter_rack is None else _number(path, node, "inter_rack_bw"),
    )


def _part(path: Path, body: Any, name: str) -> Mapping[str, Any]:
    part = body.get(name) if isinstance(body, dict) else None
    if not isinstance(part, dict):
        raise DocumentError(f"{path}: {name}: expected the fields of a data sheet, got {show(part)}")
    return part


def _number(path: Path, part: Mapping[str, Any], name: str) -> float:
    value = part.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise DocumentError(f"{path}: {name}: expected a number above 0, got {show(value)}")
    return float(value)
