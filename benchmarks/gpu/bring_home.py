"""Puts what ``run.sh`` left in a folder into the repository, once it has run on a GPU.

    python benchmarks/gpu/bring_home.py FOLDER

gpu-h200.md goes to benchmarks/results, cluster.json beside it, tuned configurations to where the kernels read them.
What a dry run left is refused.
"""

import shutil
import sys
from pathlib import Path

from moeplan.runtime.kernels.gpu.shipped import install
from moeplan.spec import Cluster, MoeplanError

RESULTS = Path(__file__).parents[1] / "results"


def bring(folder: Path) -> list[Path]:
    """The files written. Everything is checked before anything is written."""
    cluster, page, tuned = folder / "cluster.json", folder / "gpu-h200.md", sorted(folder.glob("sm_*.json"))
    if not page.is_file():
        raise MoeplanError(f"{folder}: no gpu-h200.md: expected the folder that benchmarks/gpu/run.sh wrote")
    if cluster.is_file() and Cluster.read(cluster).kind_of(0).type != "cuda":
        raise MoeplanError(f"{cluster}: of a processor: a dry run is nothing to bring home")
    written = [install(path) for path in tuned]
    for source, name in ((page, page.name), (cluster, "gpu-h200-cluster.json")):
        if source.is_file():
            written.append(Path(shutil.copyfile(source, RESULTS / name)))
    return written


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        for path in bring(Path(sys.argv[1])):
            print(f"wrote {path}")
    except MoeplanError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
