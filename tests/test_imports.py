"""The packages: which may import which, and what no file of the product may do."""

import ast
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("spec", "solvers", "runtime", "profiler", "planner", "service")
MAY_IMPORT = {
    "spec": set(),
    "solvers": set(),
    "runtime": {"spec"},
    "profiler": {"spec", "runtime"},
    "planner": {"spec", "solvers"},
    "service": set(PACKAGES),
    "__init__.py": {"spec", "service"},
    "__main__.py": {"service"},
    "caches.py": set(),
}
FILES = [*sorted(ROOT.glob("*.py")), *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]
MOST_LINES, MOST_IN_FUNCTION = 400, 80
# Compiled inner loops: cut into functions they are 1.4 to 1.9 times slower.
LONG_FUNCTIONS = {"solvers/replication/search.py anneal", "solvers/placement/kernel.py walk"}
# Third-party packages that a package must live without.
FOREIGN = {
    "spec": {"torch", "transformers", "pulp", "ortools", "typer", "rich"},
    "solvers": {"torch", "pydantic", "transformers", "typer", "rich"},
    "planner": {"transformers", "typer"},
}
# Modules that rebuild objects from bytes by running code.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
# torch.distributed functions that pickle.
UNSAFE_CALLS = {
    "gather_object",
    "all_gather_object",
    "scatter_object_list",
    "broadcast_object_list",
    "send_object_list",
    "recv_object_list",
    "eval",
    "exec",
    "popen",
    "system",
}


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported; the product's own names begin with ``moeplan``."""
    parents = ("moeplan", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module or "").split(".") if node.module else ())))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def violations(source: str, path: Path) -> list[str]:
    """What a file does against the rules, one line each."""
    tree, package = ast.parse(source), package_of(path)
    found = []
    for line, name in imports(tree, path):
        first, *rest = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line}"
        if first == "moeplan" and rest[0] in PACKAGES and rest[0] not in MAY_IMPORT[package] | {package}:
            found.append(f"{where}: {package} may not import {rest[0]}")
        if first in UNSAFE_MODULES:
            found.append(f"{where}: {first} is unsafe")
        if first in FOREIGN.get(package, ()):
            found.append(f"{where}: {package} may not import {first}")
    for node in ast.walk(tree):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "moeplan":
            found.append(f"{where}: inside the product imports are relative")
        if isinstance(node, ast.Call):
            found += [f"{where}: {problem}" for problem in call_problems(node)]
    return found


def call_problems(call: ast.Call) -> list[str]:
    function = call.func
    name = (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    problems = []
    if name in UNSAFE_CALLS and owner in ("", "os", "dist", "distributed"):
        problems.append(f"{name} is unsafe")
    if name == "save" and owner == "torch":
        problems.append("torch.save pickles")
    if name == "load" and owner == "torch" and options.get("weights_only") != "True":
        problems.append("torch.load without weights_only=True")
    if name == "load" and owner in ("np", "numpy") and options.get("allow_pickle") != "False":
        problems.append("np.load without allow_pickle=False")
    if options.get("shell", "False") != "False":
        problems.append("a shell string")
    if name in ("load", "load_all") and owner == "yaml":
        problems.append("yaml.load builds objects: use yaml.safe_load")
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rules_of_the_packages(path: Path) -> None:
    assert violations(path.read_text(), path) == []


def test_every_package_is_looked_at() -> None:
    assert {package_of(path) for path in FILES} >= {*PACKAGES, "__init__.py", "__main__.py"}
    assert all(package_of(path) in MAY_IMPORT for path in FILES)


@pytest.mark.parametrize(
    ("where", "source", "problem"),
    [
        ("spec/x.py", "from ..solvers import placement", "spec may not import solvers"),
        ("spec/catalogue/x.py", "from ...runtime.kernels import y", "spec may not import runtime"),
        ("solvers/x.py", "from ..spec.model import Model", "solvers may not import spec"),
        ("solvers/x.py", "from .. import spec", "solvers may not import spec"),
        ("solvers/x.py", "import torch.nn", "solvers may not import torch"),
        ("solvers/x.py", "from pydantic import Field", "solvers may not import pydantic"),
        ("solvers/x.py", "def f():\n    import torch", "solvers may not import torch"),
        ("runtime/kernels/x.py", "from ...planner import y", "runtime may not import planner"),
        ("runtime/x.py", "import moeplan.profiler", "runtime may not import profiler"),
        ("runtime/x.py", "from moeplan.spec import Model", "imports are relative"),
        ("profiler/x.py", "from ..planner.costs import y", "profiler may not import planner"),
        ("planner/strategies/x.py", "from ...runtime import y", "planner may not import runtime"),
        ("__init__.py", "from .planner import y", "__init__.py may not import planner"),
        ("service/x.py", "import pickle", "pickle is unsafe"),
        ("service/x.py", "from pickle import loads", "pickle is unsafe"),
        ("runtime/x.py", "dist.all_gather_object(a, b)", "all_gather_object is unsafe"),
        ("runtime/x.py", "torch.distributed.broadcast_object_list(a)", "broadcast_object_list is unsafe"),
        ("runtime/x.py", "torch.save(a, b)", "torch.save pickles"),
        ("runtime/x.py", "torch.load(a)", "torch.load without"),
        ("runtime/x.py", "torch.load(a, weights_only=False)", "torch.load without"),
        ("spec/x.py", "np.load(a)", "np.load without"),
        ("spec/x.py", "np.load(a, allow_pickle=True)", "np.load without"),
        ("service/x.py", "subprocess.run(a, shell=True)", "a shell string"),
        ("service/x.py", "os.system(a)", "system is unsafe"),
        ("service/x.py", "eval(a)", "eval is unsafe"),
        ("runtime/x.py", "yaml.load(a)", "yaml.safe_load"),
    ],
)
def test_violations_are_seen(where: str, source: str, problem: str) -> None:
    (found,) = violations(source, ROOT / where)[:1]
    assert problem in found


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("service/x.py", "from ..planner import y\nfrom ..solvers import z\nimport torch"),
        ("planner/x.py", "from ..spec import Model\nfrom ..solvers import placement\nfrom . import costs"),
        ("profiler/traces/x.py", "from ...runtime import y\nfrom ..measure import z\nmodel.eval()"),
        ("spec/x.py", "np.load(a, allow_pickle=False)\nimport json"),
        ("runtime/x.py", "torch.load(a, weights_only=True)\nsubprocess.run([a], shell=False)\nplatform.system()"),
        ("runtime/strategies/x.py", "from .. import collectives\nfrom ...spec import Plan"),
    ],
)
def test_what_is_allowed_is_not_reported(where: str, source: str) -> None:
    assert violations(source, ROOT / where) == []


