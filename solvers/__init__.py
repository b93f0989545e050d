"""Pure optimisation over arrays: no device, no document, no torch.

One file per problem, each opening with its formulation, and one common result with a proven bound:

- ``split``: how many units of work each unequal device takes (exact);
- ``balance``: linear and greedy placements, and how even they are;
- ``annealing``: where single copies go, for few crossings at a given balance (scalable);
- ``affinity_layers``: the same, exact, where a layer has few ``arrangements``;
- ``affinity_exact``, ``affinity_fanout``: the same, exact, at small sizes; ``affinity_bound``: how good it can be;
- ``replication``: copies, places, shares (scalable), ``replication_exact``, ``replication_bound``; beside it ``eplb``;
- ``selection``: which strategy each layer uses under every device's memory (exact);
- ``mip``: the mixed-integer back ends (HiGHS and others through PuLP, CP-SAT);
- ``result``: the common ``Solution`` and the solvers' own errors.
"""

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ..caches import ExposedError, check_private, private_folder
from .result import Infeasible, NotFound, Solution, SolverError, SolverUnavailable

__all__ = ["Infeasible", "NotFound", "Solution", "SolverError", "SolverUnavailable"]


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
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
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
