"""A folder of tables of an invented GPU, in the layout of the real ones, with any fault planted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SHEET = """data_dir: data/{name} # relative
gpu:
  mem_bw: {bandwidth}
  mem_capacity: 85899345920 # 80GiB
  bfloat16_tc_flops: {flops}
  fp8_tc_flops: {fp8}
  power: 400
  sm_version: {capability}
node:
  num_gpus_per_node: 8
  inter_node_bw: 50000000000
  intra_node_bw: 300000000000
  pcie_bw: 64000000000
"""
BANDWIDTH, FLOPS = 2e12, 4e14
START = 5e-6
SIZES = [(512, 512), (1024, 4096), (4096, 4096), (8192, 2048), (16384, 8192), (256, 256), (768, 512), (512, 256)]
M = [1, 4, 16, 64, 256, 1024, 4096, 16384, 262144]


def write_sheet(
    root: Path, name: str, bandwidth: float = BANDWIDTH, flops: float = FLOPS, capability: int = 90
) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "data").mkdir(exist_ok=True)
    text = SHEET.format(
        name=name, bandwidth=int(bandwidth), flops=int(flops), fp8=int(2 * flops), capability=capability
    )
    (root / f"{name}.yaml").write_text(text)


def write_parquet(root: Path, place: str, columns: dict[str, Any]) -> Path:
    """``place``: gpu/family/engine/version/kind."""
    path = root / "data" / f"{place}_perf.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def gemm_columns(dtype: str = "bfloat16", start: float = START, seed: int = 0, share: float = 0.6) -> dict[str, Any]:
    """A matrix product that takes ``start`` and then runs at ``share`` of the roofline, with 2 % of noise. Latency: ms.

    The roofline is written out here once more, by hand.
    """
    m, (n, k) = np.repeat(M, len(SIZES)), np.array(SIZES * len(M)).T
    width, rate = (1, 2 * FLOPS) if dtype.startswith("fp8") else (2, FLOPS)
    compute = 2.0 * m * n * k / rate
    memory = ((1.0 * n * k + 1.0 * m * k) * width + 2.0 * m * n) / BANDWIDTH
    noise = np.random.default_rng(seed).normal(1, 0.02, len(m)).clip(0.9, 1.1)
    seconds = (start + np.maximum(compute, memory) / share) * noise
    return {
        "framework": ["x"] * len(m),
        "kernel_source": ["cutlass"] * len(m),
        "gemm_dtype": [dtype] * len(m),
        "m": m,
        "n": n,
        "k": k,
        "latency": seconds * 1e3,
    }


def write_gemm(
    root: Path, engine: str, version: str, change: Callable[[pd.DataFrame], pd.DataFrame] | None = None, **options: Any
) -> Path:
    """bfloat16, as it is, and fp8, ``change``d."""
    good = pd.DataFrame(gemm_columns("bfloat16", **options))
    changed = pd.DataFrame(gemm_columns("fp8", **options))
    frame = pd.concat([good, changed if change is None else change(changed)], ignore_index=True)
    columns = {name: frame[name].tolist() for name in frame}
    return write_parquet(root, f"gpu_a/gemm/{engine}/{version}/gemm", columns)


def write_example(root: Path, change: Callable[[pd.DataFrame], pd.DataFrame] | None = None) -> Path:
    """Three engines on one GPU, the first one changed; a second GPU has a data sheet only."""
    write_sheet(root, "gpu_a")
    write_sheet(root, "gpu_b", BANDWIDTH / 2, FLOPS / 4)
    write_gemm(root, "vllm", "0.24.0", change, seed=1)
    write_gemm(root, "sglang", "0.5.14", seed=2)
    write_gemm(root, "trtllm", "1.3.0rc20", seed=3, start=1.8 * START)
    return root
