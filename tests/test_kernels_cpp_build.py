"""The build of the C++ kernels: without a compiler, with one that fails, by several at once; under the sanitizers."""

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moeplan.runtime.kernels.cpp import obstacle
from moeplan.runtime.kernels.cpp.build import LIBRARY, build
from moeplan.spec import MoeplanError

ROOT = Path(__file__).parents[1]

# Answers as g++ does, and writes a line for each thing that it makes.
COMPILER = """#!/bin/sh
case "$*" in
  *-dM*) echo '#define __GNUC__ {version}'; {extra} exit 0 ;;
  *--version*) echo 'g++ of a test'; exit 0 ;;
esac
while [ "$1" != -o ]; do shift; done
echo "$2" >> {log}
{act} "$2"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Puts a compiler in the environment's CXX, and the cache into an empty folder; returns the log of what it made."""

    def install(act="touch", version=12, extra=""):
        log, script = tmp_path / "made", tmp_path / "g++"
        log.touch()
        script.write_text(COMPILER.format(act=act, log=log, version=version, extra=extra))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(script))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return log

    return install


def test_no_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MoeplanError, match=r"expected a compiler .*g\+\+ 11 or later, found no no-such"):
        build()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "extra", "said"), [(9, "", "is version 9"), (14, "echo '#define __clang__ 1';", "is clang")]
)
def test_an_unfit_compiler_is_named(compiler, version, extra, said):
    compiler(version=version, extra=extra)
    with pytest.raises(MoeplanError, match=said):
        build()


def test_a_failing_compiler_leaves_nothing_behind(compiler, tmp_path):
    compiler(act="echo 'x.cpp: error: no' >&2; false")
    with pytest.raises(MoeplanError, match=r"g\+\+ failed: x.cpp: error: no"):
        build()
    assert [p.name for p in (tmp_path / "cache/moeplan/kernels").iterdir() if p.suffix != ".lock"] == []


def test_several_at_once_build_once(compiler):
    made = compiler(act="sleep 0.1; touch")
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: build(), range(3)))
    assert len(paths) == 1
    assert paths.pop().is_file()
    assert sum(LIBRARY in line for line in made.read_text().splitlines()) == 1


def test_a_cache_that_cannot_be_written_is_one_line(compiler, monkeypatch, tmp_path):
    compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(MoeplanError, match="cannot write the build cache"):
        build()


def sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on the library that is built with ASan and UBSan, as ``make test-sanitize`` does."""
    # ASan hooks the throwing of exceptions, and needs to find the library that throws when it starts.
    ask = [[os.environ.get("CXX", "g++"), f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    preload = " ".join(subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in ask)
    environment = os.environ | {"MOEPLAN_SANITIZE": "1", "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.skipif(obstacle() is not None or not shutil.which("g++"), reason="needs g++")
def test_a_fuzz_under_the_sanitizers_is_clean():
    done = sanitized("-m", "moeplan.tests.kernel_cpp_cases", "6")
    assert done.stdout.endswith("fuzz: done\n"), done.stderr[-3000:]
    assert "runtime error" not in done.stderr
    assert "AddressSanitizer" not in done.stderr


@pytest.mark.skipif(obstacle() is not None or not shutil.which("g++"), reason="needs g++")
def test_the_sanitizers_are_awake():
    """A result that is too small for what the library writes must be reported."""
    wrong = (
        "import torch; from moeplan.runtime.kernels.cpp.implementation import CppKernels as C; k = C();"
        "e = k._library.moeplan_project; o = torch.ones;"
        "x, w, y, i = o(4, 64), o(1, 64, 64), torch.empty(4 * 64 - 16), torch.zeros(4, 1, dtype=torch.int64);"
        "e(*(t if t is None else t.data_ptr() for t in (x, w, None, i, y)), 8, 0, 1, 1, 4, 1, 1, 64, 64, 0)"
    )
    done = sanitized("-c", wrong)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
