"""The fastest configuration of a launch, measured once per device and kept on disk.

One file per device and triton version, in $XDG_CACHE_HOME/moeplan/triton (~/.cache without it). What is not there, and
does not come with the package (``shipped``), is measured at first use. MOEPLAN_TUNE=0 turns measuring off: then the
default counts; MOEPLAN_TUNE=1 measures what comes with the package too. The interpreter never measures.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch

from ....spec import MoeplanError
from .config import Config
from .device import architecture, device_name, interpreting
from .shipped import shipped

ENVIRONMENT = "MOEPLAN_TUNE"

logger = logging.getLogger("moeplan.kernels")

# Launches what is tuned with a configuration; it may be called any number of times.
Launch = Callable[[Config], object]


def cache_path(device: str, version: str) -> Path:
    """The file of a device's name and triton's version."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moeplan" / "triton" / (re.sub(r"[^\w.-]+", "_", f"{device} triton {version}") + ".json")


class Tuner:
    """Chooses among configurations by what ``measure`` says, in seconds or any unit; remembers on disk.

    measure: runs a launch with a configuration -> its time, or an exception where the device or the compiler cannot.
    Without ``measure`` nothing is ever timed. known: what others have measured; what is on disk goes before it.
    """

    def __init__(
        self,
        path: Path,
        measure: Callable[[Launch, Config], float] | None,
        known: Mapping[str, Config] | None = None,
    ) -> None:
        self._path = path
        self._measure = measure
        self._known = {key: asdict(config) for key, config in (known or {}).items()}
        self._chosen = self._read()

    def pick(self, key: str, candidates: list[Config], launch: Launch) -> Config:
        """The configuration for ``key``: as remembered, known or measured, else the first, which is the default.

        What is remembered counts only while it is among the candidates. If none can be timed a warning says why, and
        the default is left to succeed or fail by itself.
        """
        known = self._chosen.get(key) or self._known.get(key)
        found = next((candidate for candidate in candidates if asdict(candidate) == known), None)
        if found is not None or self._measure is None or len(candidates) == 1 or _capturing():
            return found or candidates[0]
        times: dict[Config, float] = {}
        for candidate in candidates:
            try:
                times[candidate] = self._measure(launch, candidate)
            except RuntimeError as error:
                reason = f"{candidate}: {error}"
        if not times:
            logger.warning("moeplan: tuning: %s: nothing could be timed, the default runs: %s", key, reason)
            return candidates[0]
        best = min(times, key=lambda candidate: times[candidate])
        self._chosen[key] = asdict(best)
        self._write()
        return best

    def _read(self) -> dict[str, dict]:
        """What is on disk; a file that is no JSON object is an error that names it."""
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise MoeplanError(f"tuning: {self._path}: expected JSON, got {error}; delete the file") from None
        if not isinstance(content, dict):
            raise MoeplanError(f"tuning: {self._path}: expected a JSON object; delete the file")
        return content

    def _write(self) -> None:
        """Whole or not at all, with what other processes have written since."""
        self._chosen = self._read() | self._chosen
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(self._chosen, file, indent=1, sort_keys=True)
            os.replace(name, self._path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise


def _capturing() -> bool:
    """While a CUDA graph is recorded nothing can be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@lru_cache
def tuner(device: torch.device) -> Tuner:
    """The tuner of a device; it measures unless MOEPLAN_TUNE=0 or the interpreter runs: see above."""
    import triton

    asked = os.environ.get(ENVIRONMENT)
    off = interpreting() or asked == "0"
    known = {} if asked == "1" else shipped(architecture(device))
    return Tuner(cache_path(device_name(device), triton.__version__), None if off else milliseconds, known)


def milliseconds(launch: Launch, config: Config) -> float:
    """Median time of a launch on the current device; RuntimeError where it cannot be compiled or does not fit."""
    from triton.errors import TritonError
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: launch(config), warmup=5, rep=20, return_mode="median"))
    except TritonError as error:
        raise RuntimeError(str(error)) from error
