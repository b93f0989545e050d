"""Pure optimisation over arrays: no device, no document, no torch.

A folder per kind of problem, each file opening with its formulation, and one common result with a proven bound:

- ``placement``: where single copies go, for few crossings at a given balance (scalable);
- ``replication``: copies, places, shares (scalable), and EPLB's rule;
- ``bounds``: how good either can be; ``exact``: both, at small sizes;
- ``selection``: which option each layer uses under every device's memory (exact);
- ``splits``: how many units of work each unequal device takes (exact);
- ``balance``, ``slots``: loads of devices, and experts with several copies, as arrays;
- ``mip``: the mixed-integer back ends (HiGHS and others through PuLP, CP-SAT);
- ``jit``, ``compiled``: numba, and the loops that it compiles, which are kept;
- ``result``: the common ``Solution`` and the solvers' own errors.
"""

from .result import Infeasible, NotFound, Solution, SolverError, SolverUnavailable

__all__ = ["Infeasible", "NotFound", "Solution", "SolverError", "SolverUnavailable"]
