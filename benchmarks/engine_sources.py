"""Packages of engines, unpacked for reading, and functions of theirs lifted out of files that need a GPU to import.

A lifted function is the package's own source, unchanged: found by its name in the syntax tree, compiled with the file's
path and line numbers, and run with the globals that it is given in place of the imports of its file.
"""

import __future__

import ast
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# (package, version, options of pip download); wheels hold no CUDA code that is run here.
WHEEL = ("--only-binary=:all:", "--platform=manylinux_2_34_x86_64")
OLDER = tuple(f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 28))
PACKAGES: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "sglang": (("sglang", "0.5.23", (*WHEEL, *OLDER, "--python-version=3.11")),),
    "vllm": (("vllm", "0.33.0", (*WHEEL, *OLDER, "--python-version=3.12")),),
    "vllm-ascend": (("vllm-ascend", "0.23.0", (*WHEEL, *OLDER, "--python-version=3.12")),),
    "megatron": (("megatron-core", "0.19.2", (*WHEEL, *OLDER, "--python-version=3.12")),),
    "deepspeed": (
        ("deepspeed", "0.19.8", ("--no-binary=:all:",)),
        *((name, version, ()) for name, version in (("hjson", "3.1.0"), ("py-cpuinfo", "9.0.0"), ("psutil", "7.2.2"))),
        *((name, version, ()) for name, version in (("einops", "0.8.2"), ("msgpack", "1.2.4"), ("tqdm", "4.70.1"))),
    ),
}


def unpack(engine: str, folder: Path) -> Path:
    """The folder with the engine's Python files, downloaded without dependencies if it is not there yet."""
    target = folder / engine
    done = target / ".complete"
    if done.exists():
        return target
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for package, version, options in PACKAGES[engine]:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(downloads / package)]
        subprocess.run([*command, *options, f"{package}=={version}"], check=True)
        for file in sorted((downloads / package).iterdir()):
            _extract(file, target)
    done.touch()
    return target


def _extract(file: Path, target: Path) -> None:
    """A wheel's Python files, or all of a wheel that is small; the inner folder of a source archive."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            small = file.stat().st_size < 2**23
            names = [name for name in wheel.namelist() if small or name.endswith(".py")]
            wheel.extractall(target, names)
    elif file.name.endswith(".tar.gz"):
        with tarfile.open(file) as archive:
            for member in archive.getmembers():
                member.name = member.name.partition("/")[2]
                if member.isfile() and member.name:
                    archive.extract(member, target, filter="data")


class Source:
    """One file of a package."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"), str(path))

    def function(self, name: str, **given: Any) -> Any:
        """A function of the file; the functions of the same file that it calls must be given."""
        return self._run([self._named(self.tree.body, name)], given)[name]

    def bare_class(self, name: str, methods: tuple[str, ...], base: type = object, **given: Any) -> Any:
        """The class with only these methods, each from itself or from the bases of the same file; others are absent."""
        found = [method for wanted in methods if (method := self._method(name, wanted))]
        node = ast.ClassDef(name=name, bases=[ast.Name("_base", ast.Load())], keywords=[], body=[], decorator_list=[])
        body: list[Any] = [*found] or [ast.Pass()]
        node.body = body
        ast.fix_missing_locations(ast.copy_location(node, self.tree.body[0]))
        return self._run([node], {"_base": base} | given)[name]

    def bases(self, name: str) -> Iterator[str]:
        """Names of a class's bases, and theirs where these are of the same file."""
        node = self._named(self.tree.body, name)
        for base in node.bases:
            if isinstance(base, ast.Name):
                yield base.id
                if any(isinstance(other, ast.ClassDef) and other.name == base.id for other in self.tree.body):
                    yield from self.bases(base.id)

    def fields(self, name: str) -> set[str]:
        """Annotated fields of a class."""
        body = self._named(self.tree.body, name).body
        return {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}

    def _method(self, name: str, wanted: str) -> ast.AST | None:
        for owner in (name, *self.bases(name)):
            nodes = [n for n in self.tree.body if isinstance(n, ast.ClassDef) and n.name == owner]
            for node in (method for one in nodes for method in one.body):
                if isinstance(node, ast.FunctionDef) and node.name == wanted:
                    return node
        return None

    def _named(self, nodes: list[ast.stmt], name: str) -> Any:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return node
        raise LookupError(f"{self.path}: no {name}: the engine has changed")

    def _run(self, body: list[Any], given: dict[str, Any]) -> dict[str, Any]:
        flags = __future__.annotations.compiler_flag  # annotations name what is not imported here
        names = dict(given)
        module = ast.Module(body=body, type_ignores=[])
        code = compile(module, str(self.path), "exec", flags=flags, dont_inherit=True)
        exec(code, names)
        return names