def long_functions(source: str, where: str) -> list[str]:
    """``where`` and name of every function that is too long, nested ones too.

    The signature of a command is the table of its options: only what follows it is counted.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0].lineno if where.startswith("service/commands/") else node.lineno
            if (node.end_lineno or 0) - first + 1 > MOST_IN_FUNCTION:
                found.append(f"{where} {node.name}")
    return found


def test_functions_are_short() -> None:
    """An exception that is one no more is taken off the list."""
    paths = [path for path in FILES if package_of(path) in PACKAGES]
    found = [name for path in paths for name in long_functions(path.read_text(), path.relative_to(ROOT).as_posix())]
    assert set(found) == LONG_FUNCTIONS


def test_files_are_short() -> None:
    assert [path for path in FILES if len(path.read_text().splitlines()) > MOST_LINES] == []


def test_a_long_function_is_seen() -> None:
    most = "def f(\n    a,\n):\n" + "    a += 1\n" * (MOST_IN_FUNCTION - 3)
    assert long_functions(most, "spec/x.py") == []
    assert long_functions(most + "    a += 1\n", "spec/x.py") == ["spec/x.py f"]
    assert long_functions(most + "    a += 1\n" * 3, "service/commands/x.py") == []
    assert long_functions(most + "    a += 1\n" * 4, "service/commands/x.py") == ["service/commands/x.py f"]
    nested = "class A:\n    async def f(self):\n" + "        a = 1\n" * MOST_IN_FUNCTION
    assert long_functions(nested, "spec/x.py") == ["spec/x.py f"]


def needs(name: str, extras: frozenset[str], seen: dict[str, str]) -> None:
    """Adds to ``seen`` the version of ``name`` and of all that it needs, where installed."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return
    seen[canonicalize_name(name)] = found.version
    for line in found.requires or []:
        wanted = Requirement(line)
        asked = wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in extras | {""})
        if asked and canonicalize_name(wanted.name) not in seen:
            needs(wanted.name, frozenset(wanted.extras), seen)


def test_constraints_pin_everything_that_setup_installs() -> None:
    """What is not pinned changes under our feet: a type checker's stubs did."""
    seen: dict[str, str] = {}
    needs("moeplan", frozenset({"hf", "dev", "docs", "service", "ray", "silicon"}), seen)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert {"torch", "scipy-stubs", "pytest"} <= seen.keys()
    del seen["moeplan"]
    assert {name: version.partition("+")[0] for name, version in seen.items()} == {
        name: pinned.get(name) for name in seen
    }
