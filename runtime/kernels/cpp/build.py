"""Builds the C++ kernels into a cache, once for these sources, compiler, flags and torch.

A plain shared library behind C functions: no header of torch is compiled, which keeps the build under a minute and the
call short. It is linked with torch so that both run on one OpenMP pool. ``python -m moeplan.runtime.kernels.cpp.build``
builds ahead of time. With MOEPLAN_SANITIZE=1 the library checks addresses and undefined behaviour, and is loaded only
by a process that runs under libasan.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from ....caches import ExposedError, check_private, private_folder
from ....spec import MoeplanError
from .compile import compile_in, new_folder, remove_stale

SOURCES = Path(__file__).parent / "src"
LIBRARY = "libmoeplan_kernels.so"
OLDEST = 11
"""GCC's first release that knows the instructions of every variant."""

COMMON = ["-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
# GCC's own headers of vector instructions set these off.
COMMON += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
OPTIMISED = ["-O2"]
SANITIZED = ["-O0", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]

logger = logging.getLogger("moeplan.kernels")


class Variant(NamedTuple):
    """One compilation of variant.cpp: what its macros mean stands there."""

    isa: str
    real: str
    flags: list[str]
    pairs: bool = False
    tiles: bool = False

    @property
    def defines(self) -> list[str]:
        name = f"{self.isa}_{self.real}"
        return [
            f"-DVARIANT={name}",
            f"-DMOEPLAN_REAL={self.real}",
            f"-DMOEPLAN_PAIRS={self.pairs:d}",
            f"-DMOEPLAN_AMX={self.tiles:d}",
        ]


VARIANTS = [
    Variant("avx2", "float", AVX2),
    Variant("avx2", "bf16", AVX2),
    Variant("avx2", "f16", AVX2),
    Variant("avx512", "float", AVX512),
    Variant("avx512", "bf16", AVX512_BF16, pairs=True),
    Variant("avx512", "f16", AVX512),
    Variant("amx", "bf16", AMX, pairs=True, tiles=True),
]


def sanitized() -> bool:
    return os.environ.get("MOEPLAN_SANITIZE") == "1"


def build() -> Path:
    """The library, built unless it is there. Raises MoeplanError with one line of why it cannot be built here.

    Several processes may call at once: one builds, the others wait for it. What is in the cache is whole, because a
    finished build is moved there in one step.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise MoeplanError(f"C++ kernels: expected Linux on x86-64, got {sys.platform} on {platform.machine()}")
    compiler, version = _compiler()
    try:
        root = private_folder("kernels")
        target = root / _key(version)
        if not (target / LIBRARY).is_file():
            with os.fdopen(os.open(f"{target}.lock", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (target / LIBRARY).is_file():
                    logger.warning("moeplan: building the C++ kernels, once: about a minute")
                    _build(compiler, root, target)
        check_private(target / LIBRARY)  # loading it runs its code
    except OSError as error:
        raise MoeplanError(f"C++ kernels: cannot write the build cache: {error}") from None
    except ExposedError as error:
        raise MoeplanError(f"C++ kernels: {error}") from None
    return target / LIBRARY


def _build(compiler: str, root: Path, target: Path) -> None:
    flags = COMMON + (SANITIZED if sanitized() else OPTIMISED)
    remove_stale(root)
    folder = new_folder(root)
    # The longest compilations first: no thread is left with one at the end.
    commands = [
        [compiler, *flags, *v.flags, *v.defines, "-c", f"{SOURCES}/variant.cpp", "-o", f"{folder}/{i}.o"]
        for i, v in enumerate(reversed(VARIANTS))
    ]
    for name in ("api", "arena", "plan"):
        commands.append([compiler, *flags, "-c", f"{SOURCES}/{name}.cpp", "-o", f"{folder}/{name}.o"])
    objects = [command[-1] for command in commands]
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    # torch brings the OpenMP library: -fopenmp here would add the compiler's own beside it.
    torch_library = ["-Wl,--no-as-needed", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    new = folder / "done"
    link = [compiler, "-shared", *sanitizers, *objects, *torch_library, "-o", str(new / LIBRARY)]
    try:
        outcome = compile_in(folder, [commands, [link]], new, target)
    except ChildProcessError as error:
        raise MoeplanError(f"C++ kernels: not built: {error}") from None
    for command, status, complaint in outcome:
        _check(command, status, complaint)


def _compiler() -> tuple[str, str]:
    """Path of a usable g++ (the environment's CXX, else g++) and the first line of its version."""
    asked = os.environ.get("CXX") or "g++"
    path = shutil.which(asked)
    if path is None:
        wanted = f"a compiler to build them with, g++ {OLDEST} or later"
        raise MoeplanError(f"C++ kernels: expected {wanted}, found no {asked}")
    macros = _run([path, "-dM", "-E", "-x", "c++", os.devnull])
    defined = dict([*line.split(None, 2)[1:], ""][:2] for line in macros.splitlines())
    if "__clang__" in defined or int(defined.get("__GNUC__", "0")) < OLDEST:
        kind = "clang" if "__clang__" in defined else f"version {defined.get('__GNUC__', 'unknown')}"
        raise MoeplanError(f"C++ kernels: expected g++ {OLDEST} or later to build them with, {path} is {kind}")
    return path, _run([path, "--version"]).splitlines()[0]


def _key(version: str) -> str:
    """Everything that the library depends on."""
    torch_here = (torch.__version__, str(Path(torch.__file__).parent))
    flags = (COMMON, SANITIZED if sanitized() else OPTIMISED, VARIANTS)
    digest = hashlib.sha256(repr((version, torch_here, flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _run(command: list[str]) -> str:
    """Runs a command and returns what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _check(command, done.returncode, done.stderr)
    return done.stdout


def _check(command: list[str], status: int, complaint: str) -> None:
    """MoeplanError with the first line that speaks of an error where a command failed."""
    if status == 0:
        return
    lines = complaint.splitlines() or [f"status {status}"]
    first = next((line for line in lines if "error" in line.lower()), lines[0])
    raise MoeplanError(f"C++ kernels: {Path(command[0]).name} failed: {first.strip()}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    try:
        print(build())
    except MoeplanError as error:
        # Not a failure of the setup: the vendor's products run instead.
        print(f"moeplan: {error}; 'grouped' (vendor products) runs instead")
