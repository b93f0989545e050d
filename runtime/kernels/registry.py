"""The one place that chooses an implementation: by argument, by environment, else by device and type.

Implementations are loaded when they are first chosen: neither Triton nor a compiler is needed before.
"""

import logging
import os
from collections.abc import Callable
from functools import cache

import torch

from ...spec import MoeplanError
from .interface import Kernels

ENVIRONMENT = "MOEPLAN_KERNEL"
LOW = (torch.float32, torch.bfloat16, torch.float16)
"""What the written kernels compute in; float64 is for checks."""

logger = logging.getLogger("moeplan.kernels")


def _reference() -> Kernels:
    from .reference import ReferenceKernels

    return ReferenceKernels()


def _grouped() -> Kernels:
    from .grouped import GroupedKernels

    return GroupedKernels()


def _cpp() -> Kernels:
    from .cpp.implementation import CppKernels

    return CppKernels()


def _triton() -> Kernels:
    from .gpu.implementation import TritonKernels

    return TritonKernels()


_LOADERS: dict[str, Callable[[], Kernels]] = {
    "reference": _reference,
    "grouped": _grouped,
    "cpp": _cpp,
    "triton": _triton,
}


def implementations() -> tuple[str, ...]:
    """Every name that can be asked for, whether it runs here or not."""
    return tuple(_LOADERS)


@cache
def load(name: str) -> Kernels:
    """The implementation of a name that ``choose`` gave."""
    return _LOADERS[name]()


def choose(implementation: str | None, device: str, dtype: torch.dtype) -> str:
    """Name of the implementation that computes with ``dtype`` on a device of type ``device``.

    The one asked for by ``implementation``, else by the environment's MOEPLAN_KERNEL, must be able to: MoeplanError
    with the reason otherwise. Asked for none: triton on GPUs, cpp on CPUs, grouped where these cannot, and one line of
    warning says why. A compiled graph keeps what was chosen when it was traced.
    """
    asked = implementation or os.environ.get(ENVIRONMENT)
    if not asked:
        return _default(device, dtype)
    if asked not in _LOADERS:
        raise MoeplanError(f"kernels: implementation: expected one of {', '.join(_LOADERS)}, got {asked!r}")
    reason = obstacle(asked, device, dtype)
    if reason:
        raise MoeplanError(f"kernels: implementation: {asked!r} cannot run here: {reason}")
    return asked


# What torch.compiler.assume_constant_result sets, which would import two seconds of compiler into every process.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _default(device: str, dtype: torch.dtype) -> str:
    if dtype not in LOW:
        return "grouped"
    wanted = "triton" if device == "cuda" else "cpp"
    reason = obstacle(wanted, device, dtype)
    if reason is None:
        return wanted
    logger.warning("moeplan: kernels: 'grouped' (vendor products) runs instead of %r: %s", wanted, reason)
    return "grouped"


@cache
def obstacle(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot compute with ``dtype`` on ``device``; None if it can."""
    if name in ("reference", "grouped"):
        return None
    if dtype not in LOW:
        return f"it computes in {', '.join(str(t).removeprefix('torch.') for t in LOW)}, not {dtype}"
    if name == "cpp":
        if device != "cpu":
            return f"it runs on CPUs, the tensors are on {device}"
        from .cpp import obstacle as build_obstacle

        return build_obstacle()
    from .gpu.device import interpreting, require_triton

    try:
        require_triton()
    except MoeplanError as error:
        return str(error)
    return None if device == "cuda" or interpreting() else f"it runs on GPUs, the tensors are on {device}"
