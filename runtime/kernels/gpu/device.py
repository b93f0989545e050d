"""Where the kernels can run: a CUDA device, or Triton's interpreter on the CPU."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

from ....spec import MoeplanError

INTERPRETER = "interpreter"


def require_triton() -> None:
    """MoeplanError unless triton is installed and a CUDA device, or its interpreter, is there to run it."""
    if importlib.util.find_spec("triton") is None:
        raise MoeplanError("kernels: triton: expected the package triton (pip install triton, on Linux), got none")
    if not interpreting() and not torch.cuda.is_available():
        raise MoeplanError("kernels: triton: expected a CUDA device, or TRITON_INTERPRET=1 from the start, got neither")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: slow, on the CPU, for tests."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for the interpreter, which runs one program after the other."""
    return 1 if interpreting() else torch.cuda.get_device_properties(device).multi_processor_count


def architecture(device: torch.device) -> int:
    """10 times the compute capability: 80 for an A100, 90 for an H100; 0 for the interpreter."""
    if interpreting():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def device_name(device: torch.device) -> str:
    return INTERPRETER if interpreting() else torch.cuda.get_device_name(device)


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensors'. Nothing to do for the interpreter's CPU tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
