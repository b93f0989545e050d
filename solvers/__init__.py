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

import hashlib
import os
from pathlib import Path

from .result import Infeasible, NotFound, Solution, SolverError, SolverUnavailable

__all__ = ["Infeasible", "NotFound", "Solution", "SolverError", "SolverUnavailable"]


def _compiled_code() -> Path:
    """Where numba keeps the compiled loops of exactly these sources.

    Its own cache compares one file at a time: a loop that calls another file's would go on with that one's old code.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "moeplan" / "solvers" / digest.hexdigest()[:24]


os.environ.setdefault("NUMBA_CACHE_DIR", str(_compiled_code()))  # read when numba is first imported
