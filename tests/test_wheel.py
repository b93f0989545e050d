"""What is installed: the wheel holds all files of the package and nothing else, and runs the loop without the checkout.

Wheel and source distribution are built from a copy of the tracked files, by the pinned setuptools, without a network.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import torch

import moeplan
from moeplan.spec import Cluster, Plan, Report

ROOT = Path(__file__).parents[1]
if not (ROOT / ".git").exists():
    pytest.skip("compares with what git tracks", allow_module_level=True)

pytestmark = pytest.mark.timeout(900)
PACKAGES = ("spec", "solvers", "runtime", "profiler", "planner", "service")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def call(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; it sees no checkout and no cache but those that it is given."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NUMBA_CACHE_DIR")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | {"COLUMNS": "120"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(what: str, source: Path, into: Path) -> Path:
    """The file that a hook of the build backend (PEP 517) writes for a folder of sources."""
    into.mkdir(exist_ok=True)
    return into / call(sys.executable, "-c", BUILD, what, into, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files that git knows and that are there."""
    listed = call("git", "ls-files", "-z", cwd=ROOT)
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def checkout(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_sdist", checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as an installer without wheels would."""
    return build("build_wheel", unpacked, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, which sees the packages it depends on where they are here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    found = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", found, "install", "--no-deps", "--no-index", "--quiet", wheel]
    call(*command, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # A line of a .pth file adds the folder only, not the .pth files in it: this checkout stays out of sight.
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return found


def contents(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, tracked: list[str]) -> None:
    """A new folder that pyproject.toml does not list is missing here; so are data files of a new kind."""
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    own = ("__init__.py", "__main__.py", "caches.py", "py.typed")
    assert held == {f"moeplan/{name}" for name in tracked if name.split("/")[0] in (*PACKAGES, *own)}
    assert "moeplan/runtime/kernels/cpp/src/variant.cpp" in held


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    held = contents(wheel)
    (metadata,) = (data.decode() for name, data in held.items() if name.endswith(".dist-info/METADATA"))
    fields = message_from_string(metadata)
    assert (fields["Name"], fields["Version"]) == ("moeplan", moeplan.__version__)
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields.get_payload() == (ROOT / "README.md").read_text()
    (licence,) = (data for name, data in held.items() if name.endswith("/LICENSE"))
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_the_source_distribution_is_the_checkout(sdist: Path, tracked: list[str]) -> None:
    """Tests, documents and examples included: what the tests read must be there."""
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in held if name.startswith("moeplan.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert held - made == {name for name in tracked if not name.startswith(".")}


def test_the_checkout_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    assert contents(build("build_wheel", checkout, tmp_path / "wheel")) == contents(wheel)


def test_the_loop_runs_where_only_the_wheel_is(python: Path, tmp_path: Path) -> None:
    """The kernels are built from the sources that came with it, in a cache of their own."""
    work, cache = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    cache.mkdir(mode=0o700)
    shutil.copyfile(ROOT / "examples" / "tiny_moe" / "trace.npz", work / "trace.npz")
    moeplan_command = python.parent / "moeplan"

    def here(*command: object) -> str:
        return call(*command, cwd=work, XDG_CACHE_HOME=str(cache))

    where = here(python, "-c", "import moeplan; print(moeplan.__file__)").strip()
    assert Path(where).is_relative_to(python.parents[1])
    assert here(moeplan_command, "--version").strip() == f"moeplan {moeplan.__version__}"
    here(moeplan_command, "profile", "--model", "tiny-moe", "--ranks", 2, "--budget", 5, "--accept-noise")
    here(moeplan_command, "solve", "--model", "tiny-moe", "--trace", "trace.npz", "--workload", "prefill:256")
    here(moeplan_command, "run", "plan.json", "--repetitions", 3, "--tolerance", 1e6)
    plan, report = Plan.read(work / "plan.json"), Report.read(work / "report.json")
    assert len(Cluster.read(work / "cluster.json").devices) == 2
    assert report.plan == plan.digest()
    assert report.check is not None
    assert report.check.passed
    (library,) = cache.rglob("libmoeplan_kernels.so")
    assert library.stat().st_size > 10_000
