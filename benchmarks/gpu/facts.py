"""Stage 1: what the GPU is, by NVML and torch, and what it does at best: copies and bf16 products."""

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch

from moeplan.benchmarks.gpu import nvml_standin
from moeplan.benchmarks.gpu.stage import Row, Settings, judged, timed
from moeplan.benchmarks.hardware import processor
from moeplan.profiler.devices import nvml_details

STAGE = "facts"


def rows(settings: Settings) -> Iterator[Row]:
    yield from _torch(settings)
    yield from _nvml(settings)
    found = {"copy": _copy(settings), "product": _product(settings)}
    (settings.folder / "ceilings.json").write_text(json.dumps(found))
    yield Row(STAGE, "copy on the device, read and written", f"{found['copy'] / 1e12:.3g} TB/s")
    yield Row(STAGE, "square bf16 product, random values", f"{found['product'] / 1e12:.3g} TFLOP/s")


def _torch(settings: Settings) -> Iterator[Row]:
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    for name in ("triton", "transformers", "numpy", "pydantic"):
        versions += f", {name} {__import__(name).__version__}"
    yield Row(STAGE, "versions", versions)
    if settings.dry:
        yield Row(STAGE, "device", f"none: {processor()}")
        return
    p = torch.cuda.get_device_properties(settings.device)
    yield Row(STAGE, "device", f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs")
    yield Row(STAGE, "memory, L2", f"{p.total_memory / 2**30:.1f} GiB, {p.L2_cache_size / 2**20:.0f} MiB")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Row(STAGE, "CUDA, NCCL", f"{torch.version.cuda}, {nccl}", "", judged(torch.distributed.is_nccl_available()))


def _nvml(settings: Settings) -> Iterator[Row]:
    """What ``profile`` writes into a cluster's device; dry: from a stand-in that answers as the library does."""
    if settings.dry:
        properties = SimpleNamespace(uuid=nvml_standin.UUID)
        with (
            mock.patch.dict(sys.modules, {"pynvml": nvml_standin}),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        ):
            details = nvml_details(torch.device("cuda:0"))
    else:
        details = nvml_details(settings.device)
    source = "a stand-in for NVML" if settings.dry else "NVML"
    for name, value in details.items():
        yield Row(STAGE, f"{source}: {name}", value, detail=name not in ("uuid", "driver"))
    wanted = {"uuid", "driver", "memory_bytes", "sm_clock_mhz"}
    yield Row(STAGE, f"{source} answers", f"{len(details)} questions", "", judged(wanted <= details.keys()))


def _copy(settings: Settings) -> float:
    """Bytes / s, those read and those written."""
    size = 2**16 if settings.dry else 2**32
    source = torch.empty(size, dtype=torch.uint8, device=settings.device).random_()
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), settings.device).median


def _product(settings: Settings) -> float:
    """flop / s."""
    size = 64 if settings.dry else 8192
    a, b = (torch.randn(size, size, device=settings.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, settings.device).median
