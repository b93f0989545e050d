"""numba's compiler, for all loops of this folder: what it compiles is kept where nobody else can have put it.

The only file that imports numba: its cache is chosen before, and whoever needs no compiled loop does not wait for it.
"""

import atexit
import hashlib
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ..caches import ExposedError, check_private, private_folder

NO_CACHE: str | None = None
"""Why compiled loops are not kept on this machine, in one line."""


def _compiled_code() -> str:
    """Where numba keeps the compiled loops of exactly these sources.

    Its own cache compares one file at a time: a loop that calls another file's would go on with that one's old code.
    What numba finds there it unpickles, which runs code. Where others could have written, or nothing can be kept, it is
    a folder that ends with this process.
    """
    global NO_CACHE
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(str(source.relative_to(Path(__file__).parent)).encode() + b"\0" + source.read_bytes())
    given = os.environ.get("NUMBA_CACHE_DIR")
    try:
        if given and not Path(given).exists():
            Path(given).mkdir(mode=0o700, parents=True)
        folder = Path(given) if given else private_folder("solvers", digest.hexdigest()[:24])
        for place in (folder, *folder.rglob("*")):
            check_private(place)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except (OSError, ExposedError) as error:
        NO_CACHE = str(error)
    brief = tempfile.mkdtemp(prefix="moeplan-")
    atexit.register(shutil.rmtree, brief, ignore_errors=True)
    return brief


# Read when numba is first imported, which another package may have done.
os.environ["NUMBA_CACHE_DIR"] = _compiled_code()
if "numba" in sys.modules:
    sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]

import numba  # noqa: E402
from numba import njit  # noqa: E402


def _postpone_linear_algebra() -> None:
    """Load what numba asks ``scipy.linalg`` for without loading that, which takes as long as a first search.

    numba only wants to know whether it is there, as it is with us, before it compiles ``np.cov``.
    """
    if "scipy.linalg" not in sys.modules:
        sys.modules["scipy.linalg"] = None  # type: ignore[assignment]  # importing it fails meanwhile
        try:
            arraymath = importlib.import_module("numba.np.arraymath")
        finally:
            del sys.modules["scipy.linalg"]
        arraymath._HAVE_BLAS = True  # type: ignore[attr-defined]


_postpone_linear_algebra()

__all__ = ["NO_CACHE", "njit", "numba"]
