"""Collects what a GPU machine without a network lacks, as wheels: build/gpu-wheels, which run.sh takes them from.

    python benchmarks/gpu/wheels.py [--folder FOLDER]

The machine has Python 3.12, torch, triton, transformers, numpy, scipy, pandas, networkx, numba, typer, rich, pyyaml,
safetensors, matplotlib, threadpoolctl and nvidia-ml-py. Versions are those of constraints.txt. OR-Tools is left out: it
is as large as all others together, and a plan for one device never asks CP-SAT.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MISSING = ("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "PuLP", "highspy")
PYTHON = "3.12"
GLIBC = (17, 24, 27, 28)  # minor versions of the wheels' platforms; pip takes none that is not named
LIMIT = 64 * 2**20  # bytes that may travel, with the working tree


def pinned(constraints: str) -> dict[str, str]:
    """Name, as pip compares names, -> version."""
    pairs = (line.split("==") for line in constraints.split() if "==" in line)
    return {_normal(name): version for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download(folder: Path) -> None:
    """Exactly one wheel of each package; what lay there before goes."""
    versions = pinned((ROOT / "constraints.txt").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["--platform=manylinux2014_x86_64"]
    wanted = [f"{name}=={versions[_normal(name)]}" for name in MISSING]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", *platforms, "--dest", str(folder), *wanted]
    subprocess.run(command, check=True)


def tree_bytes() -> int:
    """Of what travels beside the wheels: files that git knows or does not ignore."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    return sum((ROOT / name).stat().st_size for name in names.decode().split("\0") if name and (ROOT / name).is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu-wheels")
    folder = parser.parse_args().folder
    try:
        download(folder)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pip download: exit code {error.returncode}: its own message is above") from None
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    tree, sizes = tree_bytes(), sum(wheel.stat().st_size for wheel in wheels)
    print(f"{sizes / 2**20:6.1f} MiB  {len(wheels)} wheels in {folder}\n{tree / 2**20:6.1f} MiB  the working tree")
    if len(wheels) != len(MISSING) or tree + sizes > LIMIT:
        raise SystemExit(f"expected {len(MISSING)} wheels and at most {LIMIT >> 20} MiB in all")


if __name__ == "__main__":
    main()
