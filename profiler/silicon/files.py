"""Where the tables lie, and their bytes: the installed package, or a folder of the same layout.

    systems/<gpu>.yaml                                              a data sheet
    systems/data/<gpu>/<family>/<engine>/<version>/<kind>_perf.parquet   a table

The package is found by its name and never imported: nothing of it runs here.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ...spec.errors import DocumentError, MoeplanError
from ...spec.files import read_bytes
from ...spec.texts import show
from .layouts import LAYOUTS

if TYPE_CHECKING:
    import pyarrow as pa

PACKAGE = "aiconfigurator_core"
MAX_BYTES, MAX_ROWS, MAX_UNPACKED = 64 * 2**20, 2_000_000, 2 * 2**30
MAX_FILES = 20_000
_SUFFIX = "_perf.parquet"


@dataclass(frozen=True)
class Place:
    """One file: whose it is, and where."""

    system: str
    family: str
    engine: str
    version: str
    kind: str
    path: Path


def find_root(folder: str | Path | None = None) -> Path:
    """The folder ``systems``: inside ``folder``, or of the installed package. Raises MoeplanError."""
    if folder is None:
        found = find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise MoeplanError(
                "measured tables of GPUs are not installed: pip install 'moeplan[silicon]', or name a folder of them"
                " with --tables"
            )
        return Path(found.submodule_search_locations[0]) / "systems"
    for root in (Path(folder), Path(folder) / "systems", Path(folder) / PACKAGE / "systems"):
        if (root / "data").is_dir():
            return root
    if not Path(folder).is_dir():
        raise DocumentError(f"{folder}: no such folder")
    raise DocumentError(f"{folder}: expected a folder with systems/data/<gpu>/<family>/<engine>/<version>/*{_SUFFIX}")


def list_places(root: Path, system: str) -> tuple[Place, ...]:
    """All known kinds of files of one GPU type, sorted; empty where it has a data sheet only."""
    known = {layout.file for layout in LAYOUTS}
    places = []
    for count, path in enumerate(sorted((root / "data" / system).glob(f"*/*/*/*{_SUFFIX}"))):
        if count == MAX_FILES:
            raise DocumentError(f"{root / 'data' / system}: more than {MAX_FILES:,} files, refused")
        kind = path.name.removesuffix(_SUFFIX)
        if kind in known:
            family, engine, version = path.parts[-4:-1]
            places.append(Place(system, family, engine, version, kind, path))
    return tuple(places)


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, from its footer."""
    return int(_opened(path).metadata.num_rows)


def read_parquet(path: Path) -> "pa.Table":
    """A whole Parquet file, its sizes checked before it is unpacked. Raises DocumentError."""
    import pyarrow as pa

    opened = _opened(path)
    meta = opened.metadata
    unpacked = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    if meta.num_rows > MAX_ROWS or unpacked > MAX_UNPACKED:
        raise DocumentError(f"{path}: {meta.num_rows:,} rows, {unpacked:,} bytes unpacked: too large, refused")
    try:
        return opened.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DocumentError(f"{path}: not a Parquet file that can be read ({_line(error)})") from None


def _opened(path: Path):
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MoeplanError("reading measured tables needs PyArrow: pip install 'moeplan[silicon]'") from None

    data = read_bytes(path, MAX_BYTES)
    try:
        return pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DocumentError(f"{path}: not a Parquet file ({_line(error)})") from None


def _line(error: Exception) -> str:
    return show(" ".join(str(error).split()))
