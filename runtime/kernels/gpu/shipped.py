"""Configurations measured on a GPU of each architecture, which come with the package: ``tuned/sm_90.json``.

    python -m moeplan.runtime.kernels.gpu.shipped FILE

checks a file that ``benchmarks/gpu/run.sh`` brought home and puts it there. A launch that the file has is not measured
again; any other is, at its first use (``tuning``).
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from ....spec import MoeplanError
from ....spec.document import Document, Part
from .config import MOST_SPLITS, Config, candidates, key, parse_key
from .device import INTERPRETER

FOLDER = Path(__file__).parent / "tuned"

Size = Annotated[int, Field(ge=1, le=1024)]


class Tile(Part):
    """The fields of ``config.Config``."""

    rows: Size
    columns: Size
    depth: Size
    warps: Size
    stages: Size
    split: Annotated[int, Field(ge=1, le=MOST_SPLITS)] = 1

    def config(self) -> Config:
        return Config(**self.model_dump())


class Tuned(Document):
    """arch: 10 times the compute capability; device, triton, date: where the figures are from; configs: a launch's key
    (``config.key``) -> its fastest configuration."""

    kind: ClassVar[str] = "tuned-kernels"

    arch: Annotated[int, Field(ge=80, le=199)]
    device: str
    triton: str
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    configs: dict[str, Tile]


def read(path: Path) -> Tuned:
    """Raises MoeplanError that names the file and the entry: no such document, or none of what the kernels try."""
    found = Tuned.read(path)
    for name, tile in found.configs.items():
        launch = parse_key(name)
        if launch is None:
            example = key("esmm", "torch.bfloat16", "", (8, 4096, 14336), 16, 16)
            raise MoeplanError(f"{path}: configs: expected keys such as {example!r}, got {name[:120]!r}")
        if tile.config() not in candidates(*launch, found.arch):
            raise MoeplanError(f"{path}: configs: {name}: none of the configurations that are tried: {tile.config()}")
    return found


def path_of(arch: int) -> Path:
    return FOLDER / f"sm_{arch}.json"


@lru_cache
def shipped(arch: int) -> dict[str, Config]:
    """Key -> configuration of an architecture; empty where nobody has measured yet."""
    path = path_of(arch)
    return {name: tile.config() for name, tile in read(path).configs.items()} if path.exists() else {}


def install(path: Path) -> Path:
    """Put what was brought home where ``shipped`` reads it; other launches that are there stay."""
    found = read(path)
    if not found.configs:
        raise MoeplanError(f"{path}: configs: holds none: nothing was tuned")
    if found.device == INTERPRETER:
        raise MoeplanError(f"{path}: device: {INTERPRETER}: times of a dry run are not those of a GPU")
    target = path_of(found.arch)
    known = read(target).configs if target.exists() else {}
    target.parent.mkdir(exist_ok=True)
    found.model_copy(update={"configs": dict(sorted((known | found.configs).items()))}).write(target)
    shipped.cache_clear()
    return target


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit(__doc__)
    try:
        target = install(Path(arguments[0]))
    except MoeplanError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(f"wrote {target}: {len(read(target).configs)} configurations")


if __name__ == "__main__":
    main(sys.argv[1:])
