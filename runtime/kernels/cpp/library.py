"""The built library: its functions with their C types, and the instruction sets that may be asked for."""

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache

from ....spec import MoeplanError
from .build import build, sanitized

ISAS = {"avx2": 1, "avx512": 2, "amx": 3}
"""Levels; each includes those before it, and a storage type that gains nothing from a level runs one below."""

BAD_ID, NO_MEMORY = 1, 2

# Pointers come first, then whole numbers; every function returns a whole number.
_FUNCTIONS = {
    "moeplan_level": (0, 0),
    "moeplan_bad_id": (0, 0),
    "moeplan_scratch_bytes": (0, 0),
    "moeplan_multiply_adds": (0, 0),
    "moeplan_forward": (10, 15),
    "moeplan_backward": (15, 16),
    "moeplan_project": (5, 10),
    "moeplan_project_backward": (7, 11),
}


@cache
def load() -> ctypes.CDLL:
    """Builds the library unless it is there, and loads it. Raises MoeplanError where either fails."""
    path = build()
    if sanitized() and not hasattr(ctypes.CDLL(None), "__asan_init"):
        # The library would end the process.
        raise MoeplanError("C++ kernels: MOEPLAN_SANITIZE=1: expected libasan in LD_PRELOAD: run `make test-sanitize`")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise MoeplanError(f"C++ kernels: cannot load {path}: {error}") from None
    for name, (pointers, numbers) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = [c_void_p] * pointers + [c_int64] * numbers
        function.restype = c_int64
    if not library.moeplan_level():
        raise MoeplanError("C++ kernels: expected a processor with AVX2, FMA and F16C, this one has not all of them")
    return library


def level(isa: str | None) -> int:
    """Number of an instruction set; of the best that is here without one. MoeplanError where it is not here."""
    best = load().moeplan_level()
    if isa is None:
        return best
    if isa not in ISAS or ISAS[isa] > best:
        here = [name for name, number in ISAS.items() if number <= best]
        raise MoeplanError(f"C++ kernels: MOEPLAN_CPU_ISA: expected one of {', '.join(here)}, got {isa!r}")
    return ISAS[isa]
