"""Stage 4: ``moeplan profile`` of this machine, for a model of Mixtral's dimensions: FOLDER/cluster.json.

The operators' curves are those of Mixtral 8x7B whole, so that ``moeplan solve --model mixtral`` works with it at home.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from moeplan.benchmarks.gpu.stage import FAILED, Row, Settings, judged, last_line, moeplan
from moeplan.spec import Cluster

STAGE = "profiling"
BUDGET, DRY_BUDGET = 45, 5  # seconds
DRY_MODEL = "tiny-moe"
LAYERS = 4  # of Mixtral's 32: drawing random weights of all takes minutes
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "num_hidden_layers": LAYERS,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def model_of(settings: Settings) -> str:
    """What ``--model`` is given: Mixtral's configuration with few layers."""
    if settings.dry:
        return DRY_MODEL
    path: Path = settings.folder / "mixtral-4" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(MIXTRAL, indent=1))
    return str(path)


def rows(settings: Settings) -> Iterator[Row]:
    output = settings.folder / "cluster.json"
    device, budget = ("cpu", DRY_BUDGET) if settings.dry else ("cuda", BUDGET)
    found = moeplan(
        *("profile", "--model", model_of(settings), "--device", device, "--ranks", "1", "--budget", str(budget)),
        *(("--offload", str(settings.folder)) if settings.dry else ()),  # on a GPU experts rest in its host's memory
        *("--accept-noise", "--fresh", "--output", str(output)),
    )
    if found.returncode or not output.exists():
        yield Row(STAGE, "moeplan profile", last_line(found.stdout), "exit code 0", FAILED)
        return
    cluster = Cluster.read(output)
    here, one = cluster.devices[0], cluster.kind_of(0)
    points = sum(len(entry.curve.median) for entry in one.operators)
    seconds = cluster.provenance.seconds
    yield Row(STAGE, "moeplan profile", f"{one.product}, {len(one.operators)} curves, {points} points, {seconds:.0f} s")
    yield Row(STAGE, "free memory, read", f"{here.memory_bytes / 2**30:.1f} GiB, {one.stream_bandwidth / 1e9:.4g} GB/s")
    if not settings.dry:
        copies = one.copies is not None and bool(here.details)
        yield Row(STAGE, "copies to and from the host, NVML", "measured" if copies else "none", "", judged(copies))
        if one.copies is not None:
            for name, curve in (("to the device", one.copies.to_device), ("to the host", one.copies.to_host)):
                rate = curve.axes[0].values[-1] / curve.median[-1]
                yield Row(STAGE, f"copy {name}, the largest", f"{rate / 1e9:.3g} GB/s")
    for note in cluster.provenance.warnings:
        yield Row(STAGE, "note", note, detail=True)
