"""Which launcher a command uses: the environment's, the lab's, or local processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import torch

from ...spec.errors import MoeplanError
from ...spec.plan import Plan
from ..devices import verify_devices
from .environment import EnvironmentLauncher
from .lab import Lab, LabLauncher, LabSpec
from .local import LocalLauncher
from .rank import Launcher

LOCAL_RANKS = 2


@contextmanager
def choose_launcher(
    lab: Path | None = None,
    ranks: int | None = None,
    device: str | None = None,
    port: int | None = None,
    plan: Plan | None = None,
) -> Iterator[Launcher]:
    """Inside torchrun or Slurm this process is a rank; else a lab file opens a lab; else local processes.

    device: "cpu" or "cuda" (default: cuda where there is a GPU). ranks: local processes (default: every GPU, or two on
    processors). plan: what is to run; a lab of other devices is not opened. The lab is taken down when the block ends.
    Raises MoeplanError for options that contradict each other.
    """
    kind = device or ("cuda" if torch.cuda.is_available() and lab is None else "cpu")
    if kind not in ("cpu", "cuda"):
        raise MoeplanError(f"device {kind!r}: expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MoeplanError("device cuda: no GPU that torch can use; ask for cpu")
    chosen = cast(Literal["cpu", "cuda"], kind)
    if EnvironmentLauncher.present():
        if lab is not None or port is not None:
            raise MoeplanError("--lab and --port do not go with torchrun or Slurm, which start the ranks themselves")
        yield EnvironmentLauncher(chosen)
    elif lab is not None:
        if kind != "cpu":
            raise MoeplanError("the lab emulates processors: ask for device cpu")
        spec = LabSpec.read(lab)
        if plan is not None:
            verify_devices(plan, spec.seated())
        with Lab(spec) as opened:
            yield LabLauncher(opened)
    else:
        local = ranks or (torch.cuda.device_count() if kind == "cuda" else LOCAL_RANKS)
        yield LocalLauncher(local, chosen, port=port or 0)


def is_primary(launcher: Launcher) -> bool:
    """Whether this process writes files and prints: all but the later ranks of torchrun or Slurm."""
    return not isinstance(launcher, EnvironmentLauncher) or launcher.rank == 0
